"use strict";
// The gallery of report.html. Captions are strangers' words: they only ever become text nodes, never HTML.

const $ = (id) => document.getElementById(id);
const { runs, metrics, faults, rows } = JSON.parse($("content").textContent);
const names = Object.keys(metrics);
const several = runs.length > 1;
const PAGE = 24; // cards that are made at once
const collator = new Intl.Collator("en", { numeric: true });

let pictures = null; // read when the first card needs one: it is most of the file
function picture(id) {
  pictures ??= JSON.parse($("thumbnails").textContent);
  return Object.hasOwn(pictures, id) ? pictures[id] : null;
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------------------ what can be sorted by

const sorts = [];
names.forEach((name, column) => {
  const title = metrics[name];
  const of = (run) => (row) => row.scores[run][column];
  if (!several) sorts.push([title, of(0)]);
  for (let run = 1; run < runs.length; run++) {
    const difference = (row) => (of(0)(row) === null || of(run)(row) === null ? null : of(run)(row) - of(0)(row));
    sorts.push([`${title}: ${runs[run]} minus ${runs[0]}`, difference]);
  }
});
if (several) names.forEach((name, column) => runs.forEach((run, number) => sorts.push([`${metrics[name]} of ${run}`, (row) => row.scores[number][column]])));
runs.forEach((run, number) => sorts.push([several ? `length of ${run}` : "length", (row) => row.captions[number].length]));
sorts.push(["image id", (row) => row.id]);
sorts.forEach(([title], number) => $("sort").append(element("option", { value: number }, title)));

// ------------------------------------------------------------------------------------------------------------- filters

const counts = Object.fromEntries(faults.map((fault) => [fault, 0]));
for (const row of rows) {
  for (const fault of new Set(row.faults.flatMap(Object.keys))) counts[fault] += 1;
}
for (const fault of faults) {
  const box = element("input", { type: "checkbox", value: fault });
  box.disabled = counts[fault] === 0;
  $("filters").append(element("label", {}, box, `${fault} (${counts[fault].toLocaleString("en")})`));
}
if (several) {
  for (let run = 1; run < runs.length; run++) {
    const box = element("input", { type: "checkbox", value: `other:${run}` });
    $("filters").append(element("label", {}, box, `${runs[run]} says something else`));
  }
}

function passes(row, filter) {
  if (filter.startsWith("other:")) return row.captions[0] !== row.captions[filter.slice(6)];
  return row.faults.some((of_run) => Object.hasOwn(of_run, filter));
}

// ------------------------------------------------------------------------------------------------------------- gallery

function values(row, run) {
  const list = element("dl", { class: "values" });
  names.forEach((name, column) => {
    const value = row.scores[run][column];
    if (value !== null) list.append(element("div", {}, element("dt", {}, metrics[name]), element("dd", {}, value.toFixed(2))));
  });
  return list;
}

const looks = JSON.parse($("looks").textContent);

// The picture once a word, dark where the model did not look for it. Drawn when it is opened.
function wordMaps(row, image) {
  const { words, rows: high, columns: wide, maps } = looks[row.id];
  const levels = Uint8Array.from(atob(maps), (character) => character.charCodeAt(0));
  const strip = element("div", {});
  words.forEach((word, number) => {
    const shade = element("canvas", { width: wide, height: high });
    const pixels = new ImageData(wide, high);
    for (let patch = 0; patch < wide * high; patch++) {
      pixels.data[4 * patch + 3] = 0.65 * (255 - levels[number * wide * high + patch]); // black, more or less of it
    }
    shade.getContext("2d").putImageData(pixels, 0, 0);
    const width = 80;
    const height = Math.round((width * image.naturalHeight) / image.naturalWidth);
    const canvas = element("canvas", { width, height, role: "img", "aria-label": `Where the model looked for the word ${word}` });
    canvas.getContext("2d").drawImage(image, 0, 0, width, height);
    canvas.getContext("2d").drawImage(shade, 0, 0, width, height);
    strip.append(element("figure", {}, canvas, element("figcaption", {}, word)));
  });
  return strip;
}

function card(row) {
  const text = element("div", { class: "text" });
  runs.forEach((run, number) => {
    if (several) text.append(element("span", { class: `run run${number}` }, run));
    text.append(element("p", { class: "prediction" }, row.captions[number] || "(empty)"));
    for (const [fault, what] of Object.entries(row.faults[number])) {
      text.append(element("span", { class: "fault" }, `${fault}: ${what}`));
    }
    text.append(values(row, number));
  });
  const references = element("ul", { class: "references", "aria-label": "References" });
  references.append(...row.references.map((reference) => element("li", {}, reference)));
  text.append(references, element("p", { class: "id" }, row.id));
  const content = picture(row.id);
  if (content) {
    const alt = `The picture ${row.id}`;
    const image = element("img", { alt, loading: "lazy", src: `data:image/jpeg;base64,${content}` });
    if (Object.hasOwn(looks, row.id)) {
      const details = element("details", { class: "looks" }, element("summary", {}, "Where the model looked for each word"));
      details.addEventListener("toggle", () => details.append(wordMaps(row, image)), { once: true });
      references.before(details);
    }
    return element("li", {}, image, text);
  }
  const missing = Object.keys(pictures).length ? [element("div", { class: "no-picture" }, "no picture")] : [];
  return element("li", {}, ...missing, text);
}

let shown = [];
let made = 0;

function more() {
  $("gallery").append(...shown.slice(made, made + PAGE).map(card));
  made = Math.min(made + PAGE, shown.length);
  $("more").hidden = made === shown.length;
}

function haystack(row) {
  row.haystack ??= [row.id, ...row.captions, ...row.references].join("\n").toLowerCase();
  return row.haystack;
}

function update() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...$("filters").querySelectorAll(":checked")].map((box) => box.value);
  const [, key] = sorts[$("sort").value];
  const direction = Number($("order").value);
  shown = rows.filter((row) => words.every((word) => haystack(row).includes(word)) && wanted.every((filter) => passes(row, filter)));
  const missing = shown.filter((row) => key(row) === null);
  shown = shown.filter((row) => key(row) !== null);
  shown.sort((a, b) => {
    const [one, two] = [key(a), key(b)];
    return direction * (typeof one === "string" ? collator.compare(one, two) : one - two);
  });
  shown.push(...missing); // an image that has no such score stands last
  $("found").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} images`;
  $("gallery").replaceChildren();
  made = 0;
  more();
}

let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(update, 120);
});
$("controls").addEventListener("change", update);
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("more").addEventListener("click", more);
const nearEnd = new IntersectionObserver(
  (entries) => {
    if (!entries[0].isIntersecting) return;
    more();
    nearEnd.unobserve($("more")); // watched anew, as it may still be in sight
    nearEnd.observe($("more"));
  },
  { rootMargin: "800px" },
);
nearEnd.observe($("more"));
update();

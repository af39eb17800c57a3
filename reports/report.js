"use strict";
// The gallery of report.html. Captions are strangers' words: they only ever become text nodes, never HTML.

const $ = (id) => document.getElementById(id);
const { runs, metrics, faults, rows } = JSON.parse($("content").textContent);
const names = Object.keys(metrics);
const several = runs.length > 1;

let pictures = null; // read when the first card needs one: it is most of the file
function picture(id) {
  pictures ??= JSON.parse($("thumbnails").textContent);
  return Object.hasOwn(pictures, id) ? `data:image/webp;base64,${pictures[id]}` : null;
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------------------ what can be sorted by

const sorts = []; // [title, (row, number of the row) => number or null]
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
sorts.push(["image id", (row, number) => number]); // the rows come in the order of their ids
sorts.forEach(([title], number) => $("sort").append(element("option", { value: number }, title)));

// Orders are cached: the rows by a key, lowest first, then those without such a score.
const orders = new Map();
function order(sort) {
  if (!orders.has(sort)) {
    const keys = rows.map((row, number) => sorts[sort][1](row, number));
    const present = [...keys.keys()].filter((number) => keys[number] !== null).sort((a, b) => keys[a] - keys[b]);
    const missing = [...keys.keys()].filter((number) => keys[number] === null);
    orders.set(sort, { present, missing });
  }
  return orders.get(sort);
}

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
    $("filters").append(element("label", {}, box, `another caption by ${runs[run]}`));
  }
}

function passes(row, filter) {
  if (filter.startsWith("other:")) return row.captions[0] !== row.captions[filter.slice(6)];
  return row.faults.some((of_run) => Object.hasOwn(of_run, filter));
}

function haystack(row) {
  row.haystack ??= [row.id, ...row.captions, ...row.references].join("\n").toLowerCase();
  return row.haystack;
}

// ---------------------------------------------------------------------------------------------------- one image, in full

// What is said about an image. A card shows only the first scores.
function text(row, most) {
  const box = element("div", { class: "text" });
  runs.forEach((run, number) => {
    if (several) box.append(element("span", { class: `run run${number}` }, run));
    box.append(element("p", { class: "prediction" }, row.captions[number] || "(empty)"));
    const found = Object.entries(row.faults[number]).map(([fault, what]) => `${fault}: ${what}`);
    const asked = [...document.querySelectorAll("#filters :checked")].map((box) => `${box.value}: `);
    if (most) found.sort((a, b) => asked.some((name) => b.startsWith(name)) - asked.some((name) => a.startsWith(name)));
    const chips = found.slice(0, most ? 1 : found.length).map((words) => element("span", { class: "fault", title: words }, words));
    if (most && found.length > 1) chips.push(element("span", { class: "fault more", title: found.slice(1).join("\n") }, `+${found.length - 1}`));
    if (chips.length) box.append(element("div", { class: "chips" }, ...chips));
    const list = element("dl", { class: "values" });
    names.slice(0, most).forEach((name, column) => {
      const value = row.scores[number][column];
      if (value !== null) list.append(element("div", {}, element("dt", {}, metrics[name]), element("dd", {}, value.toFixed(2))));
    });
    if (list.childElementCount) box.append(list);
  });
  row.tuples?.forEach((tuples, number) => {
    if (!tuples || most) return; // a card has no room for them
    const name = several ? `SPICE's tuples of ${runs[number]}` : "SPICE's tuples";
    const details = element("details", {}, element("summary", {}, name));
    for (const [kind, found] of Object.entries(tuples)) {
      if (found.length) details.append(element("p", {}, `${kind}: ${found.join(", ")}`));
    }
    box.append(details);
  });
  const title = row.references.length === 1 ? "1 reference" : `${row.references.length} references`;
  const references = element("ul", { class: "references" }, ...row.references.map((reference) => element("li", {}, reference)));
  box.append(element("p", { class: "heading" }, title), references);
  return box;
}

const looks = JSON.parse($("looks").textContent);

// The picture once per word, dark where the model did not look for it.
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
    const width = 96;
    const height = Math.round((width * image.naturalHeight) / image.naturalWidth);
    const canvas = element("canvas", { width, height, role: "img", "aria-label": `Where the model looked for the word ${word}` });
    canvas.getContext("2d").drawImage(image, 0, 0, width, height);
    canvas.getContext("2d").drawImage(shade, 0, 0, width, height);
    strip.append(element("figure", {}, canvas, element("figcaption", {}, word)));
  });
  return strip;
}

let opened = 0; // place in `shown`

function open(place) {
  opened = place;
  const row = rows[shown[place]];
  const source = picture(row.id);
  const content = [text(row)];
  if (source) {
    const image = element("img", { alt: `Image ${row.id}`, src: source });
    content.unshift(image);
    if (Object.hasOwn(looks, row.id)) {
      const maps = element("section", { class: "looks", "aria-label": "Where the model looked for each word" }, element("h3", {}, "Where the model looked for each word"));
      image.decode().then(() => maps.append(wordMaps(row, image)), () => {});
      content.push(maps);
    }
  }
  $("opened").replaceChildren(...content);
  $("viewer-title").textContent = `${row.id} (${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")})`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === shown.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
  $("viewer").scrollTop = 0;
}

function turn(by) {
  const place = opened + by;
  if (place < 0 || place >= shown.length) return;
  open(place);
  if (document.activeElement === document.body) $("close").focus(); // the button that was pressed is disabled now
}
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close(); // outside of it
});
$("viewer").addEventListener("close", () => {
  reveal(opened);
  cards.get(opened)?.querySelector("button").focus({ preventScroll: true });
});

// ------------------------------------------------------------------------------------------------------------- gallery

let shown = []; // numbers of the rows that pass, in order
const cards = new Map(); // place in `shown` -> its card, of those in sight and a few around them

function card(place) {
  const row = rows[shown[place]];
  const label = `Open image ${row.id}`;
  const button = element("button", { type: "button", "aria-label": label }, "Open");
  const foot = element("div", { class: "foot" }, element("p", { class: "id", title: row.id }, row.id), button);
  const box = text(row, 4);
  box.append(foot);
  const node = element("li", { "aria-posinset": place + 1, "aria-setsize": shown.length }, box);
  button.addEventListener("click", () => open(place));
  const source = picture(row.id);
  if (source) {
    const image = element("img", { alt: `Image ${row.id}`, src: source });
    image.addEventListener("click", () => open(place));
    node.prepend(image);
  } else if (Object.keys(pictures).length) {
    node.prepend(element("div", { class: "no-picture" }, "no picture"));
  }
  return node;
}

// Columns and the height of a row of cards, which is the same for all: measured on a card of the page.
function measure() {
  const columns = getComputedStyle($("gallery")).gridTemplateColumns.split(" ").length;
  const first = $("gallery").firstElementChild;
  return { columns, height: first ? first.offsetHeight + parseFloat(getComputedStyle($("gallery")).rowGap) : 1 };
}

function draw() {
  const gallery = $("gallery");
  if (!cards.size && shown.length) {
    cards.set(0, card(0));
    gallery.append(cards.get(0));
  }
  const { columns, height } = measure();
  const count = Math.ceil(shown.length / columns);
  const top = -gallery.getBoundingClientRect().top;
  const first = Math.max(0, Math.min(Math.floor(top / height) - 1, count - 1));
  const screen = Math.ceil(innerHeight / height) + 1; // rows that fill the screen: the first of them are there before they are scrolled to
  const last = Math.min(count, Math.max(first + screen, Math.ceil((top + innerHeight) / height) + 1));
  for (const [place, node] of cards) {
    if (place < first * columns || place >= last * columns) {
      node.remove();
      cards.delete(place);
    }
  }
  let before = null; // the card after the one to be added
  for (let place = Math.min(last * columns, shown.length) - 1; place >= first * columns; place--) {
    if (!cards.has(place)) {
      cards.set(place, card(place));
      gallery.insertBefore(cards.get(place), before);
    }
    before = cards.get(place);
  }
  gallery.style.paddingTop = `${first * height}px`;
  gallery.style.paddingBottom = `${Math.max(0, count - last) * height}px`;
}

// Scrolls to a card, if it is not in sight.
function reveal(place) {
  const { columns, height } = measure();
  const top = $("gallery").getBoundingClientRect().top + Math.floor(place / columns) * height;
  if (top < 0 || top + height > innerHeight) scrollBy({ top: top - Math.max(0, innerHeight - height) / 2, behavior: "instant" });
  draw();
}

function update() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...$("filters").querySelectorAll(":checked")].map((box) => box.value);
  const { present, missing } = order($("sort").value);
  const sorted = (Number($("order").value) === 1 ? present : present.slice().reverse()).concat(missing);
  shown = sorted.filter((number) => words.every((word) => haystack(rows[number]).includes(word)) && wanted.every((filter) => passes(rows[number], filter)));
  $("found").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} image${rows.length === 1 ? "" : "s"}`;
  cards.clear();
  $("gallery").replaceChildren();
  $("gallery").style.paddingTop = $("gallery").style.paddingBottom = "0";
  draw();
}

let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(update, 120);
});
// The images that are shown, in this order, for infer.py --only.
$("save").addEventListener("click", () => {
  const list = new Blob(shown.map((number) => `${rows[number].id}\n`), { type: "text/plain" });
  const link = element("a", { href: URL.createObjectURL(list), download: "images.txt" });
  link.click();
  URL.revokeObjectURL(link.href);
});
$("controls").addEventListener("change", update);
$("controls").addEventListener("submit", (event) => event.preventDefault());
let drawing = 0;
function drawSoon() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(draw);
}
addEventListener("scroll", drawSoon, { passive: true });
addEventListener("resize", drawSoon);
$("gallery").style.setProperty("--runs", runs.length);
update();

"""The page that demo.py serves: its settings, inputs and outputs."""

import base64
import contextlib
import csv
import functools
import html
import io
import tempfile
from pathlib import Path

import gradio as gr
import torch

from captioner import Captioner
from captioning.server import ServerCaptioner
from common.errors import UserError
from common.text import spreadsheet_cell
from data.uploads import list_uploads, read_upload, read_uploads
from models.onnx_model import OnnxModel
from objectives.cross_entropy import mean_log_probs
from reports.attention_maps import attention_maps, has_maps, overlay

CHUNK = 8  # images captioned at once
CSS = """
.words {display: flex; flex-wrap: wrap; gap: 10px; margin: 0; padding: 0}
.words figure {margin: 0; width: 90px}
.words img {width: 90px; border-radius: 8px; display: block}
.words figcaption {overflow-wrap: anywhere; text-align: center; font-size: 0.95rem; padding-top: 4px; color: var(--body-text-color)}
.picture img {width: 100%; height: 100%; object-fit: contain}
:root, .dark {--font-mono: var(--font) !important}
/* On a phone: a setting per line; the image, its caption, and then the examples, which are below the image elsewhere. */
@media (max-width: 760px) {
  .settings .form > * {flex: 1 1 100% !important}
  .one > .ask {display: contents}
  .one > .ask > * {flex: 1 1 100% !important}
  .one .examples {order: 1}
}
footer .divider:last-child {display: none}
.best textarea {font-size: 1.2rem !important; line-height: 1.4; field-sizing: content; height: auto !important}
"""
# Names for screen readers: Gradio gives examples none, and the upload area one that differs from the text it shows.
NAMES = """() => {
    const name = () => {
        document.querySelectorAll("button.gallery-item").forEach((item, place) => item.setAttribute("aria-label", `Example ${place + 1}`));
        document.querySelectorAll("button.upload-container, button[aria-dropeffect]").forEach((area) => area.removeAttribute("aria-label"));
    };
    name();
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}"""
LOOKS = "What the model looks at as it writes each word: bright where its cross-attention is."


def build(captioners: dict[str, Captioner], examples: list[str], max_images: int):
    """The page: one image, or many."""
    with gr.Blocks(title="Image captions", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as app:
        gr.Markdown(f"# Image captions\nby {' and '.join(f'`{name}`' for name in captioners)}")
        with gr.Accordion("Settings: how many captions, beams, length, sampling, prompt", open=False):
            here = [captioner for captioner in captioners.values() if captioner.model]
            settings = settings_panel(here[0]) if here else server_panel(next(iter(captioners.values())))
        with gr.Tab("One image"):
            one_image(captioners, settings, examples)
        with gr.Tab("Many images"):
            many_images(captioners, settings, max_images)
    return app


def one_image(captioners: dict[str, Captioner], settings: dict, examples: list[str]) -> None:
    """The tab for one image, which is captioned as soon as it is uploaded."""
    with gr.Row(elem_classes="one"):
        with gr.Column(scale=2, elem_classes="ask"):
            image = gr.Image(
                type="filepath", elem_classes="picture", label="Image", sources=["upload", "clipboard", "webcam"],
                height=380, image_mode=None,
            )  # fmt: skip
            button = gr.Button("Caption it", variant="primary")
            with gr.Column(elem_classes="examples"):
                gallery = gr.Examples(examples, image, label="Examples")
        outputs = []
        for name in captioners:
            with gr.Column(scale=3):
                outputs += answer("Caption" if len(captioners) == 1 else f"Caption by {name}")
    refuse_urls(image)
    # Leave the upload unchanged: data.open_image reads it, and reports what is wrong with it.
    image.preprocess = lambda upload: upload and upload.path
    # Progress and errors are shown on the first caption, not on every part of the answer.
    options = {"inputs_kwargs": settings, "show_progress_on": outputs[0]}
    ask = functools.partial(caption_image, captioners)
    sent = [button.click, image.upload, settings["prompt"].submit]
    asked = gr.on(sent, ask, image, outputs, api_name="caption", **options)
    example = gallery.load_input_event.then(ask, image, outputs, api_visibility="private", **options)
    empty = ["", [], ""] * len(captioners)
    image.clear(lambda: empty, None, outputs, api_visibility="private")

    def after_mistake(image):
        """After a mistake, clear an unreadable image and the captions of the previous one."""
        bad = image is not None and isinstance(read_upload(Path(image).name, image), Exception)
        return [None if bad else gr.skip(), *empty]

    for event in (asked, example):
        event.failure(after_mistake, image, [image, *outputs], show_progress="hidden", api_visibility="private")


def answer(label: str) -> list:
    """The components of a model's answer: its best caption, all of them, and where it looked."""
    best = gr.Textbox(
        label=label, lines=2, max_lines=10, buttons=["copy"], interactive=False, elem_classes="best"
    )  # fmt: skip
    table = gr.Dataframe(
        headers=["caption", "score"], label="All captions; score: mean log-probability of a token, 0 is best",
        interactive=False, wrap=True, column_widths=["80%", "20%"],
    )  # fmt: skip
    return [best, table, gr.HTML()]


def many_images(captioners: dict[str, Captioner], settings: dict, max_images: int) -> None:
    """The tab for many images, captioned by the first model, and for zips of them."""
    files = gr.File(
        label=f"Images, or a zip of them (up to {max_images} images)",
        file_count="multiple", file_types=["image", ".zip"],
    )  # fmt: skip
    many = gr.Button("Caption them all", variant="primary")
    status = gr.Markdown()
    with gr.Column(visible=False) as download:
        tables = gr.File(label="Download as CSV or text", interactive=False, file_count="multiple")
    results = gr.Dataframe(
        headers=["file", "caption", "error"], label="Captions", interactive=False, wrap=True,
        column_widths=["28%", "40%", "32%"],
    )  # fmt: skip
    refuse_urls(files)
    batch = many.click(
        functools.partial(caption_files, next(iter(captioners.values())), max_images), files, [status, results, tables],
        inputs_kwargs=settings, api_name="caption_files", show_progress_on=status,
    )  # fmt: skip
    done = {"show_progress": "hidden", "api_visibility": "private"}
    batch.success(lambda: gr.Column(visible=True), None, download, **done)
    batch.failure(lambda: ["", [], None, gr.Column(visible=False)], None, [status, results, tables, download], **done)


def caption_image(captioners: dict[str, Captioner], image, **settings):
    """For each model its best caption, [[caption, score], ...] best first, and a heat map per word, as HTML."""
    with mistakes_shown():
        if image is None:
            raise UserError("Give an image first: upload, paste or photograph one.")
        picture = read_upload(Path(image).name, image)
        if isinstance(picture, Exception):
            raise picture
        outputs = []
        for captioner in captioners.values():
            captioner = with_settings(captioner, **settings)
            scored = candidates(captioner, picture)
            rows = [[text, "" if score is None else f"{score:.2f}"] for text, score in scored]
            outputs += [scored[0][0], rows, heat_maps(captioner, picture, scored[0][0])]
        return outputs


def caption_files(captioner: Captioner, max_images: int, files, progress=gr.Progress(), **settings):  # noqa: B008
    """[[file, caption, error], ...] of images and of those in zips, and both as files."""
    with mistakes_shown():
        uploads = list_uploads(files or [], max_images)
        if not uploads:
            raise UserError("Give some images first: files, or a zip of them.")
        captioner = with_settings(captioner, **settings | {"num_captions": 1})
        rows = []
        for chunk in read_uploads(uploads, CHUNK):
            images = [image for _, image in chunk if not isinstance(image, Exception)]
            captions = iter(first_captions(captioner, images) if images else [])
            outcomes = [image if isinstance(image, Exception) else next(captions) for _, image in chunk]
            texts = [["", str(outcome)] if isinstance(outcome, Exception) else [outcome, ""] for outcome in outcomes]
            rows += [[name, *text] for (name, _), text in zip(chunk, texts, strict=True)]
            progress((len(rows), len(uploads)), unit="images")
            yield f"{len(rows)} of {len(uploads)} done", rows, None
        bad = sum(bool(error) for _, _, error in rows)
        status = f"**{len(rows) - bad} of {len(rows)} captioned.**" + (f" {bad} could not be read." if bad else "")
        with tempfile.TemporaryDirectory() as folder:
            yield status, rows, write_tables(Path(folder), rows)


def slider(label, low, high, step, value, info):
    return gr.Slider(min(low, value), max(high, value), value, step=step, label=label, info=info)


def sampling_panel() -> dict:
    return {
        "do_sample": gr.Checkbox(False, label="Sample", info="Draw captions at random, not the likeliest"),
        "temperature": slider("Temperature", 0.1, 2, 0.1, 1.0, "For sampling: lower is safer"),
        "top_p": slider("Top p", 0.05, 1, 0.05, 0.9, "For sampling: share of likely words"),
    }


def server_panel(captioner: ServerCaptioner) -> dict:
    """As settings_panel, for models on a server alone."""
    longest = captioner.settings["max_new_tokens"]
    with gr.Row(elem_classes="settings"):
        search = {
            "num_captions": slider("Captions", 1, 10, 1, 1, "More than one only with Sample"),
            "max_new_tokens": slider("Longest", 1, 1000, 1, longest, "In tokens: about one per word"),
        }
    with gr.Row(elem_classes="settings"):
        prompt = gr.Textbox(captioner.prompt, label="Prompt", max_length=200, info="What the model is asked")
        return search | sampling_panel() | {"prompt": prompt}


def settings_panel(captioner: Captioner) -> dict:
    """The components whose values with_settings takes, by the names of its arguments."""
    defaults = {"length_penalty": 1.0, "min_new_tokens": 0} | {
        k: v for k, v in captioner.settings.items() if v is not None
    }

    with gr.Row(elem_classes="settings"):
        search = {
            # No more than the model's own beams: with more, the search would be another one, and so may the best caption.
            "num_captions": slider(
                "Captions", 1, 10, 1, min(3, defaults["num_beams"]), "How many to show, the likeliest first"
            ),
            "num_beams": slider("Beams", 1, 10, 1, defaults["num_beams"], "More take longer; at least one per caption"),
            "max_new_tokens": slider("Longest", 1, 100, 1, defaults["max_new_tokens"], "In tokens: about one per word"),
            "min_new_tokens": slider(
                "Shortest", 0, 100, 1, defaults["min_new_tokens"], "In tokens: about one per word"
            ),
            "length_penalty": slider(
                "Length penalty", -2, 4, 0.1, defaults["length_penalty"], "Above 1: longer captions"
            ),
        }
    with gr.Row(elem_classes="settings"):
        penalty = defaults["repetition_penalty"]
        repetition = slider("Repetition", 1, 3, 0.1, penalty, "Penalty; above 1: fewer repeated words")
        sampling = sampling_panel()
        prompt = gr.Textbox(captioner.prompt, label="Prompt", max_length=200, info="Every caption continues it")
        return search | {"repetition_penalty": repetition} | sampling | {"prompt": prompt}


def with_settings(
    captioner: Captioner | ServerCaptioner, num_captions, max_new_tokens, do_sample, temperature, top_p, prompt,
    num_beams=1, **search,
) -> Captioner | ServerCaptioner:  # fmt: skip
    """The same model with the settings from the page; of `search` a model on a server has none."""
    if len(prompt or "") > 200:
        raise UserError("A prompt may have at most 200 characters.")
    decoding = {"do_sample": bool(do_sample), "max_new_tokens": max_new_tokens}
    if captioner.model is None:
        decoding["num_return_sequences"] = num_captions if do_sample and num_captions > 1 else None
        return captioner.with_settings(prompt or "", **decoding, temperature=temperature, top_p=top_p)
    decoding |= search | {"num_return_sequences": num_captions}
    if do_sample:
        decoding.pop("length_penalty")
        decoding |= {"temperature": temperature, "top_p": top_p, "num_beams": 1}
    else:
        decoding["num_beams"] = max(num_beams, num_captions)
    return captioner.with_settings(prompt or "", **decoding)


def first_captions(captioner: Captioner | ServerCaptioner, images: list) -> list[str | Exception]:
    """A caption per image, or why a server gives it none."""
    if captioner.model is None:
        return [answer if isinstance(answer, Exception) else answer[0] for answer in captioner.answers(images)]
    return captioner(images)


@torch.inference_mode()
def candidates(captioner: Captioner | ServerCaptioner, picture) -> list[tuple[str, float | None]]:
    """The captions of one image, each once, with the mean log-probability of their tokens (None from a server and from ONNX graphs): beams in the
    order of their search, whose first one is the caption that every script writes; samples by that, best first."""
    if captioner.model is None:
        (texts,) = captioner.answers([picture])
        if isinstance(texts, Exception):
            raise texts
        return [(text, None) for text in dict.fromkeys(texts)]
    if isinstance(captioner.model, OnnxModel):
        batch = captioner.collator([{"image": picture, "image_id": ""}])
        return [(text, None) for text in dict.fromkeys(captioner.caption_batch(batch)[0])]
    with torch.autocast(captioner.model.device.type, captioner.autocast, enabled=captioner.autocast is not None):
        batch = captioner.encode(captioner.collator([{"image": picture, "image_id": ""}]))
        tokens = captioner.generate_tokens(batch)
        scores = mean_log_probs(captioner.model, captioner.training_batch(batch, captioner.rows(tokens)))
    texts = list(zip(captioner.texts(tokens), scores.tolist(), strict=True))
    if captioner.settings.get("do_sample"):
        texts.sort(key=lambda pair: -pair[1])
    first = {}
    for text, score in texts:  # different tokens may be the same text
        first.setdefault(text, (text, score))
    return list(first.values())


def heat_maps(captioner: Captioner, picture, caption: str) -> str:
    """A small picture per word, as HTML; nothing for models without maps."""
    if not has_maps(captioner) or not caption:
        return ""
    words, maps = attention_maps(captioner, picture, caption)
    small = picture.copy()
    small.thumbnail((180, 180))
    figures = []
    for word, heat in zip(words, maps, strict=True):
        file = io.BytesIO()
        overlay(small, heat).save(file, "JPEG", quality=85)
        source = base64.b64encode(file.getvalue()).decode()
        word = html.escape(word)
        figures.append(
            f'<figure><img src="data:image/jpeg;base64,{source}" alt="Where the model looks for the word {word}">'
            f"<figcaption>{word}</figcaption></figure>"
        )
    return f'<p>{LOOKS}</p><div class="words">{"".join(figures)}</div>'


def write_tables(folder: Path, rows: list[list[str]]) -> list[str]:
    """captions.csv (file, caption, error) and captions.txt (file, tab, caption) in `folder`; their paths."""
    with (folder / "captions.csv").open("w", encoding="utf-8-sig", newline="") as file:  # a BOM, for Excel
        csv.writer(file).writerows([["file", "caption", "error"], *(map(spreadsheet_cell, row) for row in rows)])
    lines = [f"{name}\t{caption}\n" for name, caption, error in rows if not error]
    (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return [str(folder / "captions.csv"), str(folder / "captions.txt")]


@contextlib.contextmanager
def mistakes_shown():
    """A visitor's mistake, raised as a ValueError, becomes a message on the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def refuse_urls(component) -> None:
    """Refuse URLs: Gradio would fetch one that a client names in place of a file."""
    keep = component.async_move_resource_to_block_cache

    async def only_uploads(path):
        if path and str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("Upload the file itself: this server fetches no URLs.", print_exception=False)
        return await keep(path)

    component.async_move_resource_to_block_cache = only_uploads


def theme():
    """Gradio's default theme, with enough contrast for text."""
    return gr.themes.Default(primary_hue="blue").set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


class RelativeLinks:
    """ASGI middleware: Gradio's page links its manifest by an absolute path and no icon, so behind a proxy's path a
    browser would request both from another site. This makes both links relative to the page."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) not in ("", "/"):
            return await self.app(scope, receive, send)
        start, body = {}, b""

        async def changed(message):
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            links = b'href="manifest.json" /><link rel="icon" href="favicon.ico"'
            body = body.replace(b'href="/manifest.json"', links)
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        return await self.app(scope, receive, changed)

"""report.html: scores, distributions and every caption with its picture and references, in one file.

The page requests nothing from any server (its content security policy forbids it) and runs no script but its own:
pictures are data URIs, captions reach the page as JSON and become text nodes. Template, style and script are report.html.jinja,
report.css and report.js next to this file.
"""

import base64
import functools
import hashlib
import io
import itertools
import json
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from common.files import write_text
from common.limits import cpus
from data.images import ImageError, open_image
from data.seen import in_words
from metrics import names
from metrics.coco_caption.coco import ends_badly
from metrics.coco_caption.text_checks import contradictions, illegal_characters, repetition
from metrics.coco_caption.tokenizer import tokenize
from reports.charts import charts, line_charts
from reports.significance import p_in_words

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
SHARES = {
    "distinct": "different captions", "seen_in_training": "word for word in the training captions",
    "bad_endings": "bad endings", "repeated_words": "a word twice in a row", "repetition": "loops", "empty": "empty",
    "illegal_characters": "illegal characters",
}  # fmt: skip
MOST_TUPLES = 5000  # images: SPICE's tuples are a kilobyte each
# Thumbnails: (up to so many images, longest side in pixels, WebP quality): some 5 to 15 MB, of 40,000 images 45 MB.
SIZES = ((1000, 256, 70), (2500, 192, 60), (10_000, 128, 45), (40_000, 80, 40))


def write_report(
    folder: Path, scores: dict, rows: list[dict], images=None, *, curves=(), sweep=None, looks=None
) -> None:
    """report.html of a run.

    Args:
        scores, rows: what coco_metrics.json and per_image.jsonl hold, of reports.outputs.
        images: an image value (data.open_image) for each row, if there are any. Thumbnails are made here.
        curves: reports.plots.training_panels of the run that trained the model.
        looks: called without arguments, returns {image id: (words, (words, rows, columns) attention maps)} of some.
        sweep: what sweep.json holds, of reports.sweep; its heat map is sweep.svg in the folder.

    Whatever goes wrong is logged and not raised: the scores are written, and no report is worth losing what follows.
    """
    try:
        plot = folder / "sweep.svg"
        source = scores.get("model") or scores.get("predictions")
        _write(
            folder,
            {Path(str(source)).name: {"scores": scores, "rows": rows}},
            thumbnails([row["image_id"] for row in rows], images, [row["scores"]["CIDEr"] for row in rows]),
            curve_charts=line_charts(curves) if curves else [],
            sweep=sweep,
            sweep_plot=_svg_uri(plot) if sweep and plot.is_file() else None,
            looks=_script_json(encode_maps(looks() if looks else {})),
        )
    except Exception:
        logger.exception("report.html could not be written; the scores are in %s", folder)


def write_comparison_report(folder: Path, runs: dict[str, dict], comparison: dict) -> None:
    """report.html of several runs side by side, from reports.comparison. Pictures are those of the runs' own reports."""
    try:
        pictures = next(filter(None, (read_thumbnails(run["folder"]) for run in runs.values())), {})
        _write(folder, runs, pictures, comparison=comparison)
    except Exception:
        logger.exception("report.html could not be written; comparison.json is in %s", folder)


@functools.cache
def _template():
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["last_part"] = lambda path: Path(path).name if Path(path).exists() else path
    environment.filters["in_words"] = in_words
    environment.globals |= {
        "shown": names.shown,
        "score_named": names.score_named,
        "p_in_words": p_in_words,
        "explanations": _explanations(),
    }
    return environment.get_template("report.html.jinja")


def _write(folder: Path, runs: dict[str, dict], pictures: dict[str, str], **parts) -> None:
    style, script = (
        (HERE / "report.css").read_text(encoding="utf-8"),
        (HERE / "report.js").read_text(encoding="utf-8"),
    )
    first = next(iter(runs.values()))
    had = dict.fromkeys(name for row in first["rows"] for name in row["scores"])
    columns = names.in_order(name for name in had if names.score_named(name).per_image)
    readable = {
        name for name in {*names.SCORES, *columns} if any(names.is_shown(name, r["scores"]) for r in runs.values())
    }
    faults_of_run = [faults(run["rows"]) for run in runs.values()]
    # In the order of the images' ids, numbers by their value: what the page sorts "by image id" is this order.
    order = sorted(range(len(first["rows"])), key=lambda number: _natural(first["rows"][number]["image_id"]))
    content = {
        "runs": list(runs),
        "metrics": {name: names.score_named(name).label for name in columns},
        "faults": list(dict.fromkeys(itertools.chain(ALWAYS_SHOWN, *itertools.chain(*faults_of_run)))),
        "rows": [
            {
                "id": rows[0]["image_id"],
                "references": rows[0]["references"],
                "captions": [row["caption"] for row in rows],
                "scores": [[_rounded(row["scores"].get(name)) for name in columns] for row in rows],
                "faults": list(row_faults),
                "tuples": [_tuples(row) if len(first["rows"]) <= MOST_TUPLES else None for row in rows],
            }
            for rows, row_faults in (
                ([run["rows"][number] for run in runs.values()], [of_run[number] for of_run in faults_of_run])
                for number in order
            )
        ],
    }
    page = _template().render(
        runs=runs,
        names={name: names.score_named(name).label for name in names.in_order(readable)},
        main_scores=[score.name for score in names.SCORES.values() if score.main],
        shares=SHARES,
        charts=charts(runs),
        frequent={name: most_frequent(run["rows"]) for name, run in runs.items()},
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        content=_script_json(content),
        thumbnails=_script_json(pictures),
        has_pictures=bool(pictures),
        **{"comparison": None, "sweep": None, "sweep_plot": None, "curve_charts": [], "looks": "{}"} | parts,
    )
    write_text(folder / "report.html", page)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def thumbnails(image_ids: list[str], images, scores: list[float]) -> dict[str, str]:
    """{image id: small WebP in base64} of the images that can be opened; of very many, those with the lowest scores."""
    if images is None:
        return {}
    limit = SIZES[-1][0]
    _, side, quality = next((row for row in SIZES if len(image_ids) <= row[0]), SIZES[-1])
    chosen = sorted(sorted(range(len(image_ids)), key=lambda index: scores[index])[:limit])

    def thumbnail(index: int) -> str | None:
        try:
            picture = open_image(images[index], size=(side, side))
        except ImageError as error:
            logger.warning("report.html: no picture of %s", error)
            return None
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality)
        return base64.b64encode(file.getvalue()).decode()

    with ThreadPoolExecutor(min(8, cpus())) as pool:
        made = zip(chosen, pool.map(thumbnail, chosen), strict=True)
        return {image_ids[index]: picture for index, picture in made if picture}


def encode_maps(looks: dict) -> dict[str, dict]:
    """Attention maps as JSON: a byte for each patch, 255 where a word's map is highest, in base64."""
    encoded = {}
    for image_id, (words, maps) in looks.items():
        levels = (255 * maps / maps.max(axis=(1, 2), keepdims=True)).round().astype("uint8")
        content = base64.b64encode(levels.tobytes()).decode()
        encoded[image_id] = {"words": words, "rows": maps.shape[1], "columns": maps.shape[2], "maps": content}
    return encoded


def read_thumbnails(folder: str) -> dict[str, str]:
    """The thumbnails in the report.html of a folder; none if there is no such report."""
    try:
        page = (Path(folder) / "report.html").read_text(encoding="utf-8")
        return json.loads(re.search(r'<script type="application/json" id="thumbnails">(.*?)</script>', page)[1])
    except (OSError, TypeError, ValueError):
        return {}


def _svg_uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Captions

ALWAYS_SHOWN = ("bad ending", "repeated words", "colour contradicted", "count contradicted")


def most_frequent(rows: list[dict], number: int = 5) -> dict:
    """{"different": number of different captions, "most": [(caption, images), ...] of those of several images}."""
    counts = Counter(row["caption"] for row in rows)
    repeated = [(caption, images) for caption, images in counts.most_common(number) if images > 1]
    return {"different": len(counts), "most": repeated}


def faults(rows: list[dict]) -> list[dict[str, str]]:
    """What is wrong with each caption by itself or compared with all its references: {fault: what exactly} for each row."""
    faults_of_rows = []
    for row, tokens in zip(rows, tokenize(row["caption"] for row in rows), strict=True):
        caption, row_faults = row["caption"], {}
        if not tokens:
            row_faults["empty"] = "no words"
        if ends_badly(tokens):
            row_faults["bad ending"] = f"… {tokens[-1]}"
        if twice := next((one for one, two in itertools.pairwise(tokens) if one == two), None):
            row_faults["repeated words"] = f"{twice} {twice}"
        if loop := repetition(caption):
            row_faults["loop"] = loop
        if characters := illegal_characters(caption):
            row_faults["illegal characters"] = " ".join(f"U+{ord(character):04X}" for character in characters)
        for name in ("hallucinated", "missed"):
            if objects := row.get("objects", {}).get(name):
                row_faults[f"object {name}"] = ", ".join(objects)
        for fact, (wrong, instead) in contradictions(caption, row["references"]).items():
            if wrong:
                row_faults[f"{fact} contradicted"] = f"{', '.join(wrong)}; references: {', '.join(instead)}"
        faults_of_rows.append(row_faults)
    return faults_of_rows


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _explanations() -> dict[str, str]:
    """{label of a score: what docs/scores.md says of it}, without the formulas; empty if that file is missing."""
    path = HERE.parent / "docs/scores.md"
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL) if path.is_file() else ""
    sections = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return {label: " ".join(words.replace("`", "").split()) for label, words in sections}


def _tuples(row: dict) -> dict[str, list[str]] | None:
    """SPICE's tuples of an image in words: {"matched": ["man", "man: tall", "man ride horse"], ...}."""
    if "spice_tuples" not in row:
        return None
    return {
        group: [": ".join(words) if len(words) == 2 else " ".join(words) for words in tuples]
        for group, tuples in row["spice_tuples"].items()
    }


def _natural(text: str) -> tuple:
    """Sorts numbers in texts by their value, and letters without regard to case."""
    parts = re.split(r"(\d+)", text.casefold())
    return [
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part) for place, part in enumerate(parts)
    ], text


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _script_json(value) -> str:
    """JSON that is safe inside <script>: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

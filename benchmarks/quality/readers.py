"""The same photographs in every form of data set, read by every script: the same images, with the same captions?

    CAPTION_TEST_DATA=... python -m benchmarks.quality.readers [--photos 800] [--trees 1000]

Readers: train.py and evaluate.py (data.load), evaluate.py's --references and --predictions, infer.py and rewrite.py. Then the
identity tests on random trees (tests/data/test_identity.py), as many as --trees for all forms together.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets

import data
from arguments import RewriteArguments
from benchmarks.harness import RESULTS, ROOT, write_result
from captioning.sources import image_rows
from data.caption_files import load_predictions, read_references
from data.images import ImageError
from data.rows import Options
from rewriting.rows import open_source

sys.path.append(str(ROOT / "tests/helpers"))
from random_trees import FORMS, write

READERS = ("train", "evaluate", "references", "predictions", "infer", "rewrite")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=800)
    parser.add_argument("--trees", type=int, default=1000)
    parser.add_argument("--output", default=str(RESULTS / "readers.json"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        photos, captions = photographs(Path(os.environ["CAPTION_TEST_DATA"]) / "flickr8k", arguments.photos)
        table = {form: row_of(form, Path(folder), photos, captions) for form in FORMS}
    for form, cells in table.items():
        print(f"{form:14} " + "  ".join(f"{reader} {cells[reader]}" for reader in READERS), flush=True)
    result = {"photos": len(photos), "table": table, "trees": random_trees(arguments.trees)}
    write_result(arguments.output, result | {"seconds": round(time.perf_counter() - start)})


def photographs(folder: Path, number: int) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """({file name: content}, {file name: captions}) of the first photographs."""
    lines = (folder / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions: dict[str, list[str]] = {}
    for line in lines:
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(" ".join(caption.split()))
    files = sorted((folder / "Flicker8k_Dataset").glob("*.jpg"))[:number]
    return {file.name: file.read_bytes() for file in files}, {file.name: captions[file.name] for file in files}


def row_of(form: str, folder: Path, photos: dict, captions: dict) -> dict[str, str]:
    """{reader: "same", or what it said or got}."""
    place = folder / form
    place.mkdir()
    for name, image in photos.items():
        (place / name).write_bytes(image)
    number = 1 if form in ("sidecar", "tar") else None
    expected = {photos[name]: sorted(texts[:number]) for name, texts in captions.items()}
    source = str(write(form, place, photos, {name: texts[:number] for name, texts in captions.items()}))
    ones = {name: texts[:1] for name, texts in captions.items()}
    single = str(write(form, folder_of(folder, f"{form}_1", photos), photos, ones))
    by_name = {name: sorted(texts[:number]) for name, texts in captions.items()}
    by_name_in = lambda found: {name_of(k, photos, form, n): sorted(v) for n, (k, v) in enumerate(found.items())}  # noqa: E731
    readers = {
        "train": lambda: loaded(source) == expected,
        "evaluate": lambda: loaded(source, all_as="test") == expected,
        "references": lambda: by_name_in(references(source)) == by_name,
        "predictions": lambda: (
            by_name_in({k: [v] for k, v in load_predictions(single).items()}) == {n: t[:1] for n, t in captions.items()}
        ),
        "infer": lambda: (
            sorted(content(row["image"]) for row in image_rows([source], Options())) == sorted(photos.values())
        ),
        "rewrite": lambda: sorted(rewritten(source)) == sorted(expected.values()),
    }
    return {name: attempt(reader) for name, reader in readers.items()}


def attempt(reader) -> str:
    try:
        return "same" if reader() else "DIFFERENT"
    except ValueError as error:
        return f"refused: {error}"


def folder_of(folder: Path, name: str, photos: dict) -> Path:
    place = folder / name
    place.mkdir()
    for file, image in photos.items():
        (place / file).write_bytes(image)
    return place


def references(source: str) -> dict[str, list[str]]:
    found = read_references(source)
    return {found.names.get(image_id, image_id): captions for image_id, captions in found.captions.items()}


def name_of(name: str, photos: dict, form: str, number: int) -> str:
    """The photograph that an id means: tars number theirs, and others may leave out the ending or number them."""
    if form == "tar" or (name.isdigit() and len(name) < 4):
        return list(photos)[int(re.match(r"\d+", os.path.basename(name))[0])]
    return name if name in photos else f"{name}.jpg"


def loaded(source: str, **options) -> dict[bytes, list[str]]:
    splits = data.load(source, **options)
    return {content(row["image"]): sorted(row["captions"]) for rows in splits.values() for row in rows}


def content(image) -> bytes:
    if isinstance(image, ImageError):
        raise image
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
    return Path(image).read_bytes()


def rewritten(source: str):
    """The captions of each image, as rewrite.py paragraph gets them."""
    opened = open_source("paragraph", source, RewriteArguments(llm="openai:m", output="x.jsonl"))
    for row in opened.read(None):
        yield sorted(opened.inputs(row)["captions"])


def random_trees(number: int) -> dict:
    """What tests/data/test_identity.py says on `number` trees."""
    per_form = max(1, number // (len(FORMS) + 6))
    command = [sys.executable, "-m", "pytest", "-q", "tests/data/test_identity.py"]
    environment = {**os.environ, "RANDOM_TREES": str(per_form), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    print(last)
    return {"trees": per_form * (len(FORMS) + 6), "exit_code": done.returncode, "pytest": re.sub(r" in .*", "", last)}


if __name__ == "__main__":
    main()

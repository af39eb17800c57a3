"""A folder of images, each with a text file of the same name (x.jpg and x.txt, x.caption or x.jpg.txt), as is usual
for training image generators. A text file is one caption. Folders called train, validation and test are splits."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import read_text
from data.images import ENDINGS, is_image
from data.rows import SPLIT_NAMES, Options, Part, Row
from data.walk import walk

NAME = "sidecar"
ABOUT = "a folder of images, each with a text file of the same name next to it"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder", "annotations", "webdataset", "parquet", "saved")
TEXTS = (".txt", ".caption")


def matches(path: Path) -> bool:
    return path.is_dir() and next((True for _, texts in images_and_texts(path, Counter()) if texts), False)


def parts(path: Path, options: Options) -> list[Part]:
    return [Part(NAME, str(path), folders=(str(path),))]


def images_and_texts(path: Path, left_out: Counter) -> Iterator[tuple[str, list[str]]]:
    """(image, its texts) of every image: x.jpg.txt belongs to x.jpg alone, x.txt to the only image called x.

    Raises DataError: x.txt is next to x.jpg and x.png.
    """
    files = dict.fromkeys(walk(path, left_out))
    images = [file for file in files if _is_image(file)]
    stems = Counter(os.path.splitext(file)[0] for file in images)
    for file in images:
        stem = os.path.splitext(file)[0]
        texts = [file + ending for ending in TEXTS if file + ending in files]
        shared = [stem + ending for ending in TEXTS if stem + ending in files]
        if shared and not texts and stems[stem] > 1:
            raise DataError(
                f"{shared[0]}: {stems[stem]} images have this name. Name the text {os.path.basename(file)}.txt"
            )
        yield file, texts or shared


def _is_image(file: str) -> bool:
    ending = os.path.splitext(file)[1].lower()
    return ending in ENDINGS or (ending not in (*TEXTS, ".json", ".npz") and is_image(file))


def read(part: Part, options: Options) -> Iterator[Row]:
    without = 0
    for image, texts in images_and_texts(Path(part.place), options.dropped):
        texts = [text for text in texts if text.endswith(options.caption_column or "")]
        if len(texts) > 1:
            raise DataError(
                f"{image}: has a .txt and a .caption. Say which holds the captions with --caption_column .caption"
            )
        if not texts and options.captions:
            without += 1
            continue
        name = Path(image).relative_to(part.place).as_posix()
        split = SPLIT_NAMES.get(name.split("/")[0].lower()) if "/" in name else None
        captions = [read_text(text) for text in texts]
        yield Row(os.path.relpath((texts or [image])[0], part.place), name, captions, name=name, split=split)
    if without:
        options.dropped["images without a text file"] = without

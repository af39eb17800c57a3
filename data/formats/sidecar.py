"""A folder of images, each with a text file of the same name (x.jpg and x.txt, x.caption or x.jpg.txt), as is usual
for training image generators. A text file is one caption. Folders called train, validation and test are splits."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import read_text
from data.images import is_image_file
from data.rows import Options, Part, Row, split_of_folder
from data.walk import walk

NAME = "sidecar"
ABOUT = "a folder of images, each with a text file of the same name next to it"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder", "annotations", "webdataset", "parquet", "saved")
TEXTS = (".txt", ".caption")


def matches(path: Path) -> bool:
    return any(texts for _, texts in images_and_texts(path, Counter()))


def images_and_texts(path: Path, left_out: Counter) -> Iterator[tuple[str, list[str]]]:
    """(image, its texts) of every image: x.jpg.txt belongs to x.jpg alone, x.txt to the only image called x.

    Raises DataError: x.txt is next to x.jpg and x.png.
    """
    files = dict.fromkeys(walk(path, left_out))
    stem_of = {file: os.path.splitext(file)[0] for file in files if is_image_file(file, file)}
    number = Counter(stem_of.values())
    for file, stem in stem_of.items():
        beside, shared = ([name + ending for ending in TEXTS if name + ending in files] for name in (file, stem))
        if beside:
            left_out["texts x.txt of images that have x.jpg.txt"] += len(shared)
        elif shared and number[stem] > 1:
            name = f"{os.path.basename(file)}.txt"
            raise DataError(f"{shared[0]}: {number[stem]} images have this name. Name the text {name}")
        yield file, beside or shared


def read(part: Part, options: Options) -> Iterator[Row]:
    for image, texts in images_and_texts(Path(part.place), options.dropped):
        texts = [text for text in texts if text.endswith(options.caption_column or "")]
        if len(texts) > 1:
            raise DataError(
                f"{image}: has a .txt and a .caption. Say which holds the captions with --caption_column .caption"
            )
        if not texts and options.captions:
            options.dropped["images without a text file"] += 1
            continue
        name = Path(image).relative_to(part.place).as_posix()
        where = os.path.relpath([*texts, image][0], part.place)
        yield Row(where, name, [read_text(text) for text in texts], name=name, split=split_of_folder(name))

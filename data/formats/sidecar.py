"""A folder of images, each with a text file of the same name (x.jpg and x.txt, or x.caption), as is usual
for training image generators. A text file is one caption. Folders called train, validation and test are splits."""

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import TextError, read_text
from data.images import ENDINGS, is_image
from data.rows import SPLIT_NAMES, Options, Record

NAME = "sidecar"
ABOUT = "a folder of images, each with a text file of the same name next to it"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder", "annotations", "webdataset", "parquet", "saved")
TEXTS = (".txt", ".caption")


def matches(path: Path) -> bool:
    return path.is_dir() and next(pairs(path), None) is not None


def pairs(path: Path) -> Iterator[tuple[Path, Path]]:
    """(image, text) of every image that has a text next to it."""
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        texts = {os.path.splitext(name)[0]: name for name in reversed(names) if name.endswith(TEXTS)}
        for name in sorted(names) if texts else ():
            stem, ending = os.path.splitext(name)
            if stem in texts and ending.lower() not in TEXTS and not name.startswith("._"):
                file = Path(folder, name)
                if ending.lower() in ENDINGS or is_image(file):
                    yield file, Path(folder, texts[stem])


def read(path: Path, options: Options) -> Iterator[Record]:
    captioned = set()
    for image, text in pairs(path):
        captioned.add(image)
        name = image.relative_to(path)
        split = SPLIT_NAMES.get(name.parts[0]) if len(name.parts) > 1 else None
        try:
            caption = read_text(text)
        except TextError as error:
            raise DataError(str(error)) from None
        yield Record(str(text.relative_to(path)), str(image), [caption], name=name.as_posix(), split=split)
    without = sum(file.suffix.lower() in ENDINGS and file not in captioned for file in path.rglob("*"))
    if without:
        options.dropped["images without a text file"] = without

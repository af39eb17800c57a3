"""One row of a source, and the options for reading a source."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # Karpathy's COCO and Flickr JSON: validation images that join training
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(slots=True)
class Record:
    """One row of a source; after `merge`, one image. Rows are made in a stream, only merged ones are kept."""

    where: str  # file and line, or the row of a table: for messages
    image: str | int | dict  # path of a file, row of the source's table, or {"path", "bytes"} of an image itself
    captions: list
    name: str | None = None  # file name that identifies the image in its source
    image_id: str | None = None
    split: str | None = None
    extras: dict = field(default_factory=dict)


def split_name(name: str, where: str) -> str:
    """A source's own name for a split -> train, validation or test."""
    if str(name).lower() not in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {name!r}. Known: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[str(name).lower()]


@dataclass
class Options:
    """Options of a format's `read`; `data.load` says what each means."""

    config: str | None = None
    image_dir: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    cache_dir: str | None = None
    streaming: bool = False
    skip_bad_samples: bool = False
    format: str = "auto"
    captions: bool = True  # False for callers that read images only
    dropped: Counter = field(default_factory=Counter)  # what was left out, and how many, for the log line
    bad_samples: list = field(default_factory=list)


def split_of_file(path: Path) -> str | None:
    """captions_val2014.json -> validation; None where the name gives no split."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None

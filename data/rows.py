"""What a source says, row by row: the row, the parts that a source is read in, and the options of reading."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

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
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "test",
    "holdout": "test",
}


@dataclass(slots=True)
class Row:
    """One row of a source.

    `image` is, from a format, the image's name as the source writes it, or {"path", "bytes"} of an image that the source
    holds; the reader (data.reader) puts the path of its file in place of a name. Two rows are of one image if and only if
    their `key` is the same; it depends neither on how the source is named nor on its other rows.
    """

    where: str  # file and line, or the row of a table: for messages
    image: object  # str | dict | int (row of a table) | ImageError | None
    captions: list = field(default_factory=list)
    name: str | None = None  # file name that identifies the image in its source
    image_id: str | None = None
    split: str | None = None
    columns: dict = field(default_factory=dict)  # all that the source says, by its own names
    used: tuple = ()  # those columns that are the image, the captions, the id and the split
    key: str | None = None
    question: str | None = None  # what the user asks in a conversation
    error: str | None = None  # what infer.py wrote instead of a caption

    @property
    def extras(self) -> dict:
        return {name: value for name, value in self.columns.items() if name not in self.used}


@dataclass(slots=True)
class Record:
    """One image, and the captions of all its rows."""

    where: str
    image: str | int  # path of its file, or row of the source's table
    captions: list[str]
    key: str
    name: str | None = None
    image_id: str | None = None
    split: str | None = None
    extras: dict = field(default_factory=dict)
    groups: set = field(default_factory=set)  # values of the group column: images that share one are in one split
    prompts: list = field(default_factory=list)  # of each caption; None of one whose row has none of its own


@dataclass(frozen=True)
class Part:
    """A file or a split of a source: what is read in one go."""

    format: str  # NAME of its module in data.formats
    place: str  # path of a file or folder, or the data set's name
    label: str = ""  # the split of a data set's table
    split: str | None = None  # of every row that does not say its own
    folders: tuple[str, ...] = ()  # where its images may lie, in this order; default: next to it
    table: object = field(default=None, compare=False, repr=False)  # of `datasets`, streamed, where it is one


def text_or_none(value) -> str | None:
    return None if value is None else str(value)


def scalars(row: dict) -> dict:
    """What is one text or number in a row."""
    return {name: value for name, value in row.items() if not isinstance(value, dict | list)}


def no_file(name: str) -> bool:
    return False


@dataclass
class Options:
    """How a source is read; `data.load` says what most mean."""

    config: str | None = None
    image_dir: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    group_column: str | None = None  # of images that belong in one split
    cache_dir: str | None = None
    streaming: bool = False
    skip_bad_samples: bool = False
    format: str = "auto"
    captions: bool = True  # False for callers that read images only
    images: bool = True  # False for callers that read captions only: an id is enough
    predictions: bool = False  # captions are a model's
    prompt: str | None = None  # with columns: each row is asked with its own
    own_questions: bool = False  # rows that are conversations are asked what they ask
    literal: bool = False  # and text among them is no list written out, whatever it looks like
    is_file: Callable[[str], bool] = no_file  # whether a text names an image that is there; set by the reader
    dropped: Counter = field(default_factory=Counter)  # what was left out, and how many, for the log line
    bad_samples: list = field(default_factory=list)

    def drop(self, name: str, image_id: str | None, image: str, reason: str) -> None:
        """Count a sample that is left out, and list it."""
        self.dropped[name] += 1
        self.bad_samples.append({"image_id": image_id, "image": image, "reason": reason})


def key_of(image, name: str | None, root: str) -> str | None:
    """The key of an image: its name as the source writes it, from the source's folder `root` on where it is absolute; of
    an image inside a source its content; None of a row without an image."""
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return xxhash.xxh3_128_hexdigest(image["bytes"])
        image = image.get("path")
    written = image if isinstance(image, str) else name
    if written is None:
        return None
    written = unicodedata.normalize("NFC", written.replace("\\", "/"))
    folder = os.path.join(os.path.abspath(root), "").replace("\\", "/")
    if os.path.isabs(written):
        return os.path.abspath(written).replace("\\", "/").removeprefix(folder)
    return written.removeprefix("./")


def usual_split(name: str) -> str:
    """restval -> train; the name of any other split in lower case."""
    return SPLIT_NAMES.get(name.lower(), name.lower())


def split_name(name: str, where: str) -> str:
    """A source's own name for a split -> train, validation or test: the one word in it that is one (qual_dev)."""
    split = split_in(str(name))
    if split is None:
        raise DataError(f"{where}: unknown split {name!r}. Known: {', '.join(SPLIT_NAMES)}")
    return split


def split_in(text: str) -> str | None:
    """captions_val2014 -> validation; None where no word of the text, or several, name a split."""
    splits = set(map(SPLIT_NAMES.get, re.findall(r"[a-z]+", text.lower()))) - {None}
    return splits.pop() if len(splits) == 1 else None


def split_of_folder(name: str) -> str | None:
    """The split that the first folder in an image's name says: train/x.jpg."""
    folder, slash, _ = name.replace("\\", "/").partition("/")
    return SPLIT_NAMES.get(folder.lower()) if slash else None


def split_of_file(path: Path) -> str | None:
    """The split that the name of a file, or else of its folder, says."""
    return split_in(path.stem) or SPLIT_NAMES.get(path.parent.name.lower())

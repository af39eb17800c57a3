"""Flickr8k as first published (`Flickr8k.token.txt`: name#number TAB caption) or as on Kaggle (`captions.txt`: CSV with
the header image,caption). `Flickr_8k.{train,dev,test}Images.txt` next to it, if present, define the splits."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import open_text, read_text
from data.columns import without_spaces
from data.finder import folders_beside
from data.rows import Options, Part, Row
from data.text_rows import csv_rows

NAME = "flickr8k"
ABOUT = "Flickr8k.token.txt or captions.txt next to a folder of images"


def matches(path: Path) -> bool:
    if path.is_file():
        return path.name.endswith((".token", "token.txt")) or path.name == "captions.txt"
    return captions_file(path) is not None


def captions_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    patterns = ("Flickr8k.token.txt", "captions.txt", "*/Flickr8k.token.txt", "*/captions.txt", "*.token", "*/*.token")
    return next((file for pattern in patterns for file in sorted(path.glob(pattern))), None)


def parts(path: Path, options: Options) -> list[Part]:
    file = captions_file(path)
    if file is None:
        raise DataError(f"{path}: neither Flickr8k.token.txt nor captions.txt is there")
    return [Part(NAME, str(file), folders=folders_beside(file))]


def read(part: Part, options: Options) -> Iterator[Row]:
    split_of = official_splits(Path(part.place).parent)
    unlisted = set()
    for name, caption, where in rows_of(Path(part.place)):
        name = without_spaces(name, options.is_file)
        if split_of and name not in split_of:
            unlisted.add(name)
            options.dropped["images in none of the official split lists"] = len(unlisted)
        elif name.endswith(".jpg.1") and not options.is_file(name):
            options.dropped[f"caption rows of {name}, a mistake in the published file"] += 1
        else:
            columns = {"image": name, "caption": caption}
            yield Row(where, name, [caption], name=name, split=split_of.get(name), columns=columns, used=tuple(columns))


def official_splits(folder: Path) -> dict[str, str]:
    """{image: split} of the three lists; empty if there are none."""
    split_of: dict[str, str] = {}
    words = {"train": "train", "validation": "dev", "test": "test"}
    lists = {split: folder / f"Flickr_8k.{word}Images.txt" for split, word in words.items()}
    absent = [str(names) for names in lists.values() if not names.exists()]
    if len(absent) == len(lists):
        return {}
    if absent:
        raise DataError(f"{', '.join(absent)}: missing. Put all three official split files there, or none")
    for split, names in lists.items():
        for name in read_text(names).split():
            if split_of.setdefault(name, split) != split:
                raise DataError(f"{names}: image {name} is also in the list of {split_of[name]}")
    return split_of


def rows_of(file: Path) -> Iterator[tuple[str, str, str]]:
    """(name, caption, where) for each line."""
    if file.name == "captions.txt":
        for row, where in csv_rows(file, last_takes_rest=True):
            if list(row) != ["image", "caption"]:
                raise DataError(f"{file}: the first line is {list(row)}, expected the header image,caption")
            yield row["image"], row["caption"], where
        return
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            name, tab, caption = line.rstrip("\r\n").partition("\t")
            if line.strip():
                if not tab:
                    raise DataError(f"{file} line {number}: no tab between image and caption: {line.strip()[:80]!r}")
                yield name.rsplit("#", 1)[0], caption, f"{file.name} line {number}"

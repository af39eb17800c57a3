"""Flickr8k as first published (`Flickr8k.token.txt`: name#number TAB caption) or as on Kaggle (`captions.txt`: CSV with
the header image,caption). `Flickr_8k.{train,dev,test}Images.txt` next to it, if present, define the splits."""

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import TextError, open_text, read_text
from data.finder import IMAGE_FOLDERS, Finder
from data.rows import Options, Record
from data.text_rows import csv_rows

NAME = "flickr8k"
ABOUT = "Flickr8k.token.txt or captions.txt next to a folder of images"


def matches(path: Path) -> bool:
    if path.is_file():
        return path.name.endswith("token.txt") or path.name == "captions.txt"
    return path.is_dir() and captions_file(path) is not None


def captions_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    for pattern in ("Flickr8k.token.txt", "captions.txt", "*/Flickr8k.token.txt", "*/captions.txt"):
        for file in sorted(path.glob(pattern)):
            return file
    return None


def read(path: Path, options: Options) -> Iterator[Record]:
    file = captions_file(path)
    if file is None:
        raise DataError(f"{path}: neither Flickr8k.token.txt nor captions.txt is there")
    split_of: dict[str, str] = {}
    words = {"train": "train", "validation": "dev", "test": "test"}
    lists = {split: file.parent / f"Flickr_8k.{word}Images.txt" for split, word in words.items()}
    there = [split for split, names in lists.items() if names.exists()]
    if 0 < len(there) < 3:
        absent = ", ".join(str(names) for names in lists.values() if not names.exists())
        raise DataError(f"{absent}: missing. Put all three official split files there, or none")
    for split in there:
        for name in read_text(lists[split]).split():
            if split_of.setdefault(name, split) != split:
                raise DataError(f"{lists[split]}: image {name} is also in the list of {split_of[name]}")

    roots = [file.parent, file.parent.parent] if path.is_file() or file.parent != path else [path]
    folders = [Path(root, folder) for root in roots for folder in IMAGE_FOLDERS]
    folders += [folder / folder.name for folder in folders]  # Kaggle archives nest a folder in one of the same name
    folders += [root / "Flickr8k_Dataset" / "Flicker8k_Dataset" for root in roots]
    find = Finder([Path(options.image_dir)] if options.image_dir else folders)
    unlisted = set()
    for name, caption, where in rows_of(file):
        if split_of and name not in split_of:
            unlisted.add(name)
            options.dropped["images in none of the official split lists"] = len(unlisted)
            continue
        image = find(name)
        if name.endswith(".jpg.1") and not os.path.exists(image):
            options.dropped[f"caption rows of {name}, a mistake in the published file"] += 1
            continue
        yield Record(where, image, [caption], name=name, split=split_of.get(name))


def rows_of(file: Path) -> Iterator[tuple[str, str, str]]:
    """(name, caption, where) for each line."""
    if file.suffix == ".txt" and not file.name.endswith("token.txt"):
        for row, where in csv_rows(file, last_takes_rest=True):
            if list(row) != ["image", "caption"]:
                raise DataError(f"{file}: the first line is {list(row)}, expected the header image,caption")
            yield row["image"].strip(), row["caption"], where
        return
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                name, tab, caption = line.rstrip("\r\n").partition("\t")
                if not name.strip() and not tab:
                    continue
                if not tab:
                    raise DataError(f"{file} line {number}: no tab between image and caption: {line.strip()[:80]!r}")
                yield name.rsplit("#", 1)[0].strip(), caption, f"{file.name} line {number}"
    except TextError as error:
        raise DataError(str(error)) from None

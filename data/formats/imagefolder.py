"""The `imagefolder` layout of `datasets`: metadata.jsonl or metadata.csv with file_name and a caption column, next to the
images, or one in each of train, validation and test."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.columns import dict_rows
from data.finder import Finder
from data.rows import SPLIT_NAMES, Options, Record
from data.text_rows import csv_rows, jsonl_rows

NAME = "imagefolder"
ABOUT = "a folder of images with metadata.jsonl or metadata.csv"


def matches(path: Path) -> bool:
    return path.is_dir() and bool(metadata_files(path))


def metadata_files(path: Path) -> list[tuple[Path, str | None]]:
    folders = [(path, None)] + [(path / word, split) for word, split in SPLIT_NAMES.items()]
    return [
        (folder / name, split)
        for folder, split in folders
        for name in ("metadata.jsonl", "metadata.csv")
        if (folder / name).is_file()
    ]


def read(path: Path, options: Options) -> Iterator[Record]:
    files = metadata_files(path)
    if not files:
        raise DataError(f"{path}: neither metadata.jsonl nor metadata.csv is there, or in its train, validation, test")
    for file, split in files:
        rows = (
            csv_rows(file)
            if file.suffix == ".csv"
            else ((row, f"{file.name} line {number}") for number, row in jsonl_rows(file))
        )
        columns = options.image_column, options.caption_column
        find = Finder([file.parent])
        for record in dict_rows(rows, str(file), *columns, find, split, captions=options.captions):
            folder = (record.name or "").replace("\\", "/").split("/")[0]
            if record.split is None and folder in SPLIT_NAMES and "/" in record.name.replace("\\", "/"):
                record.split = SPLIT_NAMES[folder]  # one metadata file, images in train/, validation/, test/
            if split is not None and record.name:
                record.name = f"{file.parent.name}/{record.name}"
            yield record

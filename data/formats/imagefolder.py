"""The `imagefolder` layout of `datasets`: metadata.jsonl or metadata.csv with file_name and a caption column, next to the
images, or one in each of train, validation and test."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.columns import object_rows
from data.rows import SPLIT_NAMES, Options, Part, Row, split_of_folder
from data.text_rows import table_objects

NAME = "imagefolder"
ABOUT = "a folder of images with metadata.jsonl or metadata.csv"


def matches(path: Path) -> bool:
    return bool(metadata_files(path))


def metadata_files(path: Path) -> list[Path]:
    folders = [path, *sorted(folder for folder in path.glob("*") if folder.name.lower() in SPLIT_NAMES)]
    files = [folder / f"metadata.{ending}" for folder in folders for ending in ("jsonl", "csv")]
    return list(filter(Path.is_file, files))


def parts(path: Path, options: Options) -> list[Part]:
    files = metadata_files(path)
    if not files:
        raise DataError(f"{path}: neither metadata.jsonl nor metadata.csv is there, or in its train, validation, test")
    for first, second in itertools.pairwise(files):
        if first.parent == second.parent:
            raise DataError(f"{first.parent}: metadata.jsonl and metadata.csv are both there. Remove one")
    return [Part(NAME, str(f), split=split_of_folder(f"{f.relative_to(path)}"), folders=(str(path),)) for f in files]


def read(part: Part, options: Options) -> Iterator[Row]:
    file = Path(part.place)
    for row in object_rows(table_objects(file), str(file), options, part.split):
        if part.split is None:  # one metadata file, images in train/, validation/, test/
            row.split = row.split or split_of_folder(row.name or "")
        elif row.name:
            row.name = f"{file.parent.name}/{row.name}"
            row.image = f"{file.parent.name}/{row.image}" if isinstance(row.image, str) else row.image
        yield row

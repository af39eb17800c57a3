"""The `imagefolder` layout of `datasets`: metadata.jsonl or metadata.csv with file_name and a caption column, next to the
images, or one in each of train, validation and test."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.columns import object_rows
from data.rows import SPLIT_NAMES, Options, Part, Row
from data.text_rows import table_objects

NAME = "imagefolder"
ABOUT = "a folder of images with metadata.jsonl or metadata.csv"


def matches(path: Path) -> bool:
    return path.is_dir() and bool(metadata_files(path))


def metadata_files(path: Path) -> list[Path]:
    folders = [path, *sorted(folder for folder in path.iterdir() if folder.name.lower() in SPLIT_NAMES)]
    return [
        folder / f"metadata.{kind}"
        for folder in folders
        for kind in ("jsonl", "csv")
        if (folder / f"metadata.{kind}").is_file()
    ]


def parts(path: Path, options: Options) -> list[Part]:
    files = metadata_files(path)
    if not files:
        raise DataError(f"{path}: neither metadata.jsonl nor metadata.csv is there, or in its train, validation, test")
    for file in files[1:]:
        if file.with_suffix(".jsonl") in files[: files.index(file)]:
            raise DataError(f"{file.parent}: metadata.jsonl and metadata.csv are both there. Remove one")
    split = [None if file.parent == path else SPLIT_NAMES[file.parent.name.lower()] for file in files]
    return [Part(NAME, str(file), split=s, folders=(str(path),)) for file, s in zip(files, split, strict=True)]


def read(part: Part, options: Options) -> Iterator[Row]:
    file = Path(part.place)
    for row in object_rows(table_objects(file), str(file), options, part.split):
        folder = (row.name or "").replace("\\", "/").split("/")
        if row.split is None and len(folder) > 1:  # one metadata file, images in train/, validation/, test/
            row.split = SPLIT_NAMES.get(folder[0].lower())
        if part.split is not None and row.name:
            row.name = f"{file.parent.name}/{row.name}"
            row.image = f"{file.parent.name}/{row.image}" if isinstance(row.image, str) else row.image
        yield row

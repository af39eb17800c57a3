"""What to caption: every source as a stream of images, each once, with the columns that belong to it.

Images and folders of them, lists, patterns, and whatever data.reader reads, local or at an address; captions are not
needed. Nothing is decoded here, and only a piece of a tar or a Parquet file is in memory at a time.
"""

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import xxhash

from captioning.names import EachOnce, printable, short
from common.errors import DataError
from common.existence import ENDINGS
from common.remote import is_remote, list_remote, local_copy, reaching
from common.text import read_text
from data import formats
from data.columns import without_spaces
from data.finder import Finder
from data.formats import detect, parquet, saved, webdataset
from data.images import ImageError, is_image
from data.prompts import prompt_of
from data.reader import Source, find_format, is_there
from data.rows import Options, Part, Row, split_of_file
from data.text_rows import ENDINGS as TABLES
from data.walk import walk

LISTS = (".txt", ".lst", ".list")
FORMATS = {"tar": webdataset, "parquet": parquet}
STORAGES = {module.NAME: storage for storage, module in FORMATS.items()}


def image_rows(paths: list[str], options: Options) -> Iterator[dict]:
    """{"name", "image", "columns", "relative", "prompt"} for each image, and each of its own prompts if rows have them, in
    order: `name` is unique, its path or its place in the source; `prompt` is None where it is that of all; `image` is what data.open_image takes (an ImageError where there is none); `columns` are
    the source's others; `relative` is its path below the folder or the tar that it was found in.

    Files in a folder that are not images are skipped; `left_out` counts them.

    Raises:
        DataError: a path that does not exist, holds no image, or cannot be read.
    """
    rows = (row for piece in pieces(paths, options) for row in rows_of(*piece, options))
    return EachOnce(lambda row: f"{content_of(row) or ''}{asked_in(row)}")(rows)


def content_of(row: dict) -> str | None:
    """What tells the image of a row from others, if the source holds it."""
    content = row["image"].get("bytes") if isinstance(row["image"], dict) else None
    return None if content is None else xxhash.xxh3_64_hexdigest(content)


def asked_in(row: dict) -> str:
    """What tells the prompt of a row from others, if the row has its own."""
    return "" if row["prompt"] is None else f" {short(row['prompt']):x}"


# ---------------------------------------------------------------- pieces


def pieces(paths: list[str], options: Options) -> Iterator[tuple[str, str]]:
    """("tar" | "parquet" | "folder" | "rows", place) of what paths name, in order: files that are read individually,
    folders of images, and everything else, read as a stream of rows.

    Raises:
        DataError: a path that does not exist, or holds no image.
    """
    for path in map(str, paths):
        if is_remote(path):
            yield from _remote_pieces(path)
        elif options.format != "auto":
            yield from _format_pieces(find_format(path, options.format)[0], path, options)
        else:
            for file in [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]:
                yield from _folder_pieces(file, options) if os.path.isdir(file) else [_file_piece(file)]


def _file_piece(file: str) -> tuple[str, str]:
    name = file.lower()
    return ("tar" if name.endswith(webdataset.TARS) else "parquet" if name.endswith(".parquet") else "rows", file)


def _remote_pieces(path: str) -> list[tuple[str, str]]:
    files = list_remote(path)
    if any(map(_is_image_name, files)):
        return [("folder", path)]
    tables = [file for file in files if file.lower().endswith((*webdataset.TARS, ".parquet", *TABLES, *LISTS))]
    if not tables and files != [path]:
        raise DataError(f"{path}: there is no image here, and no tar, Parquet or list of images.")
    return list(map(_file_piece, tables or files))


def _folder_pieces(path: str, options: Options) -> list[tuple[str, str]]:
    if saved.matches(Path(path)):
        return [("rows", path)]
    if next(_images_in(path), None) is not None:
        return [("folder", path)]
    try:
        return _format_pieces(detect(path), path, options)
    except DataError:
        endings = Counter(map(_ending, walk(path)))
        contents = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(6)) or "it is empty"
        raise DataError(f"{path}: there is no image in this folder ({contents}).") from None


def _format_pieces(format, path: str, options: Options) -> list[tuple[str, str]]:
    storage = STORAGES.get(format.NAME)
    return [(storage, part.place) for part in format.parts(Path(path), options)] if storage else [("rows", path)]


# ---------------------------------------------------------------- rows


def rows_of(storage: str, place: str, options: Options, start: int = 0) -> Iterator[dict]:
    """The rows of a piece; those of a Parquet file from `start` on."""
    options = dataclasses.replace(options, captions=False, streaming=True)
    with reaching(place, ImageError):
        number = start - 1
        for number, (row, label) in enumerate(_rows_in(storage, place, options, start), start):
            yield _named(row, storage, label, number) | {"prompt": prompt_of(row, options)}
        if number < start and storage == "rows":
            raise DataError(f"{place}: the list is empty.")


def _rows_in(storage: str, place: str, options: Options, start: int) -> Iterator[tuple[Row, str]]:
    """(row, name of the file or split that it is in)."""
    base = os.path.basename(place)
    limits = {"start": start} if storage == "parquet" else {}
    if storage == "folder":
        rows = (Row("", file, name=file.removeprefix(place).lstrip("/\\")) for file in _images_in(place))
    elif storage == "rows" and options.format == "auto" and _is_list_or_image(place):
        rows = _listed(place, options)
    elif is_remote(place):
        rows = _rows_at(storage, place, options, limits)
    else:
        format = FORMATS[storage].NAME if storage in FORMATS else options.format
        source = Source(place, dataclasses.replace(options, format=format))
        return ((row, part.label or base) for part in source.parts for row in source.read(part, **limits))
    return ((row, base) for row in rows)


def _rows_at(storage: str, place: str, options: Options, limits: dict) -> Iterator[Row]:
    """The rows of a file at an address. Tars and Parquet files are read where they are, of others there is a copy."""
    file = place if storage in FORMATS else str(local_copy(place, options.cache_dir))
    format = FORMATS.get(storage) or find_format(file)[0]
    for row in format.read(Part(format.NAME, file, split=split_of_file(Path(place))), options, **limits):
        yield dataclasses.replace(row, image=_beside(place, row.image))


def _is_list_or_image(place: str) -> bool:
    if is_remote(place):
        return not place.lower().endswith(TABLES)
    return os.path.isfile(place) and not any(module.matches(Path(place)) for module in formats.FORMATS)


def _listed(place: str, options: Options) -> Iterator[Row]:
    """The images of a list: paths relative to the list or to where the script runs, or addresses; or the one image."""
    if not place.lower().endswith(LISTS):
        yield Row("", place)
        return
    file = str(local_copy(place, options.cache_dir)) if is_remote(place) else place
    names = list(filter(str.strip, read_text(file).splitlines()))
    find = Finder([os.path.dirname(file), "."], lambda: names)
    for name in names:
        name = without_spaces(name, partial(is_there, find))
        try:
            image = _beside(place, name) if is_remote(place) or is_remote(name) else find(name)
        except ImageError as error:
            image = error
        yield Row("", image, name=name)


def _beside(place: str, image):
    """The address of an image that a list at an address names; what is no name stays as it is."""
    if not isinstance(image, str) or is_remote(image):
        return image
    return f"{place.rpartition('/')[0]}/{image.replace(chr(92), '/')}"


def _named(row: Row, storage: str, label: str, number: int) -> dict:
    """A row of a source under its name: the path of its file, or its place in the source."""
    columns = {"image_id": row.image_id, "split": row.split}
    columns = {name: value for name, value in columns.items() if value is not None} | row.columns
    columns = {n: v for n, v in columns.items() if n not in row.used[:1] and not isinstance(v, bytes)}
    name, relative = row.image, row.name
    if storage == "tar":
        name = f"{label}/{row.name}"
    elif not isinstance(row.image, str):
        name, relative = row.name or (row.image_id if storage == "rows" else None) or f"{label}#{number}", None
    if not relative or is_remote(relative) or os.path.isabs(relative):
        relative = os.path.basename(name)
    return {"name": printable(name), "image": row.image, "columns": columns, "relative": relative}


# ---------------------------------------------------------------- folders


def _images_in(path: str, left_out: Counter | None = None) -> Iterator[str]:
    """The images in a folder and below, in order; on this machine whatever their extensions."""
    if is_remote(path):
        return filter(_is_image_name, list_remote(path))
    return (file for file in walk(path, left_out) if _is_image_name(file) or is_image(file))


def _is_image_name(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in ENDINGS


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without an ending"


def left_out(path: str) -> Counter:
    """How many files of each extension in a folder of images are not images, and folders that are not entered; empty for
    a folder that is a data set."""
    counts = Counter()
    images = set(_images_in(path, counts))
    counts.update(_ending(file) for file in walk(path) if file not in images)
    return counts if images else Counter()

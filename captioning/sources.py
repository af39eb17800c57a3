"""What to caption: every source as a stream of images, each once, with the columns that belong to it.

Images and folders of them, lists, patterns, and whatever data.reader reads, local or at an address; captions are not
needed. Nothing is decoded here, and only a piece of a tar or a Parquet file is in memory at a time.
"""

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash

from common.errors import DataError
from common.remote import is_remote, list_remote, local_copy, reaching
from common.text import TextError, read_text
from data import formats
from data.finder import Finder
from data.formats import detect, parquet, saved, webdataset
from data.images import ENDINGS, ImageError, is_image
from data.reader import Source, find_format
from data.rows import Options, Part, Row
from data.text_rows import ENDINGS as TABLES
from data.walk import walk

LISTS = (".txt", ".lst", ".list")
FORMATS = {"tar": webdataset, "parquet": parquet}


def image_rows(paths: list[str], options: Options) -> Iterator[dict]:
    """{"name", "image", "columns", "relative"} for each image, in order: `name` is unique, its path or its place in
    the source; `image` is what data.open_image takes (an ImageError where there is none); `columns` are
    the source's others; `relative` is its path below the folder or the tar that it was found in.

    Files in a folder that are not images are skipped; `left_out` counts them.

    Raises:
        DataError: a path that does not exist, holds no image, or cannot be read.
    """
    rows = (row for piece in pieces(paths, options) for row in rows_of(*piece, options))
    return unique(rows, {})


def unique(rows: Iterator[dict], seen: dict[int, int] | None) -> Iterator[dict]:
    """The rows without images that came before; a different image of the same name gets a number.

    Args:
        seen: hashes of names and of contents that came before, added to here; None where all names differ.
    """
    for row in rows:
        row["name"] = row["name"].encode("utf-8", "backslashreplace").decode()  # file names may be any bytes
        if seen is not None:
            content = row["image"].get("bytes") if isinstance(row["image"], dict) else None
            digest = 0 if content is None else xxhash.xxh3_64_intdigest(content)
            number, name = 1, row["name"]
            while content is not None and seen.get(_hash(row["name"]), digest) != digest:
                number += 1
                row["name"] = f"{name}#{number}"
            if _hash(row["name"]) in seen:
                continue
            seen[_hash(row["name"])] = digest
        yield row


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def pieces(paths: list[str], options: Options) -> Iterator[tuple[str, str]]:
    """("tar" | "parquet" | "folder" | "rows", place) of what paths name, in order: files that are read individually,
    folders of images, and everything else, read as a stream of rows.

    Raises:
        DataError: a path that does not exist, or holds no image.
    """
    if not paths:
        raise DataError(
            "Name what to caption: image files, folders, globs, a list of images (.txt, .jsonl, .csv), tar or Parquet "
            "files, a Hub data set."
        )
    for path in map(str, paths):
        if is_remote(path):
            yield from _remote_pieces(path)
        elif options.format != "auto":
            yield from _format_pieces(find_format(path, options.format)[0], path, options)
        elif os.path.isdir(path):
            yield from _folder_pieces(path, options)
        elif os.path.exists(path):
            yield (_kind(path), path)
        elif files := sorted(glob.glob(path, recursive=True)):
            for file in files:
                yield from _folder_pieces(file, options) if os.path.isdir(file) else [(_kind(file), file)]
        else:
            # A name with one / and no ending may be the id of a Hub data set.
            if path != "scenes" and (not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or os.path.splitext(path)[1]):
                raise DataError(f"{path}: there is no such file or folder, and no file that matches it as a pattern.")
            yield ("rows", path)


def _kind(file: str) -> str:
    if file.lower().endswith(webdataset.TARS):
        return "tar"
    return "parquet" if file.lower().endswith(".parquet") else "rows"


def _remote_pieces(path: str) -> list[tuple[str, str]]:
    files = list_remote(path)
    images = [file for file in files if os.path.splitext(file)[1].lower() in ENDINGS]
    tables = [file for file in files if file.lower().endswith((*webdataset.TARS, ".parquet", *TABLES, *LISTS))]
    if images or not tables:
        return [("rows", path)]
    return [(_kind(file), file) for file in tables]


def _folder_pieces(path: str, options: Options) -> list[tuple[str, str]]:
    if saved.matches(Path(path)):
        return [("rows", path)]
    if next(_images_in(path), None) is not None:
        return [("folder", path)]
    try:
        return _format_pieces(detect(path), path, options)
    except DataError:
        endings = Counter(os.path.splitext(file)[1].lower() or "without an ending" for file in walk(path))
        inside = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(6)) or "it is empty"
        raise DataError(f"{path}: there is no image in this folder ({inside}).") from None


def _format_pieces(format, path: str, options: Options) -> list[tuple[str, str]]:
    kind = next((kind for kind, module in FORMATS.items() if module is format), "rows")
    if kind == "rows":
        return [("rows", path)]
    return [(kind, part.place) for part in format.parts(Path(path), options)]


def rows_of(kind: str, place: str, options: Options, start: int = 0, stop: int | None = None) -> Iterator[dict]:
    """The rows of a piece; for a Parquet file rows `start` to `stop`."""
    options = dataclasses.replace(options, captions=False, streaming=True)
    with reaching(place, ImageError):
        if kind == "folder":
            for file in _images_in(place):
                yield _row(file, file, relative=os.path.relpath(file, place))
        elif is_remote(place):
            yield from _remote_rows(kind, place, options, start, stop)
        elif kind == "rows" and options.format == "auto" and os.path.isfile(place) and not _is_table(place):
            yield from _list_rows(place) if place.lower().endswith(LISTS) else [_row(place, place)]
        else:
            format = FORMATS[kind].NAME if kind in FORMATS else options.format
            source = Source(place, dataclasses.replace(options, format=format))
            limits = {"start": start, "stop": stop} if kind == "parquet" else {}
            number = start
            for part in source.parts:
                for row in source.read(part, **limits):
                    yield _named(row, kind, place, part, number)
                    number += 1
            if number == start and kind == "rows" and os.path.isfile(place):
                raise DataError(f"{place}: the list is empty.")


def _is_table(place: str) -> bool:
    return any(module.matches(Path(place)) for module in formats.FORMATS)


def _row(name: str, image, columns: dict | None = None, relative: str | None = None) -> dict:
    return {"name": name, "image": image, "columns": columns or {}, "relative": relative or os.path.basename(name)}


def _named(row: Row, kind: str, place: str, part: Part, number: int) -> dict:
    """A row of a source under its name: the path of its file, or its place in the source."""
    own = {"image_id": row.image_id, "split": row.split}
    columns = {name: value for name, value in own.items() if value is not None}
    columns |= {n: v for n, v in row.columns.items() if n not in row.used[:1] and not isinstance(v, bytes)}
    if isinstance(row.image, str):
        relative = row.name if row.name and not os.path.isabs(row.name) else None
        return _row(row.image, row.image, columns, relative=relative)
    if kind == "tar":
        return _row(f"{os.path.basename(place)}/{row.name}", row.image, columns, relative=row.name)
    spare = row.image_id if kind == "rows" else None
    return _row(str(row.name or spare or f"{part.label or os.path.basename(place)}#{number}"), row.image, columns)


def _images_in(path: str, left_out: Counter | None = None) -> Iterator[str]:
    """The images in a folder and below, in order, whatever their extensions."""
    return (file for file in walk(path, left_out) if os.path.splitext(file)[1].lower() in ENDINGS or is_image(file))


def left_out(path: str) -> Counter:
    """How many files of each extension in a folder of images are not images, and folders that are not entered; empty for
    a folder that is a data set."""
    if saved.matches(Path(path)):
        return Counter()
    counts = Counter()
    images = set(_images_in(path, counts))
    for file in walk(path):
        if file not in images:
            counts[os.path.splitext(file)[1].lower() or "without an ending"] += 1
    return counts if images else Counter()


def _list_rows(path: str, base: str | None = None) -> Iterator[dict]:
    """The images of a list: paths relative to the list or to where the script runs, or addresses."""
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except TextError as error:
        raise DataError(str(error)) from None
    if not names:
        raise DataError(f"{base or path}: the list is empty.")
    find = Finder([os.path.dirname(path), "."], lambda: (name for name in names if not is_remote(name)))
    for name in names:
        yield _place(name, find, base, {})


def _place(name: str, find, base: str | None, columns: dict) -> dict:
    if is_remote(name):
        return _row(name, name, columns)
    if base:
        address = f"{base.rsplit('/', 1)[0]}/{name.replace(chr(92), '/')}"
        return _row(address, address, columns, relative=name)
    relative = name if not os.path.isabs(name) else None
    try:
        path = find(name)
    except ImageError as error:
        return _row(name, error, columns, relative=relative)
    return _row(path, path, columns, relative=relative)


def _remote_rows(kind: str, path: str, options: Options, start: int, stop: int | None) -> Iterator[dict]:
    if kind in FORMATS:
        format = FORMATS[kind]
        limits = {"start": start, "stop": stop} if kind == "parquet" else {}
        part = Part(format.NAME, path)
        for number, row in enumerate(format.read(part, options, **limits), start):
            if isinstance(row.image, str):
                yield _place(row.image, None, path, {n: v for n, v in row.columns.items() if n not in row.used[:1]})
            else:
                yield _named(row, kind, path, part, number)
        return
    files = list_remote(path)
    root = path.rstrip("/")
    images = [file for file in files if os.path.splitext(file)[1].lower() in ENDINGS]
    lists = [file for file in files if file.lower().endswith((*TABLES, *LISTS))]
    if len(files) == 1 and files[0] == path and not lists:
        images = files
    if not images and not lists:
        raise DataError(f"{path}: there is no image here, and no tar, Parquet or list of images.")
    for image in images:
        yield _row(image, image, relative=image[len(root) :].lstrip("/") if image.startswith(root) else None)
    for file in [] if images else lists:
        copy = str(local_copy(file, options.cache_dir))
        if file.lower().endswith(LISTS):
            yield from _list_rows(copy, base=file)
            continue
        source = Source(copy, options)
        for row in source.format.read(source.parts[0], options):
            yield _place(row.image, None, file, {n: v for n, v in row.columns.items() if n not in row.used[:1]})


def source_files(paths: list[str], endings: tuple[str, ...]) -> list[str]:
    """The files with these extensions that paths, folders and patterns name, in their order.

    Raises:
        DataError: a path is something else.
    """
    found: list[str] = []
    for path in paths:
        if is_remote(path):
            files = list_remote(path)
        elif os.path.isdir(path):
            files = list(walk(path))
        else:
            files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        files = [file for file in files if file.lower().endswith(endings)]
        if not files:
            raise DataError(f"{path}: holds no {' or '.join(endings)} file")
        found += files
    return list(dict.fromkeys(found))

"""What to caption: every source as a stream of images, each once, with the columns that belong to it.

Images and folders of them, lists, patterns, and whatever data.formats reads, local or at an address; captions are not
needed. Nothing is decoded here, and only a piece of a tar or a Parquet file is in memory at a time.
"""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from common.errors import DataError
from common.remote import is_remote, list_remote, local_copy, open_remote, reaching
from common.text import TextError, read_text
from data.columns import columns_of, find_columns, image_in
from data.finder import Finder, forms
from data.formats import detect, flickr8k, saved, webdataset
from data.images import ENDINGS, ImageError, is_image
from data.rows import Options, Record
from data.sources import find_format
from data.tables import could_not_load, holds_paths, with_images
from data.text_rows import csv_rows, jsonl_rows
from jobs.shards import group_starts

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
LISTS = (".txt", ".lst", ".list")


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


def _row(name: str, image, columns: dict | None = None, relative: str | None = None) -> dict:
    return {"name": name, "image": image, "columns": columns or {}, "relative": relative or os.path.basename(name)}


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
            yield from _format_pieces(*find_format(path, options.format), path)
        elif os.path.isdir(path):
            yield from _folder_pieces(path)
        elif os.path.exists(path):
            yield (_kind(path), path)
        elif found := sorted(glob.glob(path, recursive=True)):
            for file in found:
                yield from _folder_pieces(file) if os.path.isdir(file) else [(_kind(file), file)]
        else:
            # A name with one / and no ending may be the id of a Hub data set.
            if path != "scenes" and (not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or os.path.splitext(path)[1]):
                raise DataError(f"{path}: there is no such file or folder, and no file that matches it as a pattern.")
            yield ("rows", path)


def _kind(file: str) -> str:
    return (
        "tar" if file.lower().endswith(webdataset.TARS) else "parquet" if file.lower().endswith(".parquet") else "rows"
    )


def _remote_pieces(path: str) -> list[tuple[str, str]]:
    files = list_remote(path)
    images = [file for file in files if os.path.splitext(file)[1].lower() in ENDINGS]
    tables = [file for file in files if file.lower().endswith((*webdataset.TARS, ".parquet", *TABLES, *LISTS))]
    if images or not tables:
        return [("rows", path)]
    return [(_kind(file), file) for file in tables]


def _folder_pieces(path: str) -> list[tuple[str, str]]:
    if saved.matches(Path(path)):
        return [("rows", path)]
    if next(_images_in(path), None) is not None:
        return [("folder", path)]
    try:
        return _format_pieces(detect(path), Path(path), path)
    except DataError:
        endings = Counter(os.path.splitext(file)[1].lower() or "without an ending" for file in _walk(path))
        inside = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(6)) or "it is empty"
        raise DataError(f"{path}: there is no image in this folder ({inside}).") from None


def _format_pieces(source, place: Path, path: str) -> list[tuple[str, str]]:
    if source is webdataset:
        return [("tar", str(file)) for file in (sorted(place.rglob("*.tar")) if place.is_dir() else [place])]
    if source.NAME == "parquet":
        return [("parquet", str(file)) for file in (sorted(place.rglob("*.parquet")) if place.is_dir() else [place])]
    return [("rows", path)]


def rows_of(kind: str, place: str, options: Options, start: int = 0, stop: int | None = None) -> Iterator[dict]:
    """The rows of a piece; for a Parquet file those of the row groups that begin at rows `start` to `stop`."""
    with reaching(place, ImageError):
        if kind == "tar":
            yield from _tar_rows(place, options)
        elif kind == "parquet":
            yield from _parquet_rows(place, options, start, stop)
        elif is_remote(place):
            yield from _remote_rows(place, options)
        elif options.format == "auto" and os.path.isfile(place):
            yield from _file_rows(place, options)
        elif kind == "folder":
            yield from (_row(file, file, relative=os.path.relpath(file, place)) for file in _images_in(place))
        else:
            yield from _format_rows(*find_format(place, options.format), place, options)


def _images_in(path: str) -> Iterator[str]:
    """The images in a folder and below, in order, whatever their extensions."""
    return (file for file in _walk(path) if os.path.splitext(file)[1].lower() in ENDINGS or is_image(file))


def _walk(path: str) -> Iterator[str]:
    """The files in a folder and below, in order, except what macOS adds and the shards of an output."""
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if name != "__MACOSX" and not name.endswith(".shards"))
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("._"))


def left_out(path: str) -> Counter:
    """How many files of each extension in a folder of images are not images; empty for a folder that is a data set."""
    if saved.matches(Path(path)):
        return Counter()
    endings = Counter()
    images = 0
    for file in _walk(path):
        ending = os.path.splitext(file)[1].lower()
        if ending in ENDINGS or is_image(file):
            images += 1
        else:
            endings[ending or "without an ending"] += 1
    return endings if images else Counter()


def _file_rows(path: str, options: Options) -> Iterator[dict]:
    file, lower = Path(path), path.lower()
    if lower.endswith(LISTS) and not flickr8k.matches(file):
        yield from _list_rows(file, Finder([file.parent]))
    elif lower.endswith(TABLES):
        yield from _table_rows(file, options)
    elif flickr8k.matches(file):
        yield from _format_rows(flickr8k, file, path, options)
    else:
        yield _row(path, path)


def _list_rows(file: Path, find, base: str | None = None) -> Iterator[dict]:
    try:
        names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except TextError as error:
        raise DataError(str(error)) from None
    if not names:
        raise DataError(f"{base or file}: the list is empty.")
    for name in names:
        yield _place(name, find, base, {})


def _place(name: str, find, base: str | None, columns: dict) -> dict:
    """The row of an image named in a list: a path, relative to the list or to where the script runs, or an address."""
    if is_remote(name):
        return _row(name, name, columns)
    if base:
        address = f"{base.rsplit('/', 1)[0]}/{name.replace(chr(92), '/')}"
        return _row(address, address, columns, relative=name)
    if existing := next((form for form in forms(name) if os.path.exists(form)), None):
        return _row(existing, existing, columns)
    path = find(name)
    shown = path if os.path.isabs(name) else os.path.join(find.given, os.path.relpath(path, find.folders[0]))
    return _row(shown, path, columns, relative=name if not os.path.isabs(name) else None)


def _table_rows(file: Path, options: Options, base: str | None = None) -> Iterator[dict]:
    """Rows of CSV, TSV, JSON lines, or of JSON as data.formats.annotations reads it."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        source, _ = find_format(str(file))
        yield from _format_rows(source, file, str(file), options)
        return
    rows = (
        csv_rows(file) if suffix in (".csv", ".tsv") else ((r, f"{file.name}, line {n}") for n, r in jsonl_rows(file))
    )
    folder = Path(options.image_dir) if options.image_dir else file.parent
    find = Finder([folder])
    column = None
    empty = True
    for number, (row, where) in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f'{where}: expected an object with "image", got {json.dumps(row)[:80]}')
        if column is None:
            column, _ = columns_of(row, options.image_column, None, f"{file}, {where}", captions=False)
        empty = False
        image = image_in(row.get(column), f"{file}, {where}", column)
        columns = {name: value for name, value in row.items() if name != column}
        if isinstance(image, str):
            yield _place(image, find, base, columns)
        else:
            yield _row(str(row.get("image_id") or f"{file.name}#{number}"), image, columns)
    if empty:
        raise DataError(f"{base or file}: the list is empty.")


def _tar_rows(path: str, options: Options) -> Iterator[dict]:
    opened = open_remote(path) if is_remote(path) else None
    try:
        for sample in webdataset.samples(path, captions=False, opened=opened):
            image = sample["image"]
            inner = json.loads(sample["json"]) if sample["json"] else {}
            columns = (
                {k: v for k, v in inner.items() if not isinstance(v, dict | list)} if isinstance(inner, dict) else {}
            )
            member = image["path"] if image else sample["key"]
            value = image or ImageError(sample["fault"])
            yield _row(f"{os.path.basename(path)}/{member}", value, columns, relative=member)
    finally:
        if opened is not None:
            opened.close()


def _parquet_rows(path: str, options: Options, start: int = 0, stop: int | None = None) -> Iterator[dict]:
    folder = options.image_dir or (None if is_remote(path) else os.path.dirname(path) or ".")
    find = Finder([folder]) if folder else None
    number = start
    try:
        source = open_remote(path) if is_remote(path) else path
        with pq.ParquetFile(source) as file:
            names = file.schema_arrow.names
            column, _ = find_columns([*names, "captions"], options.image_column, None, path)
            groups = [
                group for group, first in group_starts(file.metadata) if first >= start and first < (stop or first + 1)
            ]
            for batch in file.iter_batches(batch_size=32, row_groups=groups):
                for row in batch.to_pylist():
                    yield _cell_row(row, column, f"{os.path.basename(path)}#{number}", path, number, find)
                    number += 1
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: the Parquet file is broken or cut off, or is not one ({str(error).strip().splitlines()[0][:200]}). Fetch "
            "it again"
        ) from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(
            f"{path}: the Parquet file is broken or cut off after row {number} ({error}). Fetch it again"
        ) from None


def _cell_row(row: dict, column: str, spare: str, source: str, number: int, find) -> dict:
    columns = {name: value for name, value in row.items() if name != column and not isinstance(value, bytes)}
    if row.get(column) is None:
        return _row(spare, ImageError(f"{source} row {number}: there is no image in column {column}"), columns)
    image = image_in(row[column], f"{source} row {number}", column)
    if isinstance(image, str):
        return _place(image, find, None if find else source, columns)
    return _row(os.path.basename(image["path"] or "") or spare, image, columns)


def _format_rows(source, place: Path, path: str, options: Options) -> Iterator[dict]:
    """Rows of a data set, by its format's own reader."""
    options.captions, options.streaming = False, True
    try:
        found = source.read(place, options)
        if not isinstance(found, dict):
            for record in found:
                yield _record_row(record, place)
            return
        for split, table in found.items():
            yield from _split_rows(split, table, path, options)
    except DataError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("datasets"):
            raise could_not_load(path, source.NAME, error) from None
        raise


def _record_row(record: Record, place: Path) -> dict:
    columns = {"image_id": record.image_id, "split": record.split, **record.extras}
    columns = {name: value for name, value in columns.items() if value is not None}
    if isinstance(record.image, str):
        return _row(record.image, record.image, columns, relative=record.name)
    return _row(record.name or record.image_id or record.where, record.image, columns)


def _split_rows(split: str, table, path: str, options: Options) -> Iterator[dict]:
    if table.features is None:  # not given by the source: taken from its first rows
        table = table._resolve_features()
    column, _ = find_columns([*table.column_names, "captions"], options.image_column, None, path)
    paths = holds_paths(table, column)
    folder = options.image_dir or (path if os.path.isdir(path) else ".")
    find = Finder([folder])
    table = table if paths else with_images(table, column)
    for number, row in enumerate(table):
        row = {"split": split, **row} if split in ("train", "validation", "test") else row
        yield _cell_row(row, column, f"{split}#{number}", path, number, find)


def _remote_rows(path: str, options: Options) -> Iterator[dict]:
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
        copy = local_copy(file, options.cache_dir)
        yield from (
            _list_rows(copy, None, base=file) if file.lower().endswith(LISTS) else _table_rows(copy, options, base=file)
        )


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
            files = sorted(map(str, Path(path).rglob("*")))
        else:
            files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        files = [file for file in files if file.lower().endswith(endings)]
        if not files:
            raise DataError(f"{path}: holds no {' or '.join(endings)} file")
        found += files
    return list(dict.fromkeys(found))

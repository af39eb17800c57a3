"""Rows in: every source of captions as a stream of rows, with the captions to rewrite. Rows out: JSONL or Parquet."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

import data
from common.errors import DataError
from common.text import open_text
from data import reader
from data.caption_files import load_predictions
from data.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, NUMBERED_CAPTION, captions_of
from data.formats.annotations import files_of
from data.reader import find_format
from data.rows import Options
from data.sources import open_rows, require_splits
from data.text_rows import csv_rows, jsonl_rows
from jobs.shards import group_starts

# CapsFusion's example file and CapsFusion-120M call them laion_2b and laion_coco.
RAW_COLUMNS = ("laion_2b", "raw", "raw_caption", "alt_text", "alt", "text", "txt", "caption", "captions")
SYNTHETIC_COLUMNS = ("laion_coco", "synthetic", "synthetic_caption", "blip_caption")
FILE_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass
class Part:
    """A file, or a split, of a source."""

    label: str
    # read_from(columns, start) -> (number of the first row, rows), from row `start` or an earlier one on, in the same order
    # on every call; formats that support it read these columns only
    read_from: Callable[..., tuple[int, Iterator[dict]]]
    parquet: Path | None = None


@dataclass
class Source:
    """Rows that can be read repeatedly, in the same order."""

    name: str
    parts: list[Part]
    features: datasets.Features | None  # types of the columns, if the source declares them
    inputs: Callable[[dict], dict]  # row -> {"captions": [...]} or {"raw": ..., "synthetic": ...}, stripped
    columns: list[str] | None  # those that `inputs` needs

    def read(self, columns: list[str] | None) -> Iterator[dict]:
        return itertools.chain.from_iterable(part.read_from(columns, 0)[1] for part in self.parts)


def open_source(task: str, name: str, args) -> Source:
    """INPUT as rows. `args` are RewriteArguments.

    `fuse` reads tables (JSON, JSONL, CSV, Parquet, a Hub set, ...) row by row. `paragraph` needs all captions of an
    image together, so it reads as train.py does (data.load), except for tables without images, where each row is an image.

    Raises:
        DataError: no such source, or no caption column; the message lists the columns present.
    """
    source_format = find_format(name, args.data_format)[0].NAME
    tabular = source_format in ("annotations", "parquet", "hub", "saved", "webdataset")
    if tabular and not is_coco(Path(name).expanduser()):
        parts, features = open_table(name, source_format, args)
        first = first_row(parts)
        if task == "fuse" or (first is not None and not holds_images(first, args)):
            return with_inputs(task, name, parts, features, first, args)
    parts, features = open_records(name, source_format, args)
    return with_inputs(task, name, parts, features, first_row(parts), args, records=True)


def first_row(parts: list[Part]) -> dict | None:
    return next(itertools.chain.from_iterable(part.read_from(None, 0)[1] for part in parts), None)


def holds_images(row: dict, args) -> bool:
    image = row.get(args.image_column or next((c for c in IMAGE_COLUMNS if c in row), None))
    return isinstance(image, dict | bytes) or (isinstance(image, str) and not image.startswith(("http://", "https://")))


# ---------------------------------------------------------------- rows of a source


def open_table(name: str, source_format: str, args):
    """(parts, features or None) of rows as they are."""
    path = Path(name).expanduser()
    if source_format == "parquet" or (source_format == "annotations" and path.exists()):
        files = table_files(path)
        if args.split:
            raise DataError(f"{name}: --split is for data sets with splits; all rows of a table are rewritten")
        labels = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
        if all(file.suffix == ".parquet" for file in files):
            features = undecoded(datasets.Features.from_arrow_schema(pq.read_schema(files[0])))
            return [Part(n, partial(parquet_rows, f), f) for n, f in zip(labels, files, strict=True)], features
        return [Part(n, partial(all_text_rows, f)) for n, f in zip(labels, files, strict=True)], None
    tables = load_tables(name, source_format, args)
    if args.split:
        require_splits([args.split], list(tables), name)
        tables = {args.split: tables[args.split]}
    features = undecoded(next(iter(tables.values())).features)
    named = len(tables) > 1 and "split" not in features
    tables = {split: table.cast(features) for split, table in tables.items()}
    if named:
        features = datasets.Features({**features, "split": datasets.Value("string")})
    return [
        Part(split, partial(table_rows, table, split if named else None)) for split, table in tables.items()
    ], features


def table_rows(table, split: str | None, columns: list[str] | None, start: int) -> tuple[int, Iterator[dict]]:
    if columns and not set(columns) - set(table.column_names or ()):
        table = table.select_columns(columns)
    rows = table.skip(start) if start else table
    return start, (row if split is None else {**row, "split": split} for row in rows)


def load_tables(name: str, source_format: str, args) -> dict:
    options = Options(config=args.dataset_config_name, streaming=args.streaming, format=source_format)
    return open_rows(reader.Source(name, options), name)[1]


def open_records(name: str, source_format: str, args):
    """(parts, features) of what train.py trains on: one record per image, with all its captions and its split."""
    splits = data.load(
        name,
        dataset_config_name=args.dataset_config_name,
        data_format=source_format,
        image_dir=args.image_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        streaming=args.streaming,
        splits=(args.split,) if args.split else None,
        require_images=False,
    )
    features = next(iter(splits.values())).features
    features = datasets.Features({**features, "split": datasets.Value("string")}) if features is not None else None
    return [Part(split, partial(record_rows, rows, split)) for split, rows in splits.items()], features


def record_rows(table, split: str, columns: list[str] | None, start: int) -> tuple[int, Iterator[dict]]:
    def rows():
        for row in table_rows(table, split, columns, start)[1]:
            if isinstance(row.get("image"), dict) and os.path.exists(row["image"]["path"] or ""):
                row["image"]["path"] = os.path.abspath(row["image"]["path"])  # OUTPUT may be in another folder
            yield row

    return start, rows()


def undecoded(features: datasets.Features) -> datasets.Features:
    """The same types, images left as bytes or path."""
    return datasets.Features(
        {k: datasets.Image(decode=False) if isinstance(v, datasets.Image) else v for k, v in features.items()}
    )


def table_files(path: Path) -> list[Path]:
    """A file, or the files of one kind in a folder, sorted by name."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS and _is_data(file.relative_to(path)))
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        raise DataError(f"{path}: expected files of one kind ({' '.join(FILE_KINDS)}), found {sorted(kinds) or 'none'}")
    return files


def _is_data(file: Path) -> bool:
    """Whether a file in a folder is data, not a program's own file such as _settings.json."""
    return not any(part.startswith((".", "_")) for part in file.parts)


def parquet_rows(file: Path, columns: list[str] | None, start: int) -> tuple[int, Iterator[dict]]:
    groups = group_starts(pq.read_metadata(file))
    behind = [(group, first) for group, first in groups if first > start]
    before = groups[: len(groups) - len(behind)][-1:]  # the row group that `start` is in

    def rows():
        with pq.ParquetFile(file) as table:
            wanted = [group for group, _ in before + behind]
            for batch in table.iter_batches(batch_size=1000, row_groups=wanted, columns=columns):
                yield from batch.to_pylist()

    return before[0][1] if before else 0, rows()


def all_text_rows(file: Path, columns: list[str] | None, start: int) -> tuple[int, Iterator[dict]]:
    return 0, text_rows(file)


def text_rows(file: Path) -> Iterator[dict]:
    """Rows of a JSON list, of JSONL or of CSV, one in memory at a time."""
    if file.suffix in (".csv", ".tsv"):
        rows = csv_rows(file)
    elif file.suffix == ".json" and first_character(file) == "[":
        rows = ((row, f"{file.name} entry {number}") for number, row in enumerate(json_list(file)))
    else:
        rows = ((row, f"{file.name} line {number}") for number, row in jsonl_rows(file))
    for row, where in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {row!r:.80}")
        yield row


def is_coco(path: Path) -> bool:
    """COCO's annotation JSON, with captions and images in separate lists."""
    files = [file for file, _ in files_of(path)] if path.exists() else []
    return bool(files) and files[0].suffix == ".json" and first_character(files[0]) == "{"


def first_character(file: Path) -> str:
    with open_text(file) as text:
        return text.read(1024).lstrip()[:1]


def json_list(file: Path, chunk: int = 1 << 20) -> Iterator:
    """The entries of a JSON list, read piece by piece."""
    decoder, text, number = json.JSONDecoder(), "", 0
    with open_text(file) as content:
        text = content.read(chunk).lstrip()[1:]
        while True:
            text = text.lstrip().removeprefix(",").lstrip() if number else text.lstrip()
            if text.startswith("]"):
                return
            try:
                entry, end = decoder.raw_decode(text)
                if end == len(text):  # 12 may continue as 123
                    raise json.JSONDecodeError("the list has no end", text, end)
            except json.JSONDecodeError as error:
                more = content.read(chunk)
                if not more:
                    raise DataError(f"{file} entry {number}: not valid JSON: {error.msg}") from None
                text += more
                continue
            yield entry
            text, number = text[end:], number + 1


# ---------------------------------------------------------------- the captions of a row


def with_inputs(task: str, name: str, parts, features, first: dict | None, args, records: bool = False) -> Source:
    """The source of rows, with the columns that hold its captions; `records` have them under data.load's names."""
    if first is None:
        raise DataError(f"{name}: there are no rows")
    columns = list(first)
    if task == "paragraph":
        wanted = ["captions"] if records else find_captions(columns, args.caption_column, name)

        def inputs(row):
            captions = (clean(caption) for caption in captions_of(row, wanted, name))
            return {"captions": list(dict.fromkeys(filter(None, captions)))}

        return Source(name, parts, features, inputs, wanted)

    synthetic_of = read_synthetic(args.synthetic_file) if args.synthetic_file else None
    raw = "captions" if records else find_column(columns, args.raw_column, RAW_COLUMNS, "raw_column", name)
    if synthetic_of is None:
        synthetic = find_column(columns, args.synthetic_column, SYNTHETIC_COLUMNS, "synthetic_column", name)
        wanted = [raw, synthetic]
    else:
        given = None if records else args.image_column
        image = given or next((c for c in IMAGE_COLUMNS if c in columns), None)
        wanted = [raw, *(column for column in ("image_id", image) if column in columns)]
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else folder.parent

    def inputs(row):
        values = row[raw] if isinstance(row[raw], list) else [row[raw]]
        own = clean(next(iter(values), None))
        if synthetic_of is None:
            return {"raw": own, "synthetic": clean(row[synthetic])}
        place = row.get(image)
        place = place["path"] if isinstance(place, dict) else place
        keys = [str(row.get("image_id")), str(place), os.path.abspath(folder / str(place))]
        return {"raw": own, "synthetic": clean(next((synthetic_of[key] for key in keys if key in synthetic_of), None))}

    return Source(name, parts, features, inputs, wanted)


def clean(caption) -> str:
    """A caption with white space collapsed, so that it cannot break a prompt's lines; "" if it is not text."""
    if not isinstance(caption, str):
        return ""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def find_captions(columns: list[str], given: str | None, name: str) -> list[str]:
    numbered = sorted(column for column in columns if NUMBERED_CAPTION.fullmatch(column))
    if given is None and numbered and not {"captions", "caption"} & set(columns):
        return numbered
    return [find_column(columns, given, CAPTION_COLUMNS, "caption_column", name)]


def find_column(columns: list[str], given: str | None, usual: Iterable[str], option: str, name: str) -> str:
    found = given if given in columns else next((c for c in usual if c in columns), None) if given is None else None
    if found is None:
        what = f"no column {given!r}" if given else f"none of the columns {', '.join(usual)}"
        raise DataError(f"{name}: {what}. Columns present: {', '.join(columns)}. Name it with --{option}")
    return found


def read_synthetic(path: str) -> dict[str, str]:
    """Captions written by infer.py or evaluate.py, by image: its id, its path as written and its absolute path."""
    captions = load_predictions(path)
    return captions | {os.path.abspath(name): caption for name, caption in captions.items()}


# ---------------------------------------------------------------- rows out

LINES = pa.schema({"line": pa.string()})
RESULT = {
    "status": "string",  # rewritten, kept_synthetic, kept_raw, null
    "reason": "string",  # one of rewriting.checks.REASONS, if the LLM's text was rejected
    "warnings": "list",  # names and numbers that no input has
    "rejected": "string",  # the last text that was rejected
    "attempts": "int64",
    "model": "string",
    "prompt": "string",  # sha256 of the prompt's template, 12 digits
    "settings": "string",
}


def tables(rows: Iterator[dict], features: datasets.Features | None, column: str) -> Iterator[pa.Table]:
    """Rows of the output as tables of a thousand: typed where `features` are given, else each as a line of JSON.

    Args:
        features: types of the input's columns.
        column: name of the caption column; everything else about the result is in `rewrite`.
    """
    schema = None if features is None else output_features(features, column).arrow_schema
    empty = True
    while group := list(itertools.islice(rows, 1000)):
        empty = False
        if schema is None:
            lines = [json.dumps(plain_row(row), ensure_ascii=False, default=str) for row in group]
            yield pa.table({"line": lines}, schema=LINES)
            continue
        try:
            for name in {name for row in group for name in row} - set(schema.names):
                raise DataError(f"column {name} is not in the first 1,000 rows, nor in the Parquet schema. Write JSONL")
            yield pa.Table.from_pylist(group, schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"a column holds values of several types: {error}. Write JSONL instead") from None
    if empty:  # a shard whose rows were all dropped has a file, too
        yield (LINES if schema is None else schema).empty_table()


def told_from(rows: list[dict]) -> datasets.Features:
    """Column types inferred from some of the input's rows; a column without values is text."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    types = datasets.Features.from_arrow_schema(table.schema)
    return datasets.Features(
        {k: datasets.Value("string") if v == datasets.Value("null") else v for k, v in types.items()}
    )


def output_features(features: datasets.Features, column: str) -> datasets.Features:
    string = datasets.Value("string")
    kinds = {name: datasets.List(string) if kind == "list" else datasets.Value(kind) for name, kind in RESULT.items()}
    return datasets.Features({**features, column: string, "rewrite": kinds})


def plain_row(row: dict) -> dict:
    """A row as JSON can hold it: an image's path in place of its struct."""
    row = dict(row)
    for name, value in row.items():
        image = isinstance(value, dict) and set(value) == {"bytes", "path"}
        if isinstance(value, bytes) or image:
            if not image or value["bytes"] is not None:
                raise DataError(
                    f"column {name} holds images or other bytes, which JSONL cannot hold. Give an --output that does not "
                    "end in .jsonl: it becomes a folder of Parquet files"
                )
            row[name] = value["path"]
    return row

"""Rows in: what data.reader reads of a source, as streams of rows, with the captions to rewrite. Rows out: JSONL or
Parquet."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

import data
from common.errors import DataError
from common.text import json_line
from data import reader
from data.caption_files import load_predictions
from data.columns import (
    LOOKED_AT,
    captions_of,
    checked_objects,
    find_columns,
    first_values,
    is_missing,
    present,
    taken,
    usual_name,
)
from data.formats.parquet import file_rows
from data.rows import Options
from data.sources import open_rows, require_splits
from data.text_rows import first_character, table_objects
from jobs.tables import schema_of

# CapsFusion's example file and CapsFusion-120M call them laion_2b and laion_coco.
RAW_COLUMNS = ("laion_2b", "raw", "raw_caption", "alt_text", "alt", "text", "txt", "caption", "captions")
SYNTHETIC_COLUMNS = ("laion_coco", "synthetic", "synthetic_caption", "blip_caption")
TYPED = ("hub", "saved", "webdataset")  # formats that are read as tables of `datasets`


@dataclass
class Part:
    """A file, or a split, of a source, whose rows come in the same order on every call."""

    label: str
    # rows(columns, start) yields the rows from row `start` on; formats that support it read these columns only
    rows: Callable[[list[str] | None, int], Iterator[dict]]
    split: str | None = None  # that rows are given as a column, if they have none
    parquet: Path | None = None

    def read(self, columns: list[str] | None, start: int = 0) -> Iterator[dict]:
        rows = self.rows(columns, start)
        return rows if self.split is None else ({**row, "split": row.get("split", self.split)} for row in rows)


@dataclass
class Source:
    """Rows that can be read repeatedly, in the same order."""

    name: str
    parts: list[Part]
    features: datasets.Features | None  # types of the columns, if the source declares them
    inputs: Callable[[dict], dict]  # row -> {"captions": [...]} or {"raw": ..., "synthetic": ...}, stripped
    columns: list[str]  # those that `inputs` needs

    def read(self, columns: list[str] | None) -> Iterator[dict]:
        return rows_in(self.parts, columns)


def rows_in(parts: list[Part], columns: list[str] | None = None) -> Iterator[dict]:
    return itertools.chain.from_iterable(part.read(columns) for part in parts)


def open_source(task: str, name: str, args) -> Source:
    """INPUT as rows. `args` are RewriteArguments.

    `fuse` reads tables (JSON, JSONL, CSV, Parquet, tars, a Hub set, ...) row by row. `paragraph` needs all captions of an
    image together, so it reads as train.py does (data.load), except for tables without images, where each row is an image.

    Raises:
        DataError: no such source, or no caption column; the message lists the columns present.
    """
    options = Options(
        args.dataset_config_name, args.image_dir, args.image_column, args.caption_column, streaming=args.streaming,
        format=args.data_format,
    )  # fmt: skip
    source = reader.Source(name, options)
    as_rows, raw_column = is_table(source), args.raw_column
    if as_rows:
        parts, features = table_parts(source, args.split)
        examples = first_values(itertools.islice(rows_in(parts), LOOKED_AT))
        as_rows = task == "fuse" or not holds_images(source, examples, features)
    if not as_rows:
        parts, features = record_parts(name, source.format.NAME, args)
        examples = first_values(itertools.islice(rows_in(parts), LOOKED_AT))
        raw_column, options = "captions", Options(caption_column="captions")
    if not examples:
        raise DataError(f"{name}: there are no rows")
    columns = find_columns(examples, replace(options, images=False, captions=task == "paragraph"), name)
    if task == "paragraph":
        return Source(name, parts, features, paragraph_inputs(columns.captions, name), columns.captions)
    raw = find_column(examples, raw_column, RAW_COLUMNS, "raw_column", name)
    if args.synthetic_file:
        names = list(filter(None, (columns.image_id, columns.image)))
        inputs = matched_inputs(raw, names, source.root, args.synthetic_file)
        return Source(name, parts, features, inputs, [raw, *names])
    synthetic = find_column(examples, args.synthetic_column, SYNTHETIC_COLUMNS, "synthetic_column", name)
    return Source(name, parts, features, fuse_inputs(raw, synthetic), list({raw: None, synthetic: None}))


def holds_images(source: reader.Source, examples: dict, features) -> bool:
    """Whether the rows of a table have images, as data.load finds them, and not their addresses."""
    images = tuple(column for column in features or () if isinstance(features[column], datasets.Image))
    try:
        options = source.looking(source.finder(source.parts[0].folders))
        image = examples[find_columns(examples, options, source.name, images).image]
    except DataError:
        return False
    return image is not None and not re.match("https?://", str(image))


# ---------------------------------------------------------------- rows of a source


def is_table(source: reader.Source) -> bool:
    """Whether its captions are in columns. JSON that is one object has them elsewhere: COCO's for example."""
    if source.format.NAME != "annotations":
        return source.format.NAME in ("parquet", *TYPED)
    files = [Path(part.place) for part in source.parts if part.place.lower().endswith(".json")]
    return set(map(first_character, files)) <= {"["}


def table_parts(source: reader.Source, split: str | None) -> tuple[list[Part], datasets.Features | None]:
    """(parts, types of their columns or None) of rows as they are, those of `split` or of all splits."""
    features = None
    if source.format.NAME in TYPED:
        tables = open_rows(source, source.name)[1]
        features = undecoded(next(iter(tables.values())).features)
        parts = [Part(name, partial(table_rows, table.cast(features)), name) for name, table in tables.items()]
    elif source.format.NAME == "parquet":
        features = undecoded(datasets.Features.from_arrow_schema(pq.read_schema(source.parts[0].place)))
        parts = [Part(*label_and_rows(source, part, parquet_rows), Path(part.place)) for part in source.parts]
    else:
        parts = [Part(*label_and_rows(source, part, text_rows)) for part in source.parts]
    parts = of_split(parts, split, source.name)
    return parts, with_split(features, parts)


def label_and_rows(source: reader.Source, part, rows: Callable) -> tuple[str, Callable, str | None]:
    label = os.path.relpath(part.place, source.root).replace(os.sep, "/")
    return label, partial(rows, part.place), part.split


def of_split(parts: list[Part], split: str | None, name: str) -> list[Part]:
    """The parts of a split, or all of them. Where these are of one split, rows need not say so."""
    by_split: dict = {}
    for part in parts:
        by_split.setdefault(part.split, []).append(part)
    if split:
        require_splits([split], list(filter(None, by_split)), name)
        by_split = {split: by_split[split]}
    if len(by_split) > 1:
        return parts
    return [replace(part, split=None) for part in next(iter(by_split.values()))]


def record_parts(name: str, data_format: str, args) -> tuple[list[Part], datasets.Features | None]:
    """(parts, types) of what train.py trains on: one record per image, with all its captions and its split."""
    splits = data.load(
        name,
        dataset_config_name=args.dataset_config_name,
        data_format=data_format,
        image_dir=args.image_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        streaming=args.streaming,
        skip_bad_samples=args.skip_bad_samples,
        splits=(args.split,) if args.split else None,
        require_images=False,
    )
    parts = [Part(split, partial(record_rows, table), split) for split, table in splits.items()]
    return parts, with_split(next(iter(splits.values())).features, parts)


def table_rows(table, columns: list[str] | None, start: int) -> Iterator[dict]:
    return iter((table.select_columns(columns) if columns else table).skip(start))


def record_rows(table, columns: list[str] | None, start: int) -> Iterator[dict]:
    return map(with_whole_path, table_rows(table, columns, start))


def with_whole_path(row: dict) -> dict:
    image = row.get("image", {})
    if os.path.exists(image.get("path") or ""):
        image["path"] = os.path.abspath(image["path"])  # OUTPUT may be in another folder
    return row


def parquet_rows(place: str, columns: list[str] | None, start: int) -> Iterator[dict]:
    with pq.ParquetFile(place) as file:
        yield from file_rows(file, start, columns)


def text_rows(place: str, columns: list[str] | None, start: int) -> Iterator[dict]:
    objects = checked_objects(table_objects(Path(place)), place)
    return (row for row, _ in itertools.islice(objects, start, None))


def undecoded(features: datasets.Features) -> datasets.Features:
    """The same types, images left as bytes or path."""
    return datasets.Features(
        {k: datasets.Image(decode=False) if isinstance(v, datasets.Image) else v for k, v in features.items()}
    )


def with_split(features: datasets.Features | None, parts: list[Part]) -> datasets.Features | None:
    if features is None or parts[0].split is None:
        return features
    return datasets.Features({**features, "split": features.get("split", datasets.Value("string"))})


# ---------------------------------------------------------------- the captions of a row


def paragraph_inputs(columns: list[str], name: str) -> Callable[[dict], dict]:
    def inputs(row):
        captions = map(clean, captions_of(row, columns, name))
        return {"captions": list(dict.fromkeys(filter(None, captions)))}

    return inputs


def fuse_inputs(raw: str, synthetic: str) -> Callable[[dict], dict]:
    return lambda row: {"raw": caption_in(row.get(raw)), "synthetic": caption_in(row.get(synthetic))}


def matched_inputs(raw: str, names: list[str], root: str, synthetic_file: str) -> Callable[[dict], dict]:
    """Synthetic captions are those of the file: by what the columns `names` say, as it is or as a path in folder `root`."""
    synthetic_of = read_synthetic(synthetic_file)

    def inputs(row):
        keys = [str(place_of(row.get(name))) for name in names]
        keys += [os.path.abspath(os.path.join(root, key)) for key in keys]
        synthetic = next(filter(None, map(synthetic_of.get, keys)), None)
        return {"raw": caption_in(row.get(raw)), "synthetic": clean(synthetic)}

    return inputs


def place_of(image):
    return image["path"] if isinstance(image, dict) else image


def caption_in(value) -> str:
    """A caption of `fuse`: text from the web, taken as it is, or the first of a list."""
    return clean(next(iter(value), None) if isinstance(value, list) else value)


def clean(caption) -> str:
    """A caption with white space collapsed, so that it cannot break a prompt's lines; "" if it is missing or no text."""
    if not isinstance(caption, str) or is_missing(caption):
        return ""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def find_column(columns, name: str | None, usual: tuple[str, ...], option: str, source: str) -> str:
    """The column called `name`, or else as is usual, in any case."""
    there = present(usual, {usual_name(column): column for column in reversed(columns)})
    column = name or taken(f"{option.partition('_')[0]} captions", there, source, option)
    if column not in columns:
        raise DataError(
            f"{source}: there is no column {name or ' or '.join(usual)}. Columns present: {', '.join(columns)}. Name it "
            f"with --{option}"
        )
    return column


def read_synthetic(path: str) -> dict[str, str]:
    """Captions written by infer.py or evaluate.py, by image: its id, its path as written and its absolute path."""
    captions = load_predictions(path)
    return captions | {os.path.abspath(name): caption for name, caption in captions.items()}


# ---------------------------------------------------------------- rows out

LINES = pa.schema({"line": pa.string()})
TEXT, COUNT = datasets.Value("string"), datasets.Value("int64")
RESULT = {
    "status": TEXT,  # rewritten, kept_synthetic, kept_raw, null
    "reason": TEXT,  # one of rewriting.checks.REASONS, if the LLM's text was rejected
    "warnings": datasets.List(TEXT),  # names and numbers that no input has
    "rejected": TEXT,  # the last text that was rejected
    "attempts": COUNT,
    "model": TEXT,
    "prompt": TEXT,  # sha256 of the prompt's template, 12 digits
    "settings": TEXT,
}


def tables(rows: Iterator[dict], features: datasets.Features | None, column: str) -> Iterator[pa.Table]:
    """Rows of the output as tables of a thousand: typed where `features` are given, else each as a line of JSON.

    Args:
        features: types of the input's columns.
        column: name of the caption column; everything else about the result is in `rewrite`.
    """
    if features is None:
        table_of, schema = lines_of, LINES
    else:
        table_of, schema = typed_table, output_features(features, column).arrow_schema
    yield table_of(list(itertools.islice(rows, 1000)), schema)  # a shard whose rows were all dropped has a file, too
    while group := list(itertools.islice(rows, 1000)):
        yield table_of(group, schema)


def lines_of(rows: list[dict], schema: pa.Schema) -> pa.Table:
    lines = [json_line(plain_row(row)).rstrip("\n") for row in rows]
    return pa.table({"line": lines}, schema=schema)


def typed_table(rows: list[dict], schema: pa.Schema) -> pa.Table:
    for name in set().union(*rows) - set(schema.names):
        raise DataError(f"column {name} is not in the first 1,000 rows, nor in the Parquet schema. Write JSONL")
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"a column holds values of several types: {error}. Write JSONL instead") from None


def inferred_features(rows: list[dict]) -> datasets.Features:
    """Column types inferred from some of the input's rows; a column without values, or with values of several types, is text."""
    return datasets.Features.from_arrow_schema(schema_of(lambda: iter(rows)))


def output_features(features: datasets.Features, column: str) -> datasets.Features:
    return datasets.Features({**features, column: TEXT, "rewrite": RESULT})


def plain_row(row: dict) -> dict:
    """A row as JSON can hold it: an image's path in place of its struct."""
    return {name: plain_value(value, name) for name, value in row.items()}


def plain_value(value, column: str):
    is_image = isinstance(value, dict) and set(value) == {"bytes", "path"}
    if isinstance(value["bytes"] if is_image else value, bytes):
        raise DataError(
            f"column {column} holds images or other bytes, which JSONL cannot hold. Give an --output that does not "
            "end in .jsonl: it becomes a folder of Parquet files"
        )
    return value["path"] if is_image else value

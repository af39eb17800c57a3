"""Parquet files: one, several by a pattern, or a folder laid out like a Hub data set."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.remote import open_binary
from data.columns import find_columns, row_of
from data.rows import Options, Part, Row, split_of_file
from data.tables import load_dataset, loading, local_files
from data.walk import files_below

NAME = "parquet"
ABOUT = "Parquet files, or a folder laid out like a Hub data set"


def matches(path: Path) -> bool:
    # img2dataset writes 00000.parquet, a table about its samples, next to 00000.tar, which holds them.
    tables = (file for file in files_below(path, ".parquet") if not file.with_suffix(".tar").exists())
    return path.suffix.lower() == ".parquet" or any(tables)


def parts(path: Path, options: Options) -> list[Part]:
    """A part per file; the splits are those of the folder's README.md, as on the Hub, or else of the files' names."""
    card = path / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        with loading(str(path), NAME):
            config = datasets.load_dataset_builder(str(path), options.config, cache_dir=options.cache_dir).config
        named = [(Path(file), str(split)) for split, files in config.data_files.items() for file in files]
    else:
        files = sorted(local_files(path), key=lambda file: "restval" in file.name)  # behind train, which it joins
        named = [(file, split_of_file(file)) for file in files]
    folder = str(path if path.is_dir() else path.parent)
    return [Part(NAME, str(file), split=split, folders=(str(file.parent), folder)) for file, split in named]


def tables(path: Path, options: Options) -> dict:
    by_split: dict[str, list[str]] = {}
    for part in parts(path, options):
        by_split.setdefault(part.split or "train", []).append(part.place)
    return load_dataset(str(path), NAME, options, path="parquet", data_files=by_split)


def read(part: Part, options: Options, start: int = 0) -> Iterator[Row]:
    """The rows of a file from `start` on; row groups before that are not read."""
    number = start
    try:
        with open_binary(part.place) as opened, pq.ParquetFile(opened) as file:
            first = next(file.iter_batches(batch_size=1), None)
            example = first.to_pylist()[0] if first else dict.fromkeys(file.schema_arrow.names)
            columns = find_columns(example, options, part.place)
            for number, content in enumerate(file_rows(file, start), start):
                yield row_of(content, columns, f"row {number}", part.place, options, part.split)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise DataError(
            f"{part.place}: the Parquet file is broken or cut off after row {number}, or is not one ({reason}). Fetch it again"
        ) from None


def file_rows(file: pq.ParquetFile, start: int = 0, columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of a Parquet file from `start` on, without reading the row groups before that."""
    number = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start:
            number += rows
            continue
        for batch in file.iter_batches(batch_size=32, row_groups=[group], columns=columns):
            yield from batch.slice(min(max(0, start - number), len(batch))).to_pylist()
            number += len(batch)

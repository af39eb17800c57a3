"""Parquet files: one, several by a pattern, or a folder laid out like a Hub data set."""

from pathlib import Path

from data.rows import Options, split_of_file
from data.tables import load_dataset, local_files

NAME = "parquet"
ABOUT = "Parquet files, or a folder laid out like a Hub data set"


def matches(path: Path) -> bool:
    if path.suffix == ".parquet":
        return True
    if not path.is_dir():
        return False
    files = list(path.rglob("*.parquet"))
    # img2dataset writes 00000.parquet, a table about its samples, next to 00000.tar, which holds them.
    return bool(files) and not all(file.with_suffix(".tar").exists() for file in files)


def read(path: Path, options: Options) -> dict:
    files = local_files(path)
    if path.is_dir() and any(split_of_file(file) or file.parent != path for file in files):
        return load_dataset(str(path), options, config=options.config)
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(split_of_file(file) or "train", []).append(str(file))
    return load_dataset("parquet", options, data_files=by_split, source=str(path))

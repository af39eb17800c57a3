"""A data set of the Hugging Face Hub with an image and a caption column."""

import re
from pathlib import Path

from data.rows import Options
from data.tables import load_dataset

NAME = "hub"
ABOUT = "a Hub data set with an image and a caption column"
YIELDS_TO = ("scenes",)
FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".tar")


def matches(path: Path) -> bool:
    return (
        not path.exists()
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)) is not None
        and path.suffix.lower() not in FILES
    )


def tables(path: Path, options: Options) -> dict:
    return load_dataset(path.as_posix(), options, config=options.config)

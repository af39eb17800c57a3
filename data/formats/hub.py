"""A data set of the Hugging Face Hub with an image and a caption column."""

from pathlib import Path

from common.existence import may_be_on_hub
from data.rows import Options
from data.tables import load_dataset

NAME = "hub"
ABOUT = "a Hub data set with an image and a caption column"
YIELDS_TO = ("scenes",)


def matches(path: Path) -> bool:
    return not path.exists() and may_be_on_hub(path.as_posix())


def tables(path: Path, options: Options) -> dict:
    name = path.as_posix()
    return load_dataset(name, NAME, options, path=name, name=options.config)

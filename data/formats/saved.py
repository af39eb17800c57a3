"""A folder made by `save_to_disk` of `datasets`."""

from pathlib import Path

import datasets

from data.rows import Options
from data.tables import as_streams, loading

NAME = "saved"
ABOUT = "a folder made by save_to_disk"


def matches(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def tables(path: Path, options: Options) -> dict:
    with loading(str(path), NAME):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return as_streams(loaded) if options.streaming else loaded

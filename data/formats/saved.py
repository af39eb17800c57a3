"""A folder made by `save_to_disk` of `datasets`."""

from pathlib import Path

import datasets

from data.rows import Options, Part
from data.tables import as_streams, could_not_load, read_table, table_parts

NAME = "saved"
ABOUT = "a folder made by save_to_disk"


def matches(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def tables(path: Path, options: Options) -> dict:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise could_not_load(str(path), NAME, error) from None
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return as_streams(loaded) if options.streaming else loaded


def parts(path: Path, options: Options) -> list[Part]:
    return table_parts(NAME, path, tables(path, options))


read = read_table

"""Every format of captioned images, one module each, with

    NAME, ABOUT                what --data_format calls it, and what it is in a few words
    matches(path) -> bool      whether a file, a folder or a name is of this format, from the names and first bytes there
    parts(path, options)       [Part, ...]: the files or splits that it is read in. Without it, the path is the one part
    read(part, options)        an iterator of Row in the source's order, in bounded memory; an image that is a file is its
                               name, as the source writes it: data.reader finds the file
    tables(path, options)      only where the images lie inside the source: {split: table of `datasets`}; without `read`, its
                               parts are those tables, streamed
    YIELDS_TO                  optional: names of formats that take precedence where both match
    SPLITS_DIFFER              optional, True: its splits hold no picture twice by their making, and are not compared

To add one, write its module and name it in FORMATS.
"""

from pathlib import Path

from common.errors import DataError
from data.formats import annotations, flickr8k, hub, imagefolder, karpathy, parquet, saved, scenes, sidecar, webdataset

FORMATS = (hub, parquet, saved, webdataset, flickr8k, karpathy, annotations, imagefolder, sidecar, scenes)
BY_NAME = {module.NAME: module for module in FORMATS}


def detect(name: str):
    """The format (module) of a file, a folder, a pattern of files or a Hub id.

    Raises:
        DataError: none matches, or more than one does.
    """
    # ./a/b is no id of a Hub data set, as a/b may be.
    path = Path(name).absolute() if name.startswith(".") else Path(name).expanduser()
    matching = [module for module in FORMATS if module.matches(path)]
    names = {module.NAME for module in matching}
    matching = [module for module in matching if not names.intersection(getattr(module, "YIELDS_TO", ()))]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(f"{name}: could be {' or '.join(m.NAME for m in matching)}. Say which with --data_format")
    if path.is_file():
        raise DataError(f"{name}: cannot tell the format of this file. {choices()}")
    if path.is_dir():
        raise DataError(f"{name}: no captions of a known format in this folder. {choices()}")
    raise DataError(f"{name}: no such file or folder, and not the id of a Hub data set")


def choices() -> str:
    return "Say it with --data_format: " + "; ".join(f"{module.NAME} ({module.ABOUT})" for module in FORMATS)


__all__ = ["BY_NAME", "FORMATS", "choices", "detect"]

"""THE reader: every source of captions or images as rows, the same for train.py, evaluate.py, infer.py and rewrite.py."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common.errors import DataError, UserError
from common.existence import exists
from data import formats
from data.finder import Finder
from data.images import ImageError
from data.rows import SPLIT_NAMES, Options, Part, Row, key_of
from data.tables import read_table

WITHOUT_FILES = ("hub", "scenes")  # formats whose name is no path


class Source:
    """What a name names: its format, and the parts that it is read in.

    Raises DataError: there is no such thing, or its format cannot be told.
    """

    def __init__(self, name: str, options: Options):
        self.name, self.options = name, options
        self.format, self.path = find_format(name, options.format)
        inside = self.format.NAME in WITHOUT_FILES
        self.root = "." if inside else str(self.path if self.path.is_dir() else self.path.parent)

    @functools.cached_property
    def parts(self) -> list[Part]:
        if hasattr(self.format, "parts"):
            return self.format.parts(self.path, self.options)
        whole = Part(self.format.NAME, str(self.path), folders=(self.root,))
        if not hasattr(self.format, "tables"):
            return [whole]
        tables = self.tables(dataclasses.replace(self.options, streaming=True)).items()
        return [dataclasses.replace(whole, label=n, split=SPLIT_NAMES.get(n.lower()), table=t) for n, t in tables]

    def tables(self, options: Options | None = None) -> dict:
        """{split as the source calls it: table of `datasets`}, for formats that hold their images."""
        tables = self.format.tables(self.path, options or self.options)
        # The types of a stream's columns are taken from its first rows if the source does not give them.
        return {n: table if table.features is not None else table._resolve_features() for n, table in tables.items()}

    def rows(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(map(self.read, self.parts))

    def read(self, part: Part, **limits) -> Iterator[Row]:
        """The rows of a part, located."""
        find = self.finder(part.folders)
        return self.located(self._rows(part, find, **limits), find)

    def _rows(self, part: Part, find: Callable, **limits) -> Iterator[Row]:
        options = self.looking(find)
        return self.format.read(part, options, **limits) if part.table is None else read_table(part, options)

    def looking(self, find: Callable) -> Options:
        return dataclasses.replace(self.options, is_file=partial(is_there, find))

    def located(self, rows: Iterator[Row], find: Callable) -> Iterator[Row]:
        """Rows with their keys; an image named by its file has the file's path, or an ImageError if two files fit."""
        for row in rows:
            row.key = key_of(row.image, row.name, self.root)
            if isinstance(row.image, str) and self.options.images:
                try:
                    row.image = find(row.image)
                except ImageError as error:
                    row.image = error
            yield row

    def finder(self, folders: tuple[str, ...]) -> Callable[[str], str]:
        """Of images in --image_dir, else in these folders."""
        return Finder((self.options.image_dir,) if self.options.image_dir else folders, self.names)

    def names(self) -> Iterator[str]:
        """What the source calls its images, as it is written there."""
        for part in self.parts:
            rows = self._rows(part, Finder(part.folders))
            yield from (row.image for row in rows if isinstance(row.image, str))


def is_there(find: Callable, name: str) -> bool:
    """Whether a name is that of an image's file."""
    try:
        return os.path.isfile(find(name))
    except UserError:  # two files, or a web address
        return False


def find_format(name: str, data_format: str = "auto"):
    """(module of the format, path) of a source."""
    if data_format == "auto":
        source = formats.detect(name)
    elif data_format in formats.BY_NAME:
        source = formats.BY_NAME[data_format]
    else:
        raise DataError(f"data_format {data_format!r} is unknown. Known: auto, {', '.join(formats.BY_NAME)}")
    if source.NAME not in (*WITHOUT_FILES, "webdataset") and not exists(name):
        raise DataError(f"{name}: no such file or folder")
    return source, Path(name).expanduser()

"""THE reader: every source of captions or images as rows, the same for train.py, evaluate.py, infer.py and rewrite.py."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets

from common.errors import DataError, UserError
from data import formats
from data.finder import Finder
from data.images import ImageError
from data.rows import Options, Part, Row, key_of
from data.tables import could_not_load

WITHOUT_FILES = ("hub", "scenes")  # formats whose name is no path


class Source:
    """What a name names: its format, and the parts that it is read in.

    Raises DataError: there is no such thing, or its format cannot be told.
    """

    def __init__(self, name: str, options: Options):
        self.name, self.options = name, options
        self.format, self.path = find_format(name, options.format)
        self.root = str(self.path if self.path.is_dir() else self.path.parent)

    @functools.cached_property
    def parts(self) -> list[Part]:
        if hasattr(self.format, "parts"):
            return self._loading(self.format.parts)
        return [Part(self.format.NAME, str(self.path), folders=(self.root,))]

    def tables(self) -> dict:
        """{split as the source calls it: table of `datasets`}, for formats that hold their images."""
        return self._loading(self.format.tables)

    def _loading(self, function: Callable):
        try:
            return function(self.path, self.options)
        except datasets.exceptions.DatasetsError as error:
            raise could_not_load(self.name, self.format.NAME, error) from None

    def rows(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(map(self.read, self.parts))

    def read(self, part: Part, **limits) -> Iterator[Row]:
        """The rows of a part, located."""
        find = self.finder(part)
        return self.located(self.format.read(part, self.looking(find), **limits), part, find)

    def looking(self, find: Callable) -> Options:
        return dataclasses.replace(self.options, is_file=partial(is_there, find))

    def located(self, rows: Iterator[Row], part: Part, find: Callable | None = None) -> Iterator[Row]:
        """Rows with their keys; an image named by its file has the file's path, or an ImageError if two files fit."""
        find = find or self.finder(part)
        for row in rows:
            row.key = key_of(row.image, row.name, self.root)
            if isinstance(row.image, str) and self.options.images:
                try:
                    row.image = find(row.image)
                except ImageError as error:
                    row.image = error
            yield row

    def finder(self, part: Part) -> Callable[[str], str]:
        folders = (self.options.image_dir,) if self.options.image_dir else part.folders or (self.root,)
        return Finder(folders, self.names)

    def names(self) -> Iterator[str]:
        """What the source calls its images, as it is written there."""
        for part in self.parts:
            rows = self.format.read(part, self.looking(Finder(part.folders or (self.root,))))
            yield from (row.image for row in rows if isinstance(row.image, str))


def is_there(find: Callable, name: str) -> bool:
    """Whether a name is that of an image's file."""
    try:
        return os.path.isfile(find(name))
    except UserError:  # two files, or a web address
        return False


def find_format(name: str, data_format: str = "auto"):
    """(module of the format, path) of a source."""
    if data_format != "auto" and data_format not in formats.BY_NAME:
        raise DataError(f"data_format {data_format!r} is unknown. Known: auto, {', '.join(formats.BY_NAME)}")
    source = formats.detect(name) if data_format == "auto" else formats.BY_NAME[data_format]
    path = Path(name).expanduser()
    pattern = any(sign in name for sign in "*?[")
    if source.NAME not in (*WITHOUT_FILES, "webdataset") and not path.exists() and not pattern:
        raise DataError(f"{name}: no such file or folder")
    return source, path

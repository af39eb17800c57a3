"""What infer.py's paths name, cut into shards."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from captioning.names import EachOnce, short
from captioning.sources import asked_in, content_of, pieces, rows_of
from common.errors import DataError
from common.remote import file_system, is_remote, open_binary, reaching, tag_of
from data.rows import Options
from jobs.shards import Cursor, Shard, digest_of, parquet_ranges, row_ranges, version_of


class ImageSource:
    """What infer.py's paths name, as shards, and the rows of each: those of captioning.sources with a `key` that no other
    row of the source has, the `source` (the path that named it), and the `version` of its image, which differs when the
    image or its own prompt does.

    Lists, folders and Parquet files of paths are one stream of rows; tars and Parquet files that hold images are read each
    on its own.
    """

    def __init__(self, paths: list[str], options: Options):
        self.options = options
        self.named = {piece: _whole_path(path) for path in paths for piece in pieces([path], options)}
        with ThreadPoolExecutor(16) as pool:
            contents = zip(self.named, pool.map(_content, self.named), strict=True)
        self.files = {piece: content for piece, content in contents if content is not None}
        self.streamed = [piece for piece in self.named if piece not in self.files]
        self.count_of_name = Counter(os.path.basename(place) for _, place in self.files)
        self.images: list[int] = []
        self.place, self.cursor, self.listings = None, None, {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"images": [], "place": None, "cursor": None, "listings": {}}  # a worker has its own

    def shards(self, size: int) -> list[Shard]:
        """All shards in the order of the source, of `size` rows, except tars, which are one each. Lists and folders are
        scanned once, tars are not opened. `images` then has the identity of each row of the stream, in its order."""
        planned, once, self.images = [], self._once(), []
        for piece, group in itertools.groupby(self.named, key=lambda piece: piece if piece in self.files else None):
            if piece is None:
                storage, place, label = "rows", "", "images"
                ranges = row_ranges(map(self._noted, self._stream(group, once)), size, len(self.images))
            else:
                (storage, place), (metadata, version) = piece, self.files[piece]
                label = self._label(place)
                ranges = parquet_ranges(metadata, size, version) if metadata else [(0, None, digest_of(version))]
            for start, stop, digest in ranges:
                rows = stop and stop - start
                planned.append(Shard(len(planned), storage, place, label, start, stop, rows, digest))
        return planned

    def rows(self, shard: Shard) -> Iterable[dict]:
        """The rows of a shard: {"key", "name", "image", "columns", "relative", "prompt", "source", "version"}.

        Raises:
            DataError: the file is broken, or the list or folder has changed since `shards` scanned it.
        """
        if self.place != shard.place:
            self.place, self.cursor = shard.place, Cursor(lambda start: self._open(shard, start))
        rows = self.cursor.read(shard.start, shard.stop)
        if shard.storage != "rows":
            numbered = (self._row_of_file(row, number, shard) for number, row in enumerate(rows, shard.start))
            return map(_keyed, EachOnce(version_in)(numbered))
        rows = list(rows)
        if digest_of(*map(_told_by, rows)) != shard.digest:
            raise DataError(f"{shard}: the source has changed while this was running. Start the same command again")
        return rows

    def stream(self) -> Iterator[dict]:
        """All rows that are not in tars or Parquet files of images."""
        return self._stream(self.streamed, self._once())

    def _stream(self, streamed: Iterable[tuple[str, str]], once) -> Iterator[dict]:
        rows = (self._versioned(row, self.named[piece]) for piece in streamed for row in rows_of(*piece, self.options))
        return map(_keyed, once(rows))

    def _once(self):
        one_folder = [storage for storage, _ in self.streamed] == ["folder"]  # whose names differ
        return iter if one_folder else EachOnce(version_in)

    def _noted(self, row: dict) -> tuple:
        self.images.append(identity(row))
        return _told_by(row)

    def _open(self, shard: Shard, start: int) -> tuple[int, Iterator[dict]]:
        """(number of the first row, rows) of what a shard belongs to, from row `start` or an earlier one."""
        if shard.storage == "rows":
            return 0, self.stream()
        first = start if shard.storage == "parquet" else 0
        return first, rows_of(shard.storage, shard.place, self.options, first)

    def _label(self, place: str) -> str:
        """The name of a tar or Parquet file, or the path of one that shares its name with another."""
        name = os.path.basename(place)
        return name if self.count_of_name[name] == 1 else place

    def _row_of_file(self, row: dict, number: int, shard: Shard) -> dict:
        base = os.path.basename(shard.place)
        row["name"] = shard.label + row["name"].removeprefix(base) if row["name"].startswith(base) else row["name"]
        row = self._versioned(row, self.named[shard.storage, shard.place])
        return row | {"key": f"{shard.label}#{number}"} if shard.storage == "parquet" else row

    def _versioned(self, row: dict, source: str) -> dict:
        """The row with its source, and the version of its image: a digest of its content, or size and time of its file."""
        image, version = row["image"], content_of(row)
        if version is None:
            place = image["path"] if isinstance(image, dict) else image
            try:
                version = self._listed(place) if is_remote(place) else version_of(place)
            except (OSError, TypeError):  # captioning it says what is wrong
                version = ""
        return row | {"source": source, "version": version + asked_in(row)}

    def _listed(self, place: str) -> str:
        """The version of an image at an address: folders are listed, which costs less than asking for each image."""
        folder, _, name = place.rpartition("/")
        if folder not in self.listings:
            with reaching(folder, FileNotFoundError):
                system, path = file_system(folder)
                listing = system.ls(path, detail=True)
            self.listings[folder] = {info["name"].rpartition("/")[2]: tag_of(info) for info in listing}
        return self.listings[folder].get(name, "")


def identity(row: dict) -> int:
    """What stands for a row and the version of its image."""
    return short(row["key"], row["version"])


def _keyed(row: dict) -> dict:
    return {"key": row["name"]} | row


def _whole_path(path: str) -> str:
    return os.path.realpath(path) if os.path.exists(path) else path


def version_in(row: dict) -> str:
    return row["version"]


def _told_by(row: dict) -> tuple:
    return row["name"], row["columns"], row["version"]


def _content(piece: tuple[str, str]):
    """(Parquet metadata or None, version) of a tar or a Parquet file; None for others, also a Parquet file of paths. A broken file has
    no metadata, and is one shard, whose rows report what is wrong with it."""
    storage, place = piece
    if storage not in ("tar", "parquet"):
        return None
    try:
        version = version_of(place)
        if storage == "tar":
            return None, version
        with open_binary(place) as file:
            metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return None, place
    return (metadata, version) if "binary" in str(metadata.schema.to_arrow_schema().types) else None

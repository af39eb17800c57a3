"""What infer.py's paths name, cut into shards."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from captioning.sources import pieces, rows_of, unique
from common.errors import DataError
from common.remote import file_system, is_remote, open_remote, reaching
from data.rows import Options
from jobs.shards import Cursor, Digest, Shard, digest_of, group_starts, parquet_ranges, tag_of, version_of


def short(*words: str) -> bytes:
    """A stand-in for words, so that those of a million rows fit in little memory."""
    return xxhash.xxh3_128_digest("\n".join(words).encode("utf-8", "surrogateescape"))[:12]


class ImageSource:
    """What infer.py's paths name, as shards, and the rows of each: those of captioning.sources with a `key` that no other
    row of the source has, the `source` (the path that named it), and the `version` of its image, which differs when the
    image does.

    Lists, folders and Parquet files of paths are one stream of rows; tars and Parquet files that hold images are read each
    on its own.
    """

    def __init__(self, paths: list[str], options: Options):
        self.options, self.folders = options, {}
        self.named = {
            piece: os.path.realpath(p) if os.path.exists(p) else p for p in paths for piece in pieces([p], options)
        }
        files = [piece for piece in self.named if piece[0] in ("tar", "parquet")]
        with ThreadPoolExecutor(16) as pool:
            contents = dict(zip(files, pool.map(_content, files), strict=True))
        self.files = {piece: content for piece, content in contents.items() if content is not None}
        self.loose = [piece for piece in self.named if piece not in self.files]
        self.labels, self.listed = self._labels(), {}
        self.place, self.cursor = None, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"place": None, "cursor": None, "folders": {}, "listed": {}}  # a worker has its own

    def shards(self, size: int) -> list[Shard]:
        """All shards in the order of the source, of `size` rows, except tars, which are one each. Lists and folders are
        scanned once, tars are not opened. `listed` then has the identities of the rows of each shard that was scanned."""
        planned, seen, first = [], self._seen(), 0
        for piece, group in itertools.groupby(self.named, key=lambda piece: piece if piece in self.files else None):
            if piece is None:
                for ids, digest in _counted(self._rows_of(group, seen), size):
                    self.listed[len(planned)] = ids
                    planned.append(Shard(len(planned), "rows", "", "images", first, first + len(ids), len(ids), digest))
                    first += len(ids)
                continue
            metadata, version = self.files[piece]
            ranges = parquet_ranges(metadata, size, version) if metadata else [(0, None, digest_of(version))]
            for start, stop, digest in ranges:
                rows = stop and stop - start
                planned.append(Shard(len(planned), *piece, self.labels[piece[1]], start, stop, rows, digest))
        return planned

    def rows(self, shard: Shard) -> Iterator[dict]:
        """The rows of a shard: {"key", "name", "image", "columns", "relative", "source", "version"}.

        Raises:
            DataError: the file is broken, or the list or folder has changed since `shards` scanned it.
        """
        if self.place != shard.place:
            self.place, self.cursor = shard.place, Cursor(lambda start: self._open(shard, start))
        rows = self.cursor.read(shard.start, shard.stop)
        if shard.kind != "rows":
            numbered = (self._named(row, number, shard) for number, row in enumerate(rows, shard.start))
            yield from map(self._versioned, unique(numbered, {}))
            return
        digest = Digest()
        for row in rows:
            digest.add(row["name"], row["columns"], row["version"])
            yield row
        if str(digest) != shard.digest:
            raise DataError(f"{shard}: the source has changed while this was running. Start the same command again")

    def first(self, limit: int) -> Iterator[dict]:
        """The first rows that are not in tars or Parquet files."""
        return itertools.islice(self.stream(), limit)

    def stream(self) -> Iterator[dict]:
        """All rows that are not in tars or Parquet files."""
        return self._rows_of(self.loose, self._seen())

    def _rows_of(self, loose, seen: dict | None) -> Iterator[dict]:
        rows = (row | {"source": self.named[piece]} for piece in loose for row in rows_of(*piece, self.options))
        for row in unique(rows, seen):
            yield self._versioned(row)

    def _open(self, shard: Shard, start: int) -> tuple[int, Iterator[dict]]:
        """(number of the first row, rows) of what a shard belongs to, from the row group that holds row `start`."""
        if shard.kind == "rows":
            return 0, self.stream()
        metadata, _ = self.files[shard.kind, shard.place]
        first = max((first for _, first in group_starts(metadata) if first <= start), default=0) if metadata else 0
        return first, rows_of(shard.kind, shard.place, self.options, first)

    def _named(self, row: dict, number: int, shard: Shard) -> dict:
        base = os.path.basename(shard.place)
        name = shard.label + row["name"][len(base) :] if row["name"].startswith(base) else row["name"]
        key = {"key": f"{shard.label}#{number}"} if shard.kind == "parquet" else {}
        return row | key | {"name": name, "source": self.named[shard.kind, shard.place]}

    def _versioned(self, row: dict) -> dict:
        """The row with its key, and the version of its image: size and time of a file, or a digest of what is not one."""
        image, row = row["image"], {"key": row["name"]} | row
        if isinstance(image, dict) and image.get("bytes") is not None:
            return row | {"version": xxhash.xxh3_64_hexdigest(image["bytes"])}
        place = image["path"] if isinstance(image, dict) else image
        try:
            return row | {"version": self._listed(place) if is_remote(place) else version_of(place)}
        except (OSError, TypeError):  # captioning it says what is wrong
            return row | {"version": ""}

    def _listed(self, place: str) -> str:
        """The version of an image at an address: folders are listed, which costs less than asking for each image."""
        folder, _, name = place.rpartition("/")
        if folder not in self.folders:
            with reaching(folder, FileNotFoundError):
                system, path = file_system(folder)
                found = system.ls(path, detail=True)
            self.folders[folder] = {info["name"].rpartition("/")[2]: tag_of(info) for info in found}
        return self.folders[folder].get(name, "")

    def _seen(self) -> dict | None:
        return None if [kind for kind, _ in self.loose] == ["folder"] else {}  # in one folder, all names differ

    def _labels(self) -> dict[str, str]:
        """The names of tars and Parquet files, and the paths of those that share a name with another."""
        count = Counter(os.path.basename(place) for _, place in self.files)
        return {
            place: place if count[os.path.basename(place)] > 1 else os.path.basename(place) for _, place in self.files
        }


def _content(piece: tuple[str, str]):
    """(Parquet metadata or None, version) of a file; None for a Parquet file of paths, which is a list. A broken file has
    no metadata, and is one shard, whose rows report what is wrong with it."""
    kind, place = piece
    try:
        version = version_of(place)
        if kind == "tar":
            return None, version
        with open_remote(place) if is_remote(place) else open(place, "rb") as file:
            metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return None, place
    return (metadata, version) if "binary" in str(metadata.schema.to_arrow_schema().types) else None


def _counted(rows: Iterator[dict], size: int) -> Iterator[tuple[list[bytes], str]]:
    """(identities, digest) of every `size` rows."""
    while True:
        digest, ids = Digest(), []
        for row in itertools.islice(rows, size):
            digest.add(row["name"], row["columns"], row["version"])
            ids.append(short(row["key"], row["version"]))
        if not ids:
            return
        yield ids, str(digest)

"""What infer.py's paths name, cut into shards."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from captioning.sources import pieces, rows_of, unique
from common.errors import DataError
from common.remote import file_system, is_remote, open_remote
from data.rows import Options
from jobs.shards import Cursor, Digest, Shard, digest_of, parquet_ranges


class ImageSource:
    """What infer.py's paths name, as shards, and the rows of each: those of captioning.sources with a `key` that no other
    row of the source has."""

    def __init__(self, paths: list[str], options: Options):
        self.options = options
        self.pieces = list(pieces(paths, options))
        self.loose = [piece for piece in self.pieces if piece[0] in ("folder", "rows")]
        self.cursor = Cursor(lambda start: (0, self._stream()))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"cursor": None}  # a worker process opens its own

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.cursor = Cursor(lambda start: (0, self._stream()))

    def shards(self, size: int) -> list[Shard]:
        """All shards in the order of the source, of `size` rows, except tars, which are one each. Lists and folders are
        scanned once, tars are not opened."""
        files = list(dict.fromkeys(piece for piece in self.pieces if piece not in self.loose))
        with ThreadPoolExecutor(16) as pool:
            ranges = dict(zip(files, pool.map(partial(self._ranges, size), files), strict=True))
        labels = self._labels()
        found, seen, first = [], self._seen(), 0
        for loose, group in itertools.groupby(self.pieces, key=lambda piece: piece in self.loose):
            if loose:
                rows = unique((row for piece in group for row in rows_of(*piece, self.options)), seen)
                for count, digest in _counted(rows, size):
                    found.append(Shard(len(found), "rows", "", "images", first, first + count, count, digest))
                    first += count
                continue
            for kind, place in group:
                for start, stop, rows, digest in ranges.pop((kind, place), ()):
                    found.append(Shard(len(found), kind, place, labels[place], start, stop, rows, digest))
        return found

    def rows(self, shard: Shard) -> Iterator[dict]:
        """The rows of a shard: {"key", "name", "image", "columns", "relative"}.

        Raises:
            DataError: the file is broken, or the list or folder has changed since `shards` scanned it.
        """
        if shard.kind == "rows":
            digest = Digest()
            for row in self.cursor.read(shard.start, shard.stop):
                digest.add(row["name"], row["columns"])
                yield row | {"key": row["name"]}
            if str(digest) != shard.digest:
                raise DataError(f"{shard}: the source has changed while this was running. Start the same command again")
            return
        base = os.path.basename(shard.place)
        rows = rows_of(shard.kind, shard.place, self.options, shard.start, shard.stop)
        yield from unique((self._named(row, number, shard, base) for number, row in enumerate(rows, shard.start)), {})

    def _named(self, row: dict, number: int, shard: Shard, base: str) -> dict:
        if row["name"].startswith(base):
            row["name"] = shard.label + row["name"][len(base) :]
        return row | {"key": row["name"] if shard.kind == "tar" else f"{shard.label}#{number}"}

    def first(self, limit: int) -> Iterator[dict]:
        """The first rows that are not in tars or Parquet files."""
        return itertools.islice(self._stream(), limit)

    def _stream(self) -> Iterator[dict]:
        rows = (row for piece in self.loose for row in rows_of(*piece, self.options))
        return unique(rows, self._seen())

    def _seen(self) -> dict | None:
        return (
            None if [kind for kind, _ in self.loose] == ["folder"] else {}
        )  # in one folder, no two names are the same

    def _labels(self) -> dict[str, str]:
        """The names of tars and Parquet files, and the paths of those that share a name with another."""
        places = {place for piece in self.pieces if piece not in self.loose for place in piece[1:]}
        count = Counter(map(os.path.basename, places))
        return {place: place if count[os.path.basename(place)] > 1 else os.path.basename(place) for place in places}

    def _ranges(self, size: int, piece: tuple[str, str]) -> list[tuple[int, int | None, int | None, str]]:
        """(first row, one past the last, rows, digest) of each shard of a file. A broken file is one shard, whose rows
        report what is wrong with it."""
        kind, place = piece
        try:
            version = _version(place)
            if kind == "tar":
                return [(0, None, None, digest_of(version))]
            with open_remote(place) if is_remote(place) else open(place, "rb") as file:
                return list(parquet_ranges(pq.read_metadata(file), size))
        except (OSError, pa.ArrowException):
            return [(0, None, None, digest_of(place))]


def _version(place: str) -> list:
    """What changes when a file does, but not when it is copied elsewhere: its size, and both of its ends, since tars are
    padded to whole blocks."""
    if not is_remote(place):
        with open(place, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            ends = [file.read(2**16) for start in (0, max(0, size - 2**16)) if file.seek(start) == start]
        return [size, *map(xxhash.xxh3_64_hexdigest, ends)]
    system, path = file_system(place)
    info = system.info(path)
    return [info.get("size"), info.get("ETag") or info.get("etag")]


def _counted(rows: Iterator[dict], size: int) -> Iterator[tuple[int, str]]:
    """(rows, digest) for every `size` rows."""
    while True:
        digest, count = Digest(), 0
        for row in itertools.islice(rows, size):
            digest.add(row["name"], row["columns"])
            count += 1
        if not count:
            return
        yield count, str(digest)

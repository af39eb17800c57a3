"""Shards: the units of work, and the folder where the output of each appears, complete or not at all.

A shard is a tar, or a number of rows of a Parquet file, a folder, a list or another source. Its output is a file of its own, whose name identifies what was in the shard; a run resumes from these files alone.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from common import files
from common.errors import UserError
from common.locks import Busy, hold
from common.remote import file_system, is_remote, reaching, tag_of, whole_at

logger = logging.getLogger(__name__)
FILE = re.compile(r"\d{5,}-([0-9a-f]{20})\.parquet")
SETTINGS, REPORT, FAILED = "_settings.json", "_report.json", "_failed-"
NAMES = {"model", "revision"}  # settings that may differ if those that they stand for, the `weights`, are the same
DAMAGED = (json.JSONDecodeError, UnicodeDecodeError)
FOOTER = b"image_captioning"  # key of a shard's counts in its file's metadata


@dataclass(frozen=True)
class Shard:
    """Rows that are worked on together."""

    position: int  # in the order of the source
    storage: str  # "tar", "parquet" or "rows"
    place: str  # path or address; empty for rows
    label: str  # what its images are named after: the file's name, or its path where several have that name
    start: int  # first row, counted from the beginning of the file, or of all rows of their storage
    stop: int | None  # one past the last row; None for all
    rows: int | None  # how many, if known
    digest: str  # 8 hex digits of what is in it

    @property
    def id(self) -> str:
        """12 hex digits that stay the same when the source grows."""
        return xxhash.xxh3_64_hexdigest(f"{self.storage}\n{self.label}\n{self.start}".encode())[:12]

    @property
    def key(self) -> str:
        """20 hex digits that stay the same as long as what is in it does."""
        return self.id + self.digest

    @property
    def file(self) -> str:
        return f"{self.position:05d}-{self.key}.parquet"

    @property
    def mark(self) -> str:
        """The file that says that it was given up."""
        return f"{FAILED}{self.key}.json"

    def __str__(self) -> str:
        return self.label if self.stop is None else f"{self.label}, rows {self.start} to {self.stop}"


def rows_of(shards: list[Shard]) -> int | None:
    """How many rows shards have together, if known."""
    rows = [shard.rows for shard in shards]
    return None if None in rows else sum(rows)


def digest_of(*values) -> str:
    """8 hex digits of values that JSON can hold, or that str() tells apart."""
    text = json.dumps(values, default=str, ensure_ascii=False)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "backslashreplace"))[:8]


def differences(before: dict, now: dict) -> dict[str, str]:
    """{name: in words} of the settings that are not as they were."""
    names = [name for name in now if now[name] != before.get(name)]
    return {name: f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in names}


def row_ranges(rows: Iterator, size: int, first: int = 0) -> Iterator[tuple[int, int, str]]:
    """(first row, one past the last, digest) of every `size` rows, of which each is what tells it from others; `first` is
    the number of the first one."""
    while group := list(itertools.islice(rows, size)):
        yield first, first + len(group), digest_of(*group)
        first += len(group)


class Cursor:
    """A stream of rows that is read forwards, piece by piece, and reopened for a piece further back.

    Args:
        open_at: called with a row's number; returns (number of the first row, rows), from that row or one before it.
    """

    def __init__(self, open_at: Callable[[int], tuple[int, Iterator]]):
        self.open_at, self.position, self.stream = open_at, 0, None

    def read(self, start: int, stop: int | None) -> Iterator:
        if self.stream is None or start < self.position:
            self.position, self.stream = self.open_at(start)
        stream, self.stream = self.stream, None  # a stream that fails has ended
        for row in itertools.islice(stream, stop and stop - self.position):
            self.position += 1
            if self.position > start:
                yield row
        self.stream = stream


def parquet_ranges(metadata, size: int, version: str) -> Iterator[tuple[int, int, str]]:
    """(first row, one past the last, digest) of at most `size` rows each. As few of them as possible begin within a row
    group, which has to be read from its beginning. `version` is the file's."""
    start = 0
    for end in itertools.accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)):
        if end - start >= size or end == metadata.num_rows:
            for row in range(start, end, size):
                yield row, min(row + size, end), digest_of(version, row, min(row + size, end))
            start = end


def version_of(place: str) -> str:
    """What changes when a file does, also at an address: there its size and tag. OSError if there is none."""
    if not is_remote(place):
        return files.version_of(place)
    system, path = file_system(place)
    return tag_of(system.info(path))


class ShardFolder:
    """The folder that outputs of shards appear in: a path, or an address.

    Args:
        output: the value of --output.
        single: whether that is a file, made from the shards at the end; they are then in OUTPUT.shards.
    """

    def __init__(self, output: str, single: bool):
        self.output, self.single = output.rstrip("/\\"), single
        self.name = f"{self.output}.shards" if single else self.output
        self.remote = is_remote(output)
        self.place = self.name if self.remote else str(Path(self.name).absolute())
        self.system, self.path = file_system(self.place)

    def size(self, default: int, share: tuple[int, int], rows: Iterator) -> int:
        """Rows per shard where none are given: those the run was started with, else `default`, or fewer so that each of
        the processes has a shard.

        Args:
            share: (number, count) of this process.
            rows: of the source; only as many are read as are needed to know.
        """
        if before := self.read_json(SETTINGS):
            return before["size"]
        count = share[1]
        if count == 1:
            return default
        return min(default, max(1, math.ceil(sum(1 for _ in itertools.islice(rows, default * count)) / count)))

    def begin(self, settings: dict, shards: list[Shard], size: int) -> None:
        """Record what the run is; `size` is that of its shards.

        Raises:
            UserError: it was started with other settings.
        """
        before = (self.read_json(SETTINGS) or {"settings": settings})["settings"]
        changes = differences(before, settings)
        if changes.keys() - NAMES or (changes and "weights" not in settings):
            raise UserError(
                f"{self.output} was started with other settings: {'; '.join(changes.values())}. Name another --output."
            )
        if not self.remote:
            os.makedirs(self.path, exist_ok=True)
        about = {"settings": settings, "size": size, "shards": len(shards), "rows": rows_of(shards)}
        self.write_json(SETTINGS, about | {"started": time.time(), "done_before": len(self.done(shards))})

    def check(self) -> None:
        """UserError where no run can write: the folder is missing, or holds other things."""
        if self.read_json(SETTINGS) is not None:
            return
        if not self.remote and not Path(self.path).parent.is_dir():
            raise UserError(f"--output {self.output}: its folder does not exist.")
        if self.single:
            output = self.path.removesuffix(".shards")
            is_empty = not self.remote and Path(output).is_dir() and not any(Path(output).iterdir())  # of tars, say
            is_taken = self.system.exists(output) and not is_empty
        else:
            is_taken = not self.remote and self.files()
        if is_taken:
            raise UserError(
                f"--output {self.output} exists already, and was not made by a run like this one. Name another."
            )

    def files(self) -> list[str]:
        """Names of all files in the folder, sorted."""
        self.system.invalidate_cache()
        try:
            with reaching(self.name, FileNotFoundError):
                places = self.system.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(place.rstrip("/").rpartition("/")[2] for place in places)

    def failed(self) -> dict[str, str]:
        """{name of its mark: error} of the shards that were given up."""
        marks = {name: self.read_json(name) for name in self.files() if name.startswith(FAILED)}
        return {name: mark["error"] for name, mark in marks.items() if mark}

    def outputs(self) -> dict[str, str]:
        """{key of a shard: name of its file} of all that are there."""
        return {match[1]: match[0] for match in filter(None, map(FILE.fullmatch, self.files()))}

    def done(self, shards: list[Shard]) -> dict[Shard, str]:
        """The file of each shard that has one."""
        outputs = self.outputs()
        return {shard: outputs[shard.key] for shard in shards if shard.key in outputs}

    def whole(self, name: str):
        """A context: a local path to write to; the file appears under `name` when the block ends without an error."""
        return whole_at(f"{self.place}/{name}")

    def open(self, name: str):
        return self.system.open(f"{self.path}/{name}")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), reaching(self.name, FileNotFoundError):
            self.system.rm_file(f"{self.path}/{name}")

    def write_json(self, name: str, value) -> None:
        with self.whole(name) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)

    def read_json(self, name: str):
        try:
            with reaching(self.name, FileNotFoundError, *DAMAGED), self.open(name) as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except DAMAGED:
            raise UserError(f"{self.name}/{name} is damaged. Delete {self.name} to start again.") from None

    def write(self, name: str, batches: Iterator[pa.Table], counts: Callable[[], dict]) -> None:
        """A shard's file; `counts()`, called when all batches are written, is kept in its footer."""
        with self.whole(name) as temporary:
            first = next(batches)
            with pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer:
                for table in itertools.chain([first], batches):
                    writer.write_table(table)
                writer.add_key_value_metadata({FOOTER: json.dumps(counts()).encode()})

    def read(self, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        try:
            with reaching(self.name, pa.ArrowException), self.open(name) as file:
                yield from pq.ParquetFile(file).iter_batches(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.name}/{name} is damaged ({str(error).splitlines()[0]}). Delete it, and the same command makes it again."
            ) from None

    def rows(self, name: str, columns: list[str] | None = None) -> Iterator[dict]:
        for batch in self.read(name, columns):
            yield from batch.to_pylist()

    def footers(self, names: list[str]) -> dict[str, tuple[pa.Schema, dict]]:
        """{name: (schema, counts)} of the files that are whole, in their order."""

        def footer(name):
            try:
                with reaching(self.name, pa.ArrowException, FileNotFoundError), self.open(name) as file:
                    metadata = pq.read_metadata(file)
            except (pa.ArrowException, FileNotFoundError):
                return None
            return metadata.schema.to_arrow_schema(), json.loads((metadata.metadata or {}).get(FOOTER, b"{}"))

        with ThreadPoolExecutor(16) as pool:
            return {name: content for name, content in zip(names, pool.map(footer, names), strict=True) if content}

    @contextlib.contextmanager
    def assembling(self, shards: list[Shard]):
        """{name: (schema, counts)} of the files of all shards, to make the output from; None if some are left, or if
        another process here is making it, as far as the file system has locks."""
        contents = self.whole_files(list(self.done(shards).values()))
        if len(contents) < len(shards):
            left = len(shards) - len(contents) - len(self.failed())
            text = "%d of %d shards are left, to other processes of this run or to the same command again"
            if left > 0:  # those that failed are said for themselves
                logger.info(text, left, len(shards))
            yield None
            return
        lock = Path(self.path) / "_lock"
        try:
            file = contextlib.nullcontext() if self.remote else hold(lock)[0]
        except Busy:
            yield None
            return
        with file:
            yield contents
        if not self.remote:
            lock.unlink(missing_ok=True)

    def whole_files(self, names: list[str]) -> dict[str, tuple[pa.Schema, dict]]:
        """`footers`, and the damaged files are removed, so that they are made again."""
        contents = self.footers(names)
        for name in set(names) - contents.keys():
            logger.warning("%s/%s is damaged, and is made again", self.name, name)
            self.remove(name)
        return contents


def reachable(folder: str, shard: Shard | None) -> bool:
    """Whether the servers that a shard is read from and written to answer; without a shard, that of the outputs."""
    for place in filter(is_remote, (folder, shard.place if shard else "")):
        system, path = file_system(place)
        system.invalidate_cache()
        try:
            system.info(path)
        except (FileNotFoundError, PermissionError):
            continue
        except Exception:
            return False
    return True

"""The output of infer.py: a Parquet file per shard, and at the end, made from them, what the output's name says.

Below, `name` is the value of --output (a path or an address) and `form` a key of captioning.writers.FORMATS.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from captioning import writers
from captioning.shards import ImageSource
from captioning.sources import source_files
from common.files import whole
from common.remote import is_remote, upload
from data.formats import webdataset
from jobs.shards import REPORT, Shard, ShardFolder

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)
OWN = (
    "key",
    "image",
    "caption",
    "error",
    "relative",
    "place",
    "columns",
)  # a source's columns with these names are renamed


def shard_folder(name: str, form: str) -> ShardFolder:
    """Where the shards' outputs are: in the output itself if that is a folder of Parquet files."""
    return ShardFolder(name, single=not (form == "parquet" and writers.is_folder(name, form)))


def short(key: str) -> bytes:
    """A stand-in for a key, so that a million of them fit in little memory."""
    return hashlib.blake2b(os.fsencode(key), digest_size=12).digest()


def write_shard(folder: ShardFolder, shard: Shard, rows: list[dict], seconds: float, settings: dict) -> dict:
    """Write a shard's rows, {"key", "image", columns ..., "caption" or "error"}; returns the counts of its footer."""
    errors = sum("error" in row for row in rows)
    counts = {"source": str(shard), "kind": shard.kind, "label": shard.label, "rows": len(rows), "errors": errors}
    counts |= {"seconds": round(seconds, 3), "finished": time.time(), "settings": settings}
    if folder.single:  # columns keep their types until the output is made from them
        rows = [
            {name: row[name] for name in ("key", "image", "caption", "error") if name in row}
            | {"columns": json.dumps({k: v for k, v in row.items() if k not in OWN}, ensure_ascii=False, default=str)}
            for row in rows
        ]
    schema = writers.schema_of(lambda: iter(rows), ("key", "image", "caption", "error"), nulls=True)
    folder.write(shard.file, iter([writers.table_of(rows, schema)]), lambda: counts)
    return counts


class Earlier:
    """Rows of outputs whose shards no longer match the source, since it grew; they are found by their key.

    Args:
        stale: names of their files.
    """

    def __init__(self, folder: ShardFolder, stale: list[str]):
        self.folder, self.stale, self.places = folder, stale, None

    def rows(self, keys: list[str]) -> dict[str, dict]:
        """{key: row} for those that are there, rows as `write_shard` takes them."""
        if self.places is None:
            self.places = {}
            for number, name in enumerate(self.stale):
                column = (key for batch in self.folder.read(name, ["key"]) for key in batch["key"].to_pylist())
                self.places.update({short(key): (number, row) for row, key in enumerate(column)})
        wanted: dict[int, set[int]] = {}
        for key in keys if self.places else ():
            if short(key) in self.places:
                number, row = self.places[short(key)]
                wanted.setdefault(number, set()).add(row)
        found = {}
        for number, numbers in wanted.items():
            for place, row in enumerate(rows_in(self.folder, self.stale[number])):
                if place in numbers:
                    found[row["key"]] = row
        return found


def rows_in(folder: ShardFolder, name: str) -> Iterator[dict]:
    """The rows of a shard's file, as `write_shard` took them."""
    for batch in folder.read(name):
        for row in batch.to_pylist():
            row = {column: value for column, value in row.items() if value is not None}
            columns = json.loads(row.pop("columns")) if folder.single else {}
            said = {column: row.pop(column) for column in ("caption", "error") if column in row}
            yield row | columns | said


def finish(folder: ShardFolder, shards: list[Shard], form: str, source: ImageSource, paths: list[str]) -> bool:
    """Make the output from the shards' files, if all are there; returns whether they are."""
    done = folder.done(shards)
    if len(done) < len(shards):
        left = len(shards) - len(done)
        logger.info("%d of %d shards are left; the same command resumes with them", left, len(shards))
        return False
    with _alone(folder) as free:
        if not free:  # another process sees the same, and is doing it
            return True
        names = [done[shard] for shard in shards]
        besides = _leave_out_what_is_replaced(folder, shards, names)
        if folder.single:
            _bring_together(folder, form, shards, names + besides, source, paths)
        else:
            _give_one_schema(folder, names + besides)
        counts = [counts for _, counts in folder.footers(names + besides)]
        total = {name: sum(each.get(name, 0) for each in counts) for name in ("rows", "errors", "seconds")}
        folder.write_json(
            REPORT, {"shards": len(counts), **total, "settings": counts[0].get("settings") if counts else {}}
        )
    logger.info(
        "%d captions in %s, %d images without one", total["rows"] - total["errors"], folder.output, total["errors"]
    )
    return True


@contextlib.contextmanager
def _alone(folder: ShardFolder):
    """Whether this is the only process here that is finishing the output."""
    if folder.remote or fcntl is None:
        yield True
        return
    with open(Path(folder.path) / "_lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    with contextlib.suppress(FileNotFoundError):
        os.unlink(Path(folder.path) / "_lock")


def _leave_out_what_is_replaced(folder: ShardFolder, shards: list[Shard], names: list[str]) -> list[str]:
    """Files of earlier shards that hold rows that no file of `names` has, reduced to those rows."""
    stale = stale_files(folder, shards)
    if not stale:
        return []
    present = {short(key) for name in names for batch in folder.read(name, ["key"]) for key in batch["key"].to_pylist()}
    labels = {(shard.kind, shard.label) for shard in shards if shard.kind != "rows"}
    kept = []
    for name, (schema, counts) in zip(stale, folder.footers(stale), strict=True):
        table = pa.Table.from_batches(folder.read(name), schema)
        left = [short(key) not in present for key in table["key"].to_pylist()]
        if (counts.get("kind"), counts.get("label")) in labels or not any(left):
            folder.remove(name)
            continue
        kept.append(name)
        if not all(left):
            table = table.filter(pa.array(left))
            errors = len(table) - table["error"].null_count
            folder.write(name, iter([table]), lambda c=counts, t=table, e=errors: c | {"rows": len(t), "errors": e})
    return kept


def stale_files(folder: ShardFolder, shards: list[Shard]) -> list[str]:
    """Files of shards that the source no longer has."""
    planned = {shard.id + shard.digest for shard in shards}
    return [name for key, name in folder.outputs().items() if key not in planned]


def _give_one_schema(folder: ShardFolder, names: list[str]) -> None:
    """Rewrite files whose columns or types differ from the common schema: readers take the first file's."""
    found = [
        (name, schema.remove_metadata(), counts)
        for name, (schema, counts) in zip(names, folder.footers(names), strict=True)
    ]
    schema = writers.common_schema([schema for _, schema, _ in found])
    for name, own, counts in found:
        if own != schema:
            rows = [row for batch in folder.read(name) for row in batch.to_pylist()]
            folder.write(name, iter([writers.table_of(rows, schema)]), lambda counts=counts: counts)


def _bring_together(folder: ShardFolder, form: str, shards, names: list[str], source, paths: list[str]) -> None:
    """Make one output of all shards, in their order."""
    output = folder.output
    several = len({piece for piece in source.pieces if piece[0] == "parquet"}) > 1

    def rows():
        found = (row for name in names for row in rows_in(folder, name))
        for row in _numbered(found, "image") if several else found:
            row.pop("key")
            yield row

    def images():
        found = (row for shard in shards for row in source.rows(shard))
        yield from _numbered(found, "name") if several else found

    writer = _writer(output, form, paths)
    if is_remote(output):
        with tempfile.TemporaryDirectory() as temporary:
            writer(rows, Path(temporary) / "output", images)
            upload(Path(temporary) / "output", output)
    elif form == "tar" and writers.is_folder(output, form):
        temporary = Path(f"{output}.new")
        shutil.rmtree(temporary, ignore_errors=True)
        writer(rows, temporary, images)
        shutil.rmtree(output, ignore_errors=True)
        temporary.replace(output)
    else:
        with whole(output) as temporary:
            writer(rows, temporary, images)


def _numbered(rows: Iterator[dict], column: str) -> Iterator[dict]:
    """Rows with a number appended to names that another file of the source also has."""
    seen = set()
    for row in rows:
        name, number = row[column], 1
        while short(row[column]) in seen:
            number += 1
            row[column] = f"{name}#{number}"
        seen.add(short(row[column]))
        yield row


def _writer(output: str, form: str, paths: list[str]):
    """The function of captioning.writers for a form of output."""
    if form == "metadata":
        return functools.partial(writers.write_metadata, folder=Path(output).parent, kind=os.path.splitext(output)[1])
    if form == "tar" and writers.is_folder(output, form):
        return functools.partial(writers.write_tars, tars=source_files(paths, webdataset.TARS))
    forms = {"jsonl": writers.write_jsonl, "csv": writers.write_csv, "parquet": writers.write_parquet}
    return (forms | {"coco": writers.write_coco, "tar": writers.write_tar})[form]

"""The output of infer.py: a Parquet file per shard, and at the end, made from them, what the output's name says.

Below, `name` is the value of --output (a path or an address) and `form` a key of captioning.writers.FORMATS.
"""

import contextlib
import functools
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
from captioning.shards import ImageSource, short
from captioning.sources import source_files
from common.existence import exists, may_be_on_hub
from common.files import whole
from common.locks import Busy, hold
from common.remote import is_remote, upload
from data.formats import webdataset
from jobs.progress import say_left
from jobs.shards import REPORT, Shard, ShardFolder

logger = logging.getLogger(__name__)
TEXTS = ("key", "image", "version", "caption", "error")
OWN = (*TEXTS, "relative", "place", "columns")  # a source's columns with these names are renamed


def shard_folder(name: str, form: str) -> ShardFolder:
    """Where the shards' outputs are: in the output itself if that is a folder of Parquet files."""
    return ShardFolder(name, single=not (form == "parquet" and writers.is_folder(name, form)))


def row_of(row: dict, outcome: dict) -> dict:
    """A row of a shard's output: {"key", "image", "version", columns ..., "caption" or "error"}, of a source's row and its
    {"caption"} or {"error"}."""
    columns = {f"source_{name}" if name in OWN else name: value for name, value in row["columns"].items()}
    return {"key": row["key"], "image": row["name"], "version": row["version"]} | columns | outcome


def write_shard(
    folder: ShardFolder, shard: Shard, rows: list[dict], seconds: float, settings: dict, sources=(), cut: int = 0
) -> dict:
    """Write a shard's rows, as `row_of` makes them; returns the counts of its footer. `sources` are the paths that named
    its images; `cut` is how many captions ended at max_new_tokens."""
    errors = sum("error" in row for row in rows)
    counts = {"source": str(shard), "rows": len(rows), "errors": errors, "cut": cut, "sources": sorted(sources)}
    counts |= {"seconds": round(seconds, 3), "finished": time.time(), "settings": settings}
    if folder.single:  # columns keep their types until the output is made from them
        rows = [
            {name: row[name] for name in TEXTS if name in row}
            | {"columns": json.dumps({k: v for k, v in row.items() if k not in OWN}, ensure_ascii=False, default=str)}
            for row in rows
        ]
    schema = writers.schema_of(lambda: iter(rows), ("key", "image", "caption", "error"), nulls=True)
    folder.write(shard.file, iter([writers.table_of(rows, schema)]), lambda: counts)
    return counts


class Earlier:
    """Captions in outputs whose shards no longer match the source, since it changed, of images that are the same.

    Args:
        stale: names of their files.
    """

    def __init__(self, folder: ShardFolder, stale: list[str]):
        self.folder, self.stale = folder, stale

    @functools.cached_property
    def places(self) -> dict[bytes, tuple[str, int]]:
        """{identity: (file, row)} of each image, its identity made of key and version."""
        return {
            short(key, version): (name, number)
            for name in self.stale
            for number, (key, version) in enumerate(_columns(self.folder, name, "key", "version"))
        }

    def count(self, listed: dict[int, list[bytes]], shards: list[Shard]) -> int:
        """How many images of the shards have a caption here; `listed` has the identities of each shard's images."""
        if not self.stale:
            return 0
        return sum(identity in self.places for shard in shards for identity in listed.get(shard.position, ()))

    def outcomes(self, rows: list[dict]) -> dict[str, dict]:
        """{key: {"caption"} or {"error"}} of the source's rows that have one here."""
        files: dict[str, set[int]] = {}
        for row in rows if self.stale else ():
            if place := self.places.get(short(row["key"], row["version"])):
                files.setdefault(place[0], set()).add(place[1])
        earlier = ((files[name], row) for name in files for row in enumerate(rows_in(self.folder, name)))
        return {
            row["key"]: {name: row[name] for name in ("caption", "error") if name in row}
            for numbers, (number, row) in earlier
            if number in numbers
        }


def _columns(folder: ShardFolder, name: str, *columns: str) -> Iterator[tuple]:
    for batch in folder.read(name, list(columns)):
        yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)


def rows_in(folder: ShardFolder, name: str) -> Iterator[dict]:
    """The rows of a shard's file, as `write_shard` took them."""
    for batch in folder.read(name):
        for row in batch.to_pylist():
            row = {column: value for column, value in row.items() if value is not None}
            columns = json.loads(row.pop("columns")) if folder.single else {}
            outcome = {column: row.pop(column) for column in ("caption", "error") if column in row}
            yield row | columns | outcome


def finish(folder: ShardFolder, shards: list[Shard], form: str, source: ImageSource, paths: list[str]) -> bool:
    """Make the output from the shards' files, if all are there; returns whether they are."""
    contents = folder.whole_files(list(folder.done(shards).values()))
    if len(contents) < len(shards):
        say_left(len(shards) - len(contents), len(shards))
        return False
    with _alone(folder) as alone:
        if not alone:  # another process sees the same, and is doing it
            return True
        others = _keep_other_sources(folder, stale_files(folder, shards), list(contents), paths)
        contents |= others if form != "tar" else {}  # which would need their images
        if folder.single:
            _bring_together(folder, form, shards, list(contents), source, paths)
        else:
            _give_one_schema(folder, contents)
        counts = [counts for _, counts in contents.values()]
        total = {name: sum(shard.get(name, 0) for shard in counts) for name in ("rows", "errors", "cut", "seconds")}
        settings = counts[0].get("settings") if counts else {}
        folder.write_json(REPORT, {"shards": len(counts), **total, "settings": settings})
    captions = total["rows"] - total["errors"]
    logger.info("%d captions in %s, %d images without one", captions, folder.output, total["errors"])
    if total["cut"]:
        most = settings.get("max_new_tokens")
        logger.info("%d of %d captions were cut at max_new_tokens, %s", total["cut"], captions, most)
    return True


@contextlib.contextmanager
def _alone(folder: ShardFolder):
    """Whether this is the only process here that is finishing the output, as far as the file system has locks."""
    if folder.remote:
        yield True
        return
    lock = Path(folder.path) / "_lock"
    try:
        file, _ = hold(lock)
    except Busy:
        yield False
        return
    with file:
        yield True
    lock.unlink(missing_ok=True)


def stale_files(folder: ShardFolder, shards: list[Shard]) -> list[str]:
    """Files of shards that the source no longer has; damaged ones are removed."""
    planned = {shard.id + shard.digest for shard in shards}
    return list(folder.whole_files([name for key, name in folder.outputs().items() if key not in planned]))


def _keep_other_sources(folder: ShardFolder, stale: list[str], names: list[str], paths: list[str]) -> dict:
    """{name: (schema, counts)} of the stale files with rows of other sources than `paths`, reduced to the rows that no
    file of `names` has. What left a source leaves the output: files of sources that are named again, or gone, go."""
    if not stale:
        return {}
    here = {os.path.realpath(path) for path in paths} | set(paths)
    present = {short(key) for name in names for (key,) in _columns(folder, name, "key")}
    kept = []
    for name, (schema, counts) in folder.footers(stale).items():
        table = pa.Table.from_batches(folder.read(name), schema)
        table = table.filter(pa.array([short(key) not in present for key in table["key"].to_pylist()], pa.bool_()))
        others = [
            path for path in counts.get("sources", ()) if path not in here and (exists(path) or may_be_on_hub(path))
        ]
        if not others or not len(table):
            folder.remove(name)
            continue
        counts |= {"rows": len(table), "errors": len(table) - table["error"].null_count}
        folder.write(name, iter([table]), functools.partial(dict, counts))
        kept.append(name)
    return folder.footers(kept)


def _give_one_schema(folder: ShardFolder, contents: dict) -> None:
    """Rewrite files whose columns or types differ from the common schema: readers take the first file's."""
    schemas = {name: schema.remove_metadata() for name, (schema, _) in contents.items()}
    schema = writers.common_schema(list(schemas.values()))
    for name in (name for name, own in schemas.items() if own != schema):
        rows = [row for batch in folder.read(name) for row in batch.to_pylist()]
        folder.write(name, iter([writers.table_of(rows, schema)]), functools.partial(dict, contents[name][1]))


def _bring_together(folder: ShardFolder, form: str, shards, names: list[str], source, paths: list[str]) -> None:
    """Make one output of all shards, in their order."""
    output = folder.output
    repeated = len(shards) > 1 and any(shard.kind == "parquet" for shard in shards)  # what two files or shards may name

    def rows():
        found = (row for name in names for row in rows_in(folder, name))
        for row in _each_once(found, "image") if repeated else found:
            row.pop("key"), row.pop("version", None)
            yield row

    def images():
        found = (row for shard in shards for row in source.rows(shard))
        return _each_once(found, "name") if repeated else found

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


def _each_once(rows: Iterator[dict], column: str) -> Iterator[dict]:
    """The rows of different images, with a number appended to names that another one of them has."""
    seen, different = set(), writers.Different(short)
    for row in rows:
        image = short(row[column], row.get("version", row["key"]))
        if image not in seen:
            seen.add(image)
            name = row[column]
            yield row | {column: different(name, lambda number, name=name: f"{name}#{number}")}


def _writer(output: str, form: str, paths: list[str]):
    """The function of captioning.writers for a form of output."""
    if form == "metadata":
        return functools.partial(writers.write_metadata, folder=Path(output).parent, ending=os.path.splitext(output)[1])
    if form == "tar" and writers.is_folder(output, form):
        return functools.partial(writers.write_tars, tars=tars_of(paths))
    forms = {"jsonl": writers.write_jsonl, "csv": writers.write_csv, "parquet": writers.write_parquet}
    return (forms | {"coco": writers.write_coco, "tar": writers.write_tar})[form]


def tars_of(paths: list[str]) -> list[str]:
    """The tars of a source whose copies have captions. DataError if two have one name, or a path is something else."""
    return writers.check_tars(source_files(paths, webdataset.TARS))


def check_names(output: str, form: str, source: ImageSource, paths: list[str]) -> None:
    """DataError, before anything is captioned, where a form of output has no name for an image."""
    if form == "metadata":
        writers.check_folder(output)
        for row in source.stream():
            writers.check_below(row, Path(output).parent)
    elif form == "tar" and writers.is_folder(output, form):
        tars_of(paths)

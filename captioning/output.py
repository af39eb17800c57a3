"""The output of infer.py: a Parquet file per shard, and at the end, made from them, what the output's name says.

Below, `form` is what captioning.writers.form_of returns.
"""

import functools
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from captioning import writers
from captioning.again import OUTCOME, list_flagged
from captioning.names import EachOnce, short
from captioning.server import say_cost
from captioning.shards import ImageSource, identity
from common.errors import DataError
from common.existence import exists
from common.remote import whole_at
from common.text import counted
from jobs.journal import ANSWERS
from jobs.progress import total_of
from jobs.shards import REPORT, Shard, ShardFolder
from jobs.tables import common_schema, schema_of, table_of

logger = logging.getLogger(__name__)
OWN = ("key", "image", "version", "caption", "error", "columns")  # a source's columns with these names are renamed


def shard_folder(output: str, form: str) -> ShardFolder:
    """Where the shards' outputs are: in the output itself if that is a folder of Parquet files."""
    return ShardFolder(output, single=form != "parquets")


def check_names(output: str, form: str, source: ImageSource) -> None:
    """DataError, before anything is captioned, where a form of output has no name for an image."""
    if form == "metadata":
        writers.check_metadata(output, source.stream())
    if form == "tars":
        for storage, place in source.named:
            if storage != "tar":
                raise DataError(f"{place}: is not a tar file, and --output_format tar writes copies of tars")
        writers.check_tars([place for _, place in source.named])


# ---------------------------------------------------------------- shards


def row_of(folder: ShardFolder, row: dict, outcome: dict, several: bool = False) -> dict:
    """A row of a shard's output: {"key", "image", "version", columns ..., "caption" or "error"}, of a source's row and its
    {"caption"}, {"captions"} (`several`) or {"error"}. Where the output is one file, columns are JSON, and keep their types
    until it is made."""
    own = (*OWN, "captions") if several else OWN
    columns = {f"source_{name}" if name in own else name: value for name, value in row["columns"].items()}
    if folder.single:
        columns = {"columns": json.dumps(columns, ensure_ascii=False, default=str)}
    own = {"key": row["key"], "image": row["name"], "version": row["version"]} | columns
    return own | {name: value for name, value in outcome.items() if name != "cut"}


def several_in(settings: dict) -> bool:
    """Whether images have several captions."""
    return settings.get("num_return_sequences", 1) > 1


def write_shard(
    folder: ShardFolder, shard: Shard, rows: list[dict], seconds: float, settings: dict, sources=(), counted=()
) -> dict:
    """Write a shard's rows, as `row_of` makes them; returns the counts of its footer. `sources` are the paths that named
    its images; `counted` is what the captioner counted."""
    errors = sum("error" in row for row in rows)
    counts = {"source": str(shard), "rows": len(rows), "errors": errors, "sources": sorted(sources)} | dict(counted)
    counts |= {"seconds": round(seconds, 3), "finished": time.time(), "settings": settings}
    several = several_in(settings)
    text = ("key", "image", "error") if several else ("key", "image", "caption", "error")
    schema = schema_of(lambda: iter(rows), text, nulls=True)
    if several:  # also of a shard with errors only
        place = schema.get_field_index("captions")
        lists = pa.field("captions", pa.list_(pa.string()))
        schema = schema.append(lists) if place < 0 else schema.set(place, lists)
    folder.write(shard.file, iter([table_of(rows, schema)]), lambda: counts)
    return counts


class Earlier:
    """Captions in outputs whose shards no longer match the source, since it changed, of images that are the same."""

    def __init__(self, folder: ShardFolder, shards: list[Shard]):
        self.folder, self.files = folder, stale_files(folder, shards)

    @functools.cached_property
    def captions(self) -> dict[int, dict]:
        """{identity of an image: its "caption", or "captions"}."""
        found = {}
        for name, (schema, _) in self.folder.footers(self.files).items():
            column = "caption" if "caption" in schema.names else "captions"
            rows = self.folder.rows(name, ["key", "version", column])
            found |= {identity(row): {column: row[column]} for row in rows if row[column] is not None}
        return found

    def of(self, row: dict) -> dict | None:
        """{"caption"} or {"captions"} of a source's row that has some here."""
        return self.captions.get(identity(row))

    def count(self, source: ImageSource, shards: list[Shard]) -> int:
        """How many images of the shards have a caption here."""
        streamed = (source.images[shard.start : shard.stop] for shard in shards if shard.storage == "rows")
        return sum(image in self.captions for image in itertools.chain.from_iterable(streamed))


def stale_files(folder: ShardFolder, shards: list[Shard]) -> list[str]:
    """Files of shards that the source no longer has; damaged ones are removed."""
    planned = {shard.key for shard in shards}
    return list(folder.whole_files([name for key, name in folder.outputs().items() if key not in planned]))


# ---------------------------------------------------------------- the output of all shards


def finish(
    folder: ShardFolder, shards: list[Shard], form: str, source: ImageSource, paths: list[str], prices=(None, None)
) -> bool:
    """Make the output from the shards' files, if all are there; returns whether they are. `prices` are those of a million
    tokens, of prompts and written."""
    with folder.assembling(shards) as contents:
        if contents is None:
            return False
        others = _keep_other_sources(folder, stale_files(folder, shards), list(contents), paths)
        contents |= others if form not in ("tar", "tars") else {}  # which would need their images
        if folder.single:
            _write_output(folder, form, shards, list(contents), source)
        else:
            _give_one_schema(folder, contents)
        counts = [counts for _, counts in contents.values()]
        total = total_of(counts, ("rows", "errors", "cut", "seconds", "tokens_in", "tokens_out"))
        settings = next(iter(counts), {}).get("settings", {})
        again = [earlier for of_shard in counts for earlier in of_shard.get("again", ())]
        folder.write_json(REPORT, {**total, "settings": settings} | ({"again": again} if again else {}))
        list_flagged(folder, contents)
        if not folder.remote:
            shutil.rmtree(Path(folder.path) / ANSWERS, ignore_errors=True)  # of shards that the source no longer has
    captions = total["rows"] - total["errors"]
    without = f", {counted(total['errors'], 'images')} without one" if total["errors"] else ""
    logger.info("%s in %s%s", counted(captions, "captions"), folder.output, without)
    if total["cut"]:
        where = f"at max_new_tokens, {settings.get('max_new_tokens')}"
        where = "by the server (finish_reason length)" if "server" in settings else where
        logger.info("%d of %d captions were cut %s", total["cut"], captions, where)
    say_cost(total["tokens_in"], total["tokens_out"], prices, "all captions of the output, kept ones too: ")
    return True


def _keep_other_sources(folder: ShardFolder, stale: list[str], names: list[str], paths: list[str]) -> dict:
    """{name: (schema, counts)} of the stale files with rows of other sources than `paths`, reduced to the rows that no
    file of `names` has. What left a source leaves the output: files of sources that are named again, or gone, go."""
    named, kept = {*paths, *map(os.path.realpath, paths)}, []
    present = {short(row["key"]) for name in (names if stale else ()) for row in folder.rows(name, ["key"])}
    for name, (schema, counts) in folder.footers(stale).items():
        others = set(counts.get("sources", ())) - named
        rows = [row for row in folder.rows(name) if short(row["key"]) not in present]
        if not rows or not any(exists(path, hub=True) for path in others):
            folder.remove(name)
            continue
        counts |= {"cut_rows": [], "rows": len(rows), "errors": sum(row["error"] is not None for row in rows)}
        folder.write(name, iter([pa.Table.from_pylist(rows, schema)]), functools.partial(dict, counts))
        kept.append(name)
    return folder.footers(kept)


def _give_one_schema(folder: ShardFolder, contents: dict) -> None:
    """Rewrite files whose columns or types differ from the common schema: readers take the first file's."""
    schemas = {name: schema.remove_metadata() for name, (schema, _) in contents.items()}
    common = common_schema(list(schemas.values()))
    for name, schema in schemas.items():
        if schema != common:
            table = table_of(list(folder.rows(name)), common)
            folder.write(name, iter([table]), functools.partial(dict, contents[name][1]))


def _write_output(folder: ShardFolder, form: str, shards: list[Shard], names: list[str], source: ImageSource) -> None:
    """Make one output of all shards, in their order."""
    output = folder.output
    may_repeat = any(shard.storage == "parquet" for shard in shards)  # each shard's names differ from each other alone

    def once(rows: Iterator[dict], column: str) -> Iterator[dict]:
        return EachOnce(lambda row: row["version"], column)(rows) if may_repeat else rows

    def rows() -> Iterator[dict]:
        for row in once((row for name in names for row in folder.rows(name)), "image"):
            outcome = {name: row[name] for name in OUTCOME if row.get(name) is not None}
            yield {"image": row["image"]} | json.loads(row["columns"]) | outcome

    def images() -> Iterator[dict]:
        return once(itertools.chain.from_iterable(map(source.rows, shards)), "name")

    captions = writers.Captions(rows, images, output, [place for _, place in source.named])
    with whole_at(output) as target:
        writers.WRITERS[form](captions, target)

"""Sources that hold the images themselves: tables of `datasets`, memory-mapped or streamed, and their records."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import xxhash

from common.errors import DataError
from data import records as rec
from data.checks import clean_captions
from data.columns import ID_COLUMNS, captions_of, dict_rows, find_columns, from_base64, image_in
from data.finder import Finder
from data.rows import SPLIT_NAMES, Options, Record, split_name

ALL = "all"  # of draw_splits_from: every split there is


def local_files(path: Path, pattern: str = "*.parquet") -> list[Path]:
    """The files of a folder and below, a file, or a pattern of files."""
    if path.is_dir():
        files = sorted(path.rglob(pattern))
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise DataError(f"{path}: no {pattern.lstrip('*.')} file matches")
    return files


def load_dataset(name: str, options: Options, config=None, data_files=None, source: str | None = None):
    """`datasets.load_dataset`, with errors of one line."""
    try:
        return datasets.load_dataset(
            name, config, data_files=data_files, cache_dir=options.cache_dir, streaming=options.streaming
        )
    except Exception as error:  # datasets, huggingface_hub and their network libraries share no base class of errors
        raise could_not_load(source or name, "parquet" if data_files else "hub", error) from None


def could_not_load(name: str, what: str, error: BaseException) -> DataError:
    while isinstance(error.__cause__, Exception):  # datasets wraps what happened while a table was made
        error = error.__cause__
    if isinstance(error, DataError):
        return error
    reason = str(error).strip().splitlines()
    advice = (
        "Check the path and the files"
        if what != "hub" or Path(name).exists()
        else "Check the id on huggingface.co, the network, and HF_HUB_OFFLINE; local data need a path that exists"
    )
    return DataError(
        f"{name}: could not be loaded as {what} ({type(error).__name__}: {reason[0] if reason else ''}). {advice}"
    )


def by_split(loaded, options: Options, source: str, draw_splits_from: str | None) -> dict:
    """One table per split of train, validation and test (restval joins train); with `draw_splits_from` one, called
    train, of that split, which is what sources without splits have."""
    if draw_splits_from is not None:
        drawn = draw_splits_from.lower()
        chosen = [
            table
            for name, table in loaded.items()
            if drawn in (ALL, name.lower()) or SPLIT_NAMES.get(drawn, drawn) == SPLIT_NAMES.get(name.lower(), name)
        ]
        if not chosen:
            raise DataError(f"{source}: there is no split {draw_splits_from!r}. Splits present: {', '.join(loaded)}")
        table = _joined(chosen)
        return {"train": table.remove_columns("split") if "split" in (table.column_names or ()) else table}
    tables: dict = {}
    for name, table in loaded.items():
        if name.lower() not in SPLIT_NAMES:
            raise DataError(
                f"{source}: split {name!r} is not one of train, validation, test. Splits present: "
                f"{', '.join(loaded)}. Name the one to draw train, validation and test from with --draw_splits_from"
            )
        if options.streaming and table.features is None:  # not given by the source: taken from its first rows
            table = table._resolve_features()
        tables.setdefault(SPLIT_NAMES[name.lower()], []).append(table)
    return {split: _joined(parts) for split, parts in tables.items()}


def _joined(parts: list):
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


# ---------------------------------------------------------------- the image column


def columns_of(table, options: Options, source: str):
    """(image column, caption columns)."""
    features = table.features or {}
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return find_columns(
        list(table.column_names), options.image_column, options.caption_column, source, typed, _Example(table)
    )


class _Example(dict):
    """The first row without images, read only if an error needs it."""

    def __init__(self, table):
        self.table = table

    def items(self):
        texts = [name for name, feature in (self.table.features or {}).items() if not _holds_bytes(feature)]
        return next(iter(self.table.select_columns(texts)), {}).items()

    def __bool__(self):
        return True


def _holds_bytes(feature) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return any(_holds_bytes(inner) for inner in feature.values())
    if isinstance(feature, datasets.Value):
        return "binary" in feature.dtype
    inner = getattr(feature, "feature", None)
    return inner is not None and _holds_bytes(inner)


def holds_paths(table, image_name: str) -> bool:
    """Whether the image column holds paths of files, rather than images or their base64."""
    feature = table.features[image_name]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        return False
    first = next((row[image_name] for row in table.select_columns([image_name]) if row[image_name]), None)
    return first is None or len(first) < 64 or from_base64(first) is None


def with_images(table, image_name: str):
    """The table with its images in a column of undecoded images, whatever they were: `datasets` images, a struct of bytes
    and path, plain bytes, base64, or a list of one of these."""
    feature = table.features[image_name]
    plain = isinstance(feature, datasets.Image | dict) or (
        isinstance(feature, datasets.Value) and "binary" in feature.dtype
    )
    if not plain:
        others = {name: kind for name, kind in table.features.items() if name != image_name}
        if isinstance(getattr(feature, "feature", None), datasets.Image):  # undecoded, or `map` would decode each
            table = table.cast_column(image_name, datasets.List(datasets.Image(decode=False)))
        features = datasets.Features({image_name: datasets.Image(decode=False), **others})
        arguments = {"image_name": image_name}
        return table.map(_single, with_indices=True, fn_kwargs=arguments, features=features)
    return table.cast_column(image_name, datasets.Image(decode=False))


def _single(row: dict, number: int, image_name: str) -> dict:
    image = image_in(row[image_name], f"row {number}", image_name)
    return {image_name: {"path": image, "bytes": None} if isinstance(image, str) else image}


# ---------------------------------------------------------------- rows of tables that are loaded


def table_rows(tables: dict, options: Options, image_dir) -> tuple[Iterable[Record], datasets.Dataset | None]:
    """Rows of tables with an image and a caption column: (records, table of the images).

    Where the image column holds paths, records have these and the table is None.
    """
    parts = [part.flatten_indices() if part._indices is not None else part for part in tables.values()]
    table = _joined(parts)
    image_name, caption_names = columns_of(table, options, "the data set")
    split_of_row = [split for split, part in zip(tables, parts, strict=True) for _ in range(len(part))]
    if holds_paths(table, image_name):
        paths = table[image_name]
    else:
        names_apart = [name for name in ("image", "captions") if name in table.column_names]
        table = table.remove_columns([name for name in names_apart if name not in (image_name, *caption_names)])
        table = with_images(table, image_name)
        table = table.rename_column(image_name, "image") if image_name != "image" else table
        sizes, names, _ = rec.table_images(table)
        paths = table["image"] if all(size is None for size in sizes) else None
    if paths is not None:
        rows = table.remove_columns([name for name in (image_name, "image") if name in table.column_names])
        paths = (image["path"] if isinstance(image, dict) else image for image in paths)
        named = (
            (row | {image_name: path}, f"{split} row {number}")
            for number, (row, path, split) in enumerate(zip(rows, paths, split_of_row, strict=True))
        )
        records = dict_rows(
            named,
            "the data set",
            image_name,
            caption_names[0] if len(caption_names) == 1 else None,
            Finder([image_dir]),
        )
        return with_splits(records, split_of_row), None

    id_name = next((name for name in ID_COLUMNS if name in table.column_names), "image_id")
    wanted = [name for name in dict.fromkeys((*caption_names, id_name, "split")) if name in table.column_names]
    rows = table.select_columns(wanted)

    def records():
        for number, row in enumerate(rows):
            where = f"{split_of_row[number]} row {number}"
            own_split, image_id = row.get("split"), row.get(id_name)
            yield Record(
                where,
                number,
                captions_of(row, caption_names, where),
                name=names[number],
                image_id=None if image_id is None else str(image_id),
                split=split_of_row[number] if own_split is None else split_name(own_split, where),
            )

    return records(), table.remove_columns([name for name in {*wanted, "image_id"} if name in table.column_names])


def with_splits(records: Iterable[Record], splits: list[str]) -> Iterator[Record]:
    """Records of table rows, with the table's split for those without one of their own."""
    for record, split in zip(records, splits, strict=True):
        record.split = record.split or split
        yield record


def table_of(rows: Iterator[Record], read, key: dict, cache_dir) -> dict:
    """{"train": table} of rows that hold their images, in base64 for example, kept in the cache of `datasets`.

    Args:
        rows: the first one says which columns there are.
        read: read(**key) yields the rows again; `key` determines them.
    """
    extras = list(next(rows).extras)
    texts = dict.fromkeys(["image_id", "split", *extras], datasets.Value("string"))
    features = {"image": datasets.Image(decode=False), "captions": datasets.List(datasets.Value("string")), **texts}
    try:
        table = datasets.Dataset.from_generator(
            _generate, features=datasets.Features(features), cache_dir=cache_dir,
            gen_kwargs={"read": read, "extras": extras, "key": key},
        )  # fmt: skip
    except Exception as error:
        raise could_not_load(str(key.get("path")), "annotations", error) from None
    if table.unique("split") == [None]:
        table = table.remove_columns("split")
    if table.unique("image_id") == [None]:
        table = table.remove_columns("image_id")
    return {"train": table}


def _generate(read, extras: list[str], key: dict) -> Iterator[dict]:
    for record in read(**key):
        image = record.image if isinstance(record.image, dict) else {"path": record.image, "bytes": None}
        row = {"image": image, "captions": clean_captions(record.captions, record.where, record.name or "")}
        row |= {"image_id": record.image_id, "split": record.split}
        yield row | {name: None if record.extras.get(name) is None else str(record.extras[name]) for name in extras}


# ---------------------------------------------------------------- streams


def stream_records(tables: dict, options: Options, seed: int, source: str, all_as: str | None = None):
    """Records of tables that are read as they are needed, with the columns that `load` gives.

    A source without splits gets 90/5/5 by a hash of the image's bytes (of its path, where there are none), so that
    equal images are in the same split wherever they lie. What a stream cannot see: rows of one image merge only where
    they are adjacent, so an image may come as several records (of one split); images that are in two official
    splits are not found; nor are duplicate ids, or images that cannot be read (these raise when they are reached).

    Returns:
        IterableDatasetDict; its shards are those of the source, so that workers and processes share them.
    """
    held_out = {"validation": (0.0, rec.HELD_OUT), "test": (rec.HELD_OUT, 2 * rec.HELD_OUT)}
    if set(tables) == {"train"} and all_as:
        plan = {all_as: ("train", 0.0, 1.0)}
    elif set(tables) == {"train"}:
        plan = {"train": ("train", 2 * rec.HELD_OUT, 1.0)}
        plan |= {split: ("train", *bounds) for split, bounds in held_out.items()}
    elif set(tables) == {"train", "test"}:
        plan = {"train": ("train", rec.HELD_OUT, 1.0), "validation": ("train", *held_out["validation"])}
        plan["test"] = ("test", 0.0, 1.0)
    else:
        plan = {split: (split, 0.0, 1.0) for split in tables}
    streams = {}
    for split, (name, low, high) in plan.items():
        table = tables[name]
        image, captions = columns_of(table, options, source)
        if "split" in table.features:
            first = next(iter(table.select_columns(["split"])), {"split": name})["split"]
            if first is not None and SPLIT_NAMES.get(str(first).lower()) != name:
                raise DataError(
                    f"{source}: its rows name their own split, which a stream cannot follow. Leave out --streaming"
                )
        table = with_images(table, image)
        extras = {
            name: feature
            for name, feature in table.features.items()
            if name not in (image, *captions, "image_id", "image", "captions", "split")
        }
        features = {
            "image_id": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
        }
        streams[split] = datasets.IterableDataset.from_generator(
            stream_split,
            features=datasets.Features(features | extras),
            gen_kwargs={
                "shards": [table.shard(table.num_shards, shard) for shard in range(table.num_shards)],
                "columns": (image, tuple(captions), tuple(extras)),
                "bounds": (low, high),
                "seed": seed,
                "table_split": name,
                "skip_bad_samples": options.skip_bad_samples and split == "train",
            },
        )
    return datasets.IterableDatasetDict(streams)


def stream_split(
    shards: list, columns: tuple, bounds: tuple, seed: int, table_split: str, skip_bad_samples: bool
) -> Iterator[dict]:
    """One split of one or more shards: neighbouring rows of the same image as one record."""
    image_name, caption_names, extra_names = columns
    for shard in shards:
        record = digest = None
        for number, row in enumerate(shard):
            own = row.get("split")
            if own is not None and split_name(own, f"row {number}") != table_split:
                raise DataError(
                    f"row {number} says it is of split {own!r}, but is in {table_split}, which a stream cannot follow. "
                    "Leave out --streaming"
                )
            image = row[image_name]
            content = image["bytes"] if image["bytes"] is not None else str(image["path"]).encode()
            known, digest = digest, xxhash.xxh3_128_hexdigest(content)
            place = xxhash.xxh3_64_intdigest(digest.encode(), seed=seed) / 2**64
            if not bounds[0] <= place < bounds[1]:
                continue
            name = os.path.basename(image["path"] or "") or digest
            image_id = str(row["image_id"]) if row.get("image_id") is not None else name
            captions = clean_captions(
                captions_of(row, caption_names, f"row {number}"),
                f"row {number}",
                image_id,
                (lambda message: None) if skip_bad_samples else None,
            )
            if record is not None and digest == known:
                record["captions"] += captions
                continue
            if record is not None and record["captions"]:
                yield record
            record = {"image_id": image_id, "image": image, "captions": captions}
            record |= {extra: row[extra] for extra in extra_names}
        if record is not None and record["captions"]:
            yield record


def as_streams(dataset: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    return datasets.IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in dataset.items()})

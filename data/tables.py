"""Sources that hold the images themselves: tables of `datasets`, memory-mapped or streamed, and their records."""

import dataclasses
import glob
import os
from collections.abc import Iterator
from pathlib import Path

import datasets

from common.errors import DataError
from data import formats
from data import records as rec
from data.checks import clean_captions
from data.columns import Columns, captions_of, find_columns, from_base64, image_in, row_of
from data.images import ImageError
from data.rows import SPLIT_NAMES, Options, Part, Row, key_of, split_in, split_name
from data.splits import drawn_splits, place_of, split_at
from data.walk import files_below

ALL = "all"  # of draw_splits_from: every split there is


def local_files(path: Path, ending: str | tuple = ".parquet") -> list[Path]:
    """The files of a folder and below, a file, or a pattern of files."""
    files = (
        files_below(path, ending)
        if path.is_dir()
        else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    )
    files = [file for file in files if not file.name.startswith(("_", "."))] or files
    if not files:
        raise DataError(f"{path}: no {(ending if isinstance(ending, str) else ending[0])[1:]} file matches")
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


def columns_of(table, options: Options, source: str) -> Columns:
    """The columns of a table; an example is read of those that hold no images."""
    features = table.features or {}
    images = tuple(name for name, feature in features.items() if isinstance(feature, datasets.Image))
    texts = [name for name, feature in features.items() if not _holds_bytes(feature)]
    examples = dict.fromkeys(table.column_names or ()) | next(iter(table.select_columns(texts)), {})
    return find_columns(examples, options, source, images)


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
    """Whether the image column holds names of files, rather than images or their base64."""
    feature = table.features[image_name]
    if not isinstance(feature, datasets.Value) or "binary" in feature.dtype:
        return False
    first = next((row[image_name] for row in table.select_columns([image_name]) if row[image_name]), None)
    return not isinstance(first, str) or len(first) < 64 or from_base64(first) is None


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


# ---------------------------------------------------------------- rows of tables


def table_parts(format: str, path: Path, loaded: dict) -> list[Part]:
    """A part per split."""
    folder = str(path) if path.is_dir() else "."
    return [Part(format, str(path), label=name, split=split_in(name), folders=(folder,)) for name in loaded]


def read_table(part: Part, options: Options) -> Iterator[Row]:
    """The rows of a split, with their images."""
    streamed = dataclasses.replace(options, streaming=True)
    table = formats.BY_NAME[part.format].tables(Path(part.place), streamed)[part.label]
    if isinstance(table, datasets.IterableDataset) and table.features is None:
        table = table._resolve_features()  # not given by the source: taken from its first rows
    columns = columns_of(table, options, part.place)
    if columns.image is not None and not holds_paths(table, columns.image):
        table = with_images(table, columns.image)
    split = part.split if part.label in ("train", "validation", "test") else None
    for number, content in enumerate(rows_in(table)):
        if content.get(columns.image) is None and options.images:
            fault = ImageError(f"{part.place} row {number}: there is no image in column {columns.image}")
            yield Row(f"row {number}", fault, split=split, columns=content, used=columns.used)
        else:
            yield row_of(content, columns, f"{part.label} row {number}", part.place, options, split)


def rows_in(table) -> Iterator[dict]:
    """The rows of a table, all of them also inside a DataLoader worker, where iterating over a stream gives a share."""
    if isinstance(table, datasets.IterableDataset):
        for batch in table.iter(32):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    else:
        yield from table


def indexed_rows(tables: dict, options: Options) -> tuple[Iterator[Row], datasets.Dataset | None]:
    """(rows, table of the images) of tables with an image and a caption column: a row's image is its number in the table.
    Where the images are files, rows have their names, and the table is None."""
    parts = [part.flatten_indices() if part._indices is not None else part for part in tables.values()]
    table = _joined(parts)
    columns = columns_of(table, options, "the data set")
    split_of_row = [split for split, part in zip(tables, parts, strict=True) for _ in range(len(part))]
    if holds_paths(table, columns.image):
        return _with_splits(table, columns, split_of_row, options), None
    names_apart = [name for name in ("image", "captions") if name in table.column_names]
    table = table.remove_columns([name for name in names_apart if name not in columns.used])
    table = with_images(table, columns.image)
    table = table.rename_column(columns.image, "image") if columns.image != "image" else table
    sizes, names, _ = rec.table_images(table)
    if all(size is None for size in sizes):
        return _with_splits(table, dataclasses.replace(columns, image="image"), split_of_row, options), None
    used = [name for name in dict.fromkeys((*columns.used, "split")) if name in table.column_names and name != "image"]
    textual = dataclasses.replace(options, images=False)
    selected = table.select_columns(list(dict.fromkeys([*used, *filter(None, [options.group_column])])))

    def rows():
        without_image = dataclasses.replace(columns, image=None)
        for number, content in enumerate(selected):
            row = row_of(content, without_image, f"{split_of_row[number]} row {number}", "the data set", textual)
            row.image, row.name, row.split = number, names[number], row.split or split_of_row[number]
            yield row

    return rows(), table.remove_columns([name for name in {*used, "image_id"} if name in table.column_names])


def _with_splits(table, columns: Columns, splits: list[str], options: Options) -> Iterator[Row]:
    for number, (content, split) in enumerate(zip(table, splits, strict=True)):
        yield row_of(content, columns, f"{split} row {number}", "the data set", options, split)


def spooled(rows: Iterator[Row], read, key: dict, cache_dir) -> dict:
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
    for row in read(**key):
        image = row.image if isinstance(row.image, dict) else {"path": row.image, "bytes": None}
        values = {"image": image, "captions": clean_captions(row.captions, row.where, row.name or "")}
        values |= {"image_id": row.image_id, "split": row.split}
        yield values | {name: None if row.extras.get(name) is None else str(row.extras[name]) for name in extras}


# ---------------------------------------------------------------- streams


def stream_records(
    tables: dict, options: Options, seed: int, shares: tuple, source: str, root: str, all_as: str | None = None
):
    """Records of tables that are read as they are needed, with the columns that `load` gives.

    A source without splits gets the splits that `load` draws, as far as an image alone decides. What a stream cannot see: rows of one image merge only where
    they are adjacent, so an image may come as several records (of one split); images that are in two official
    splits are not found; nor are duplicate ids, or images that cannot be read (these raise when they are reached).

    Returns:
        IterableDatasetDict; its shards are those of the source, so that workers and processes share them.
    """
    official = "test" in tables
    table_of = {all_as: "train"} if set(tables) == {"train"} and all_as else {split: split for split in tables}
    drawn = drawn_splits(shares, official) if set(tables) <= {"train", "test"} and "train" in table_of else []
    table_of |= dict.fromkeys(drawn, "train")
    streams = {}
    for split, name in table_of.items():
        table = tables[name]
        columns = columns_of(table, options, source)
        image, captions = columns.image, columns.captions
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
                "drawn": (split, seed, shares, official) if split in drawn else None,
                "root": root,
                "table_split": name,
                "skip_bad_samples": options.skip_bad_samples and split == "train",
            },
        )
    return datasets.IterableDatasetDict(streams)


def stream_split(
    shards: list, columns: tuple, drawn: tuple | None, root: str, table_split: str, skip_bad_samples: bool
) -> Iterator[dict]:
    """One split of one or more shards: neighbouring rows of the same image as one record.

    Args:
        drawn: (split, seed, shares, whether test is official) of a split that is drawn.
    """
    image_name, caption_names, extra_names = columns
    for shard in shards:
        record = key = None
        for number, row in enumerate(rows_in(shard)):
            own = row.get("split")
            if own is not None and split_name(own, f"row {number}") != table_split:
                raise DataError(
                    f"row {number} says it is of split {own!r}, but is in {table_split}, which a stream cannot follow. "
                    "Leave out --streaming"
                )
            image = row[image_name]
            before, key = key, key_of(image, None, root) or ""
            if drawn is not None and split_at(place_of(key, drawn[1]), *drawn[2:]) != drawn[0]:
                continue
            name = os.path.basename(image["path"] or "") or key
            image_id = str(row["image_id"]) if row.get("image_id") is not None else name
            captions = clean_captions(
                captions_of(row, caption_names, f"row {number}"),
                f"row {number}",
                image_id,
                (lambda message: None) if skip_bad_samples else None,
            )
            if record is not None and key == before:
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

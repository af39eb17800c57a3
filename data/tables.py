"""Sources that hold the images themselves: tables of `datasets`, memory-mapped or streamed, and their records."""

import contextlib
import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np

from common.errors import DataError
from common.prompts import columns_in
from data import records as rec
from data.checks import clean_captions, refuse
from data.columns import QUESTION, Columns, find_columns, from_base64, image_in, row_of
from data.prompts import PROMPTS, prompt_of
from data.rows import SPLIT_NAMES, Options, Part, Row, key_of, text_or_none, usual_split
from data.splits import drawn_splits, place_of, shares_to_draw, split_at
from data.walk import files_below

ADVICE = {"hub": "Check the id on huggingface.co, the network, and HF_HUB_OFFLINE; local data need a path that exists"}
ALL = "all"  # of draw_splits_from: every split there is
IMAGE = datasets.Image(decode=False)
TEXT = datasets.Value("string")


def local_files(path: Path, endings: tuple = (".parquet",)) -> list[Path]:
    """The files of a folder and below, a file, or a pattern of files."""
    if path.is_dir():  # where Spark and others leave files of their own
        files = [file for file in files_below(path, endings) if not file.name.startswith("_")]
    else:
        files = list(map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise DataError(f"{path}: no {endings[0][1:]} file matches")
    return sorted(files)


def load_dataset(source: str, format: str, options: Options, **named):
    """What `datasets` loads by these arguments of its load_dataset; `source` and `format` are for messages."""
    with loading(source, format):
        return datasets.load_dataset(**named, cache_dir=options.cache_dir, streaming=options.streaming)


@contextlib.contextmanager
def loading(name: str, format: str):
    """Whatever goes wrong in `datasets` here is a DataError of one line."""
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub and their network libraries share no base class of errors
        while isinstance(error.__cause__, Exception):  # datasets wraps what happened while a table was made
            error = error.__cause__
        if isinstance(error, DataError):
            raise error from None
        reason = str(error).strip().partition("\n")[0]
        advice = ADVICE.get(format, "Check the path and the files")
        message = f"{name}: could not be loaded as {format} ({type(error).__name__}: {reason}). {advice}"
        raise DataError(message) from None


def by_split(tables: dict, source: str, draw_splits_from: str | None) -> dict:
    """One table per split of train, validation and test (restval joins train); with `draw_splits_from` one, called
    train, of that split, which is what sources without splits have."""
    if draw_splits_from is not None:
        table = _joined([tables[name] for name in splits_called(draw_splits_from, list(tables), source)])
        return {"train": without_columns(table, "split")}
    joined: dict = {}
    for name, table in tables.items():
        if name.lower() not in SPLIT_NAMES:
            raise DataError(
                f"{source}: split {name!r} is not one of train, validation, test. Splits present: "
                f"{', '.join(tables)}. Name the one to draw train, validation and test from with --draw_splits_from"
            )
        joined.setdefault(SPLIT_NAMES[name.lower()], []).append(table)
    return {split: _joined(parts) for split, parts in joined.items()}


def splits_called(name: str, present: list[str], source: str) -> list[str]:
    """Those of the splits that `name` means: val is validation, and `all` are all."""
    called = [split for split in present if usual_split(name) in (ALL, usual_split(split))]
    if not called:
        raise DataError(f"{source}: there is no split {name!r}. Splits present: {', '.join(present)}")
    return called


def without_columns(table, *names: str):
    """The table without those of these columns that it has."""
    present = {*names} & {*table.column_names}
    return table.remove_columns(list(present)) if present else table  # a stream would decode its images


def _joined(parts: list):
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def columns_of(table, options: Options, source: str) -> Columns:
    """The columns of a table; an example is read of those that hold no images."""
    images = tuple(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    texts = [name for name, feature in table.features.items() if not _holds_bytes(feature)]
    examples = dict.fromkeys(table.features) | next(iter(table.select_columns(texts)), {})
    return find_columns(examples, options, source, images)


def _holds_bytes(feature) -> bool:
    return re.search(r"Image\(|binary'[,)]", repr(feature)) is not None


def holds_paths(table, image_name: str) -> bool:
    """Whether the image column holds names of files, rather than images or their base64."""
    feature = table.features[image_name]
    if not isinstance(feature, datasets.Value) or _holds_bytes(feature):
        return False
    first = next((row[image_name] for row in table.select_columns([image_name]) if row[image_name]), None)
    return not isinstance(first, str) or from_base64(first) is None


def with_images(table, image_name: str):
    """The table with its images in a column of undecoded images, whatever they were: `datasets` images, a struct of bytes
    and path, plain bytes, base64, or a list of one of these."""
    feature = table.features[image_name]
    of_list = getattr(feature, "feature", None)
    if of_list is None and _holds_bytes(feature):
        return table.cast_column(image_name, IMAGE)
    if isinstance(of_list, datasets.Image):  # undecoded, or `map` would decode each
        table = table.cast_column(image_name, datasets.List(IMAGE))
    features = datasets.Features({**table.features, image_name: IMAGE})
    return table.map(_single, with_indices=True, fn_kwargs={"image_name": image_name}, features=features)


def _single(row: dict, number: int, image_name: str) -> dict:
    return {image_name: _undecoded(image_in(row[image_name], f"row {number}", image_name))}


def _undecoded(image: dict | str) -> dict:
    return image if isinstance(image, dict) else {"path": image, "bytes": None}


# ---------------------------------------------------------------- rows of tables


def table_rows(table, columns: Columns, splits: Iterable[str | None], options: Options, name: str) -> Iterator[Row]:
    """
    Args:
        splits: of each row.
        name: what messages call the table.
    """
    for number, (content, split) in enumerate(zip(_rows_in(table), splits, strict=False)):
        yield row_of(content, columns, f"{split or name} row {number}", name, options, split)


def read_table(part: Part, options: Options) -> Iterator[Row]:
    """The rows of a split, with their images."""
    columns, table = columns_of(part.table, options, part.place), part.table
    if columns.image is not None and not holds_paths(table, columns.image):
        table = with_images(table, columns.image)
    yield from table_rows(table, columns, itertools.repeat(part.split), options, part.place)


def _rows_in(table) -> Iterator[dict]:
    """The rows of a table, all of them also inside a DataLoader worker, where iterating over a stream gives a share."""
    for batch in table.iter(32):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def indexed_rows(tables: dict, options: Options) -> tuple[Iterator[Row], datasets.Dataset | None]:
    """(rows, table of the images) of tables with an image and a caption column: a row's image is its number in the table.
    Where the images are files, rows have their names, and the table is None."""
    table = _joined(list(tables.values()))
    columns = columns_of(table, options, "the data set")
    splits = np.repeat(list(tables), list(map(len, tables.values()))).tolist()
    if holds_paths(table, columns.image):
        return table_rows(table, columns, splits, options, "the data set"), None
    table = without_columns(table, *({"image", "captions"} - {*columns.used}))
    table = with_images(table, columns.image)
    table = table.rename_columns({columns.image: "image"})
    columns = dataclasses.replace(columns, image="image")
    sizes, names, _ = rec.table_images(table)
    if set(sizes) <= {None}:
        return table_rows(table, columns, splits, options, "the data set"), None
    used = {*columns.used, "split"} & {*table.column_names} - {"image"}
    texts = {*used, options.group_column, *columns_in(options.prompt)} & {*table.column_names} - {"image"}
    texts = table.select_columns(sorted(texts))
    return _numbered(texts, columns, splits, options, names), without_columns(table, *used, "image_id")


def _numbered(texts, columns: Columns, splits: list[str], options: Options, names: list) -> Iterator[Row]:
    without_images = dataclasses.replace(columns, image=None), splits, dataclasses.replace(options, images=False)
    for number, row in enumerate(table_rows(texts, *without_images, "the data set")):
        row.image, row.name = number, names[number]
        yield row


def spooled(rows: Iterator[Row], read, key: dict, cache_dir) -> dict:
    """{"train": table} of rows that hold their images, in base64 for example, kept in the cache of `datasets`.

    Args:
        rows: the first one says which columns there are.
        read: read(**key) yields the rows again; `key` determines them.
    """
    extras = tuple(next(rows).extras)  # `datasets` takes the items of a list for shards
    texts = dict.fromkeys(["image_id", "split", QUESTION, *extras], TEXT)
    features = {"image": IMAGE, "captions": datasets.List(TEXT)} | texts
    with loading(key["path"], "annotations"):
        table = datasets.Dataset.from_generator(
            _generate, features=datasets.Features(features), cache_dir=cache_dir,
            gen_kwargs={"read": read, "extras": extras, "key": key},
        )  # fmt: skip
    absent = [name for name in ("split", "image_id", QUESTION) if table.unique(name) == [None]]
    return {"train": table.remove_columns(absent)}


def _generate(read, extras: tuple, key: dict) -> Iterator[dict]:
    for row in read(**key):
        texts = {name: _as_text(row.extras.get(name)) for name in extras}
        captions = clean_captions(row.captions, row.where, row.name or "")
        ours = {"image": _undecoded(row.image), "captions": captions, "image_id": row.image_id, "split": row.split}
        yield ours | {QUESTION: row.question} | texts


def _as_text(value) -> str | None:
    """That of a list has commas between its items."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return text_or_none(value)


# ---------------------------------------------------------------- streams


def stream_records(
    tables: dict, options: Options, seed: int, shares: tuple, source: str, root: str, all_as: str | None = None
):
    """Records of tables that are read as they are needed, with the columns that `load` gives.

    A source without splits gets the splits that `load` draws, as far as an image alone decides. What a stream cannot see:
    rows of one image merge only where they are adjacent, so an image may come as several records (of one split); images
    that are in two official splits are not found; nor are duplicate ids, or images that cannot be read (these raise when
    they are reached).

    Returns:
        IterableDatasetDict; its shards are those of the source, so that workers and processes share them.
    """
    shares = shares_to_draw(shares, "test" in tables)
    table_of, drawn = dict(zip(tables, tables, strict=True)), []
    if all_as and set(tables) == {"train"}:
        table_of = {all_as: "train"}
    elif {"train"} <= set(tables) <= {"train", "test"}:
        drawn = drawn_splits(shares)
        table_of |= dict.fromkeys(drawn, "train")
    streams = {}
    for split, name in table_of.items():
        columns = columns_of(tables[name], options, source)
        check_own_splits(tables[name], name, source)
        table = with_images(tables[name], columns.image)
        ours = {"image_id": TEXT, "image": IMAGE, "captions": datasets.List(TEXT)}
        if columns_in(options.prompt) or (options.own_questions and columns.question):
            ours[PROMPTS] = datasets.List(TEXT)
        apart = {columns.image, *columns.captions, *ours, PROMPTS, "split"}
        features = {name: feature for name, feature in table.features.items() if name not in apart}
        streams[split] = datasets.IterableDataset.from_generator(
            stream_split,
            features=datasets.Features(ours | features),
            gen_kwargs={
                "shards": [table.shard(table.num_shards, shard) for shard in range(table.num_shards)],
                "columns": columns,
                "names": (*ours, *features),
                "drawn": (split, seed, shares) if split in drawn else None,
                "root": root,
                "table_split": name,
                "skip_bad_samples": options.skip_bad_samples and split == "train",
                "asked": {"prompt": options.prompt, "own_questions": options.own_questions},
            },
        )
    return datasets.IterableDatasetDict(streams)


def check_own_splits(table, split: str, source: str) -> None:
    """DataError if the first row names another split than its table is."""
    first = next(iter(table.select_columns(["split"])), {}).get("split") if "split" in table.features else None
    if first is not None and SPLIT_NAMES.get(str(first).lower()) != split:
        raise DataError(f"{source}: its rows name their own split, which a stream cannot follow. Leave out --streaming")


def stream_split(
    shards: list,
    columns: Columns,
    names: tuple,
    drawn: tuple | None,
    root: str,
    table_split: str,
    skip_bad_samples: bool,
    asked: dict,
) -> Iterator[dict]:
    """One split of one or more shards: neighbouring rows of the same image as one record.

    Args:
        names: the columns of a record.
        drawn: (split, seed, shares) of a split that is drawn.
        asked: what Options have to say about rows' own prompts.
    """
    options = Options(**asked)
    report = (lambda message: None) if skip_bad_samples else refuse
    for shard in shards:
        rows = table_rows(shard, columns, itertools.repeat(table_split), options, table_split)
        for key, group in itertools.groupby(rows, lambda row: key_of(row.image, None, root) or ""):
            if drawn is not None and split_at(place_of(key, drawn[1]), drawn[2]) != drawn[0]:
                continue
            group = list(group)
            first, captions, prompts = group[0], [], []
            for row in group:
                if row.split != table_split:
                    raise DataError(
                        f"{row.where} says it is of split {row.split!r}, but is in {table_split}, which a stream cannot "
                        "follow. Leave out --streaming"
                    )
                captions += clean_captions(row.captions, row.where, row.name or key, report)
                prompts += [prompt_of(row, options)] * (len(captions) - len(prompts))
            if captions:
                image_id, image = first.image_id or os.path.basename(first.name or key), first.columns[columns.image]
                ours = {"image_id": image_id, "image": image, "captions": captions, PROMPTS: prompts}
                yield {name: (first.columns | ours)[name] for name in names}


def as_streams(dataset: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    return datasets.IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in dataset.items()})

"""`load`: from the name of a source to its records, one per image, checked, in train, validation and test.

Formats are modules of data/formats. No image is decoded here; captions and names are held in memory, about half a
kilobyte per image, and images that lie inside a source stay in its memory-mapped table.
"""

import itertools
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import xxhash

from common.errors import DataError
from common.files import version_of
from common.processes import in_threads
from common.remote import is_remote, local_copy
from data import records as rec
from data import splits as splitting
from data.checks import check_captions, drop_missing
from data.finder import Finder
from data.formats import karpathy
from data.reader import Source
from data.rows import SPLITS, Options, Record
from data.tables import (
    as_streams,
    by_split,
    columns_of,
    holds_paths,
    indexed_rows,
    splits_called,
    spooled,
    stream_records,
)

logger = logging.getLogger(__name__)

NOT_CHECKED = (
    "%s (%s, streaming): splits %s; not checked in a stream: rows of one image that are not adjacent, equal images in "
    "two official splits, copies saved anew, duplicate ids"
)


def load(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    data_format: str = "auto",
    image_dir: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split_seed: int = 42,
    split_shares: str | None = None,
    group_column: str | None = None,
    draw_splits_from: str | None = None,
    streaming: bool = False,
    skip_bad_samples: bool = False,
    cache_dir: str | None = None,
    splits: tuple[str, ...] | None = None,
    max_samples: dict[str, int] | None = None,
    all_as: str | None = None,
    seen=None,
    bad_samples: list | None = None,
    prompt: str | None = None,
    own_questions: bool = False,
    require_images: bool = True,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load captioned images, one record per image, and log in one line what was found and dropped.

    Args:
        dataset_name: a local file or folder, a pattern of tar or Parquet files, the id of a Hub data set, or
            `scenes`; or an address such as s3://bucket/folder, of which a copy is kept in the cache.
        dataset_config_name: configuration of a Hub set. For `scenes`, `shuffled` pairs images with others' captions.
        data_format: the name of one of data.formats; `auto` recognizes it from the path.
        image_dir: folder of the images, if they are not next to the annotations.
        image_column, caption_column: for columns with unusual names.
        split_seed: seed of the split over images that is drawn for a source without splits.
        split_shares: shares of train, validation and test, such as "0.8,0.1,0.1"; default 90/5/5.
        group_column: images of the same value in this column are in one split.
        draw_splits_from: draw these splits from the images of this split of the source, such as `test`, or from `all`.
        streaming: return an IterableDatasetDict. Parquet, WebDataset and Hub sets are then read as they are needed;
            `stream_records` says what cannot be checked then. Other formats are loaded as usual (they are only
            captions and paths) and keep every check.
        skip_bad_samples: drop missing images and bad captions instead of raising, except in the source's own
            validation and test splits.
        cache_dir: cache of `datasets`, and of the COCO images that are fetched.
        splits: these splits only. Images of other splits are then neither fetched (COCO-Karpathy) nor compared.
        max_samples: at most this many records per split, e.g. {"train": 1000}: the first ones.
        all_as: if the source has no splits, all images are this split, and no split is drawn.
        seen: with `all_as`, a data.seen.Seen: of a source without splits, the images of the split that this model's
            training had, if it has seen any of the source.
        bad_samples: a list that receives {"image_id", "image", "reason"} for each row skipped.
        prompt: with columns in braces (data.prompts): each row's own prompt is made of its columns.
        own_questions: rows that are conversations have their question as their prompt.
        require_images: False for callers that read captions only: image files may then be missing, and are not fetched.

    Returns:
        Those of train, validation and test that exist, with columns `image_id` (str), `image` ({"path", "bytes"},
        undecoded), `captions` (list of str) and the source's other columns; where rows have prompts of their own also
        data.prompts.PROMPTS, that of each caption (None of a row without one). A split of the source keeps its order; a
        drawn one is ordered by id.

    Raises:
        DataError, ImageError: both ValueErrors, saying what is wrong, where, and what to do.
    """
    dataset_name = str(dataset_name)
    chosen = Chosen(splits, max_samples or {}, dataset_name)
    shares = splitting.parse_shares(split_shares)
    options = Options(
        dataset_config_name, image_dir, image_column, caption_column, group_column, cache_dir, streaming, skip_bad_samples,
        data_format, bad_samples=[] if bad_samples is None else bad_samples, prompt=prompt, own_questions=own_questions,
    )  # fmt: skip
    source = Source(str(local_copy(dataset_name, cache_dir)) if is_remote(dataset_name) else dataset_name, options)
    rows, tables = open_rows(source, dataset_name, draw_splits_from)
    if options.streaming and tables is not None and not _are_annotations(tables, options):
        dataset = chosen.of(_streams(tables, source, split_seed, shares, all_as, seen))
        logger.info(NOT_CHECKED, dataset_name, source.format.NAME, ", ".join(dataset))
        return dataset

    records, table = _records(rows, tables, source, draw_splits_from)
    official, complete = rec.splits_of_source(records)
    whole = all_as is not None and not official  # one split of all images
    for record in records if whole else ():
        record.split = all_as
    if complete or (whole and not seen):
        records = chosen.records(records)  # before images are looked for: those of other splits need not be there
    if require_images:
        karpathy.fetch_missing(records, options)
    if not records:
        raise DataError(f"{dataset_name}: no captioned image found{in_words(options.dropped)}")

    drawn = not complete and not whole
    records = _each_image_once(records, table, options, official, drawn, require_images)
    rec.name_records(records)
    compared = require_images and not getattr(source.format, "SPLITS_DIFFER", False)
    near = _near_pairs(records, table, options, drawn) if compared else []
    phrase = f"no splits in the source, so all images are {all_as}" if whole else "splits of the source"
    splitting.say_near_pairs_across_splits(records, near)
    if drawn:
        phrase = splitting.draw_splits(records, split_seed, shares, official, splitting.groups_of(records, near))
    dataset = rec.to_dataset(records, table)
    if seen and not official:
        dataset, phrase = seen.held_out(dataset, all_as)
    dataset = chosen.of(dataset)
    detected = " detected" if data_format == "auto" else ""
    logger.info(
        "%s (%s%s): %s; %s%s",
        *(dataset_name, source.format.NAME, detected, counts(dataset), phrase, in_words(options.dropped)),
    )
    return as_streams(dataset) if streaming else dataset


def _streams(tables: dict, source: Source, seed: int, shares: tuple, all_as: str | None, seen):
    if source.options.group_column:
        raise DataError(
            f"{source.name}: a stream does not know its groups beforehand. Leave out --streaming or --group_column"
        )
    streams = stream_records(tables, source.options, seed, shares, source.name, source.root, all_as)
    return seen.held_out(streams, all_as)[0] if seen and set(tables) == {"train"} else streams


def _records(rows, tables: dict | None, source: Source, draw_splits_from: str | None) -> tuple[list[Record], object]:
    """(records with clean captions, table of their images or None)."""
    table = None
    if tables is not None:
        rows, table = _rows_of(tables, source, draw_splits_from)
    records = rec.merge(rows, source.options)
    if draw_splits_from is not None and tables is None:
        records = only_split(records, draw_splits_from, source.name)
    check_captions(records)
    return records, table


@dataclass
class Chosen:
    """The splits that are asked for, all if None, and how many of their records, the first ones. DataError if a source
    does not have one of them."""

    splits: tuple[str, ...] | None
    max_samples: dict[str, int]
    source: str

    def __post_init__(self):
        self.named = [*(self.splits or ()), *self.max_samples]
        for split in self.named:
            if split not in SPLITS:
                raise DataError(f"there is no split {split!r}. Splits are called {', '.join(SPLITS)}")

    def records(self, records: list[Record]) -> list[Record]:
        in_order = sorted(records, key=lambda record: SPLITS.index(record.split))
        groups = itertools.groupby(in_order, lambda record: record.split)
        chosen = self._of({split: list(its) for split, its in groups})
        return [record for split, its in chosen.items() for record in its[: self.max_samples.get(split)]]

    def of(self, dataset):
        return type(dataset)({split: self._first(split, rows) for split, rows in self._of(dataset).items()})

    def _first(self, split: str, rows):
        count = self.max_samples.get(split)
        if count is None:
            return rows
        # A table's own take() refuses more rows than there are in older versions of datasets.
        return rows.select(range(min(count, len(rows)))) if isinstance(rows, datasets.Dataset) else rows.take(count)

    def _of(self, by_split: dict) -> dict:
        require_splits(self.named, list(by_split), self.source)
        return {split: rows for split, rows in by_split.items() if self.splits is None or split in self.splits}


def require_splits(names: list[str], present: list[str], source: str) -> None:
    for split in names:
        if split not in present:
            raise DataError(f"{source}: there is no {split} split. Splits present: {', '.join(present)}")


def only_split(records: list[Record], name: str, source: str) -> list[Record]:
    """The records of a split, or of all, with their split removed."""
    present = sorted({record.split for record in records} - {None})
    called = splits_called(name, present, source) if present else []
    chosen = [replace(record, split=None) for record in records if record.split in (*called, None)]
    return chosen


def open_rows(source: Source, name: str, draw_splits_from: str | None = None):
    """(rows, None), or (None, {split: table}) of a source whose images lie inside it."""
    options = source.options
    if hasattr(source.format, "tables"):
        return None, by_split(source.tables(), name, draw_splits_from)
    rows = source.rows()
    first = next(rows, None)
    rows = itertools.chain(filter(None, [first]), rows)
    if first is None or not isinstance(first.image, dict):
        return rows, None
    versions = [(part.place, version_of(part.place)) for part in source.parts]
    key = {"format": source.format.NAME, "path": source.name, "versions": versions}
    key |= {"image_column": options.image_column, "caption_column": options.caption_column}
    table = spooled(rows, _read_again, key, options.cache_dir)
    options.streaming = False
    return None, by_split(table, name, draw_splits_from)


def _read_again(format, path, versions, image_column, caption_column):
    return Source(path, Options(format=format, image_column=image_column, caption_column=caption_column)).rows()


def _are_annotations(tables: dict, options: Options) -> bool:
    """Whether the tables hold no images, so that they are small, and loaded like other annotations."""
    table = next(iter(tables.values()))
    return _is_karpathy(tables) or holds_paths(table, columns_of(table, options, "the data set").image)


def _is_karpathy(tables: dict) -> bool:
    return karpathy.is_karpathy(next(iter(tables.values())).column_names)


def _rows_of(tables: dict, source: Source, draw_splits_from: str | None):
    """(rows, table of the images or None) of tables that are not streamed."""
    if source.options.streaming:
        source.options.streaming = False
        _, tables = open_rows(source, source.name, draw_splits_from)
    if _is_karpathy(tables):
        rows = karpathy.rows_of(itertools.chain.from_iterable(tables.values()), source.name)
        return source.located(
            rows, Finder(karpathy.image_folders(Path(source.root, source.path.name), source.options))
        ), None
    find = source.finder(source.parts[0].folders if hasattr(source.format, "parts") else (source.root,))
    rows, table = indexed_rows(tables, source.looking(find))
    return source.located(rows, find), table


def _near_pairs(records: list[Record], table, options: Options, drawn: bool) -> list[tuple[int, int]]:
    """Records whose pictures look the same, where several splits share them or will."""
    if not drawn and len({record.split for record in records}) == 1:
        return []
    images = [record.image for record in records]
    if table is None:
        return splitting.near_pairs(images, [f"{image} {version_of(image)}" for image in images], options.cache_dir)
    versions = [f"{table._fingerprint} {image}" for image in images]
    return splitting.near_pairs(table.select(images)["image"], versions, options.cache_dir)


def _each_image_once(records: list[Record], table, options: Options, official: bool, drawn: bool, require_images: bool):
    """The records without those whose image is missing, and records of equal images merged."""
    if table is None:
        sizes, read = rec.file_sizes(records), rec.read_file
    else:
        sizes, _, read = rec.table_images(table)
        sizes = [sizes[record.image] for record in records]
        if drawn:  # by key, which of an image inside a table is its content
            inside = [record for record, size in zip(records, sizes, strict=True) if size is not None]
            contents = in_threads(lambda record: xxhash.xxh3_128_hexdigest(read(record.image, 0, None)), inside, 16)
            for record, content in zip(inside, contents, strict=True):
                record.key = content
    if require_images:
        records, sizes = drop_missing(records, sizes, options)
    same = rec.same_content([record.image for record in records], sizes, read)
    return rec.unite(records, same, official, options.dropped)


def counts(dataset: datasets.DatasetDict) -> str:
    captions = {name: sum(map(len, rows["captions"][:])) for name, rows in dataset.items()}
    by_split = ", ".join(f"{name} {len(dataset[name]):,} / {number:,}" for name, number in captions.items())
    images = sum(map(len, dataset.values()))
    return f"{images:,} images, {sum(captions.values()):,} captions ({by_split})"


def in_words(dropped: Counter) -> str:
    numbers = [f"{number:,} {name}" for name, number in (+dropped).items()]
    return f"; dropped: {', '.join(numbers)}" if numbers else ""

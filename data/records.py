"""Rows of a source -> records, one per image, and the checks that make a split honest.

A source gives rows: an image, one or more captions, maybe a split and an id. Here rows of the same image become one
record, captions are cleaned, and files of equal content are found. Splits are drawn by data.splits; data.sources.load does one after the other.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from common.errors import DataError
from common.processes import in_threads
from common.prompts import columns_in
from data.checks import clean_captions, may_skip, refuse
from data.columns import is_missing
from data.images import ImageError
from data.prompts import PROMPTS, prompt_of
from data.rows import SPLITS, Options, Record, Row

logger = logging.getLogger(__name__)
CAPTIONS = pa.list_(pa.string())
NEARNESS = {None: 0, "train": 0, "validation": 1, "test": 2}  # to a score


def merge(rows, options: Options) -> list[Record]:
    """Rows of the same file (path) become one record, in order of first appearance; captions are cleaned.

    Rows of a table (an int for an image) stay separate here: `same_content` finds which of them are one image.
    """
    records: dict = {}
    not_asked, own = 0, options.own_questions or bool(columns_in(options.prompt))
    of_lines = []  # rows whose captions span several lines
    for row in rows:
        captions = captions_of_row(row, options)
        if any("\n" in str(caption).strip() for caption in row.captions):
            of_lines.append(row.where)
        if not captions:
            continue
        path = os.path.abspath(row.image) if isinstance(row.image, str) else row.image
        if isinstance(path, dict):
            raise DataError(f"{row.where}: holds its image, and the first row names a file. Make all rows alike")
        new = Record(row.where, path, [], row.key, row.name, row.image_id, row.split, row.extras)
        record = records.setdefault(path, new)
        if record.split != row.split:
            raise DataError(
                f"{row.where}: image {row.name or path} is in split {row.split!r}, and in {record.split!r} at "
                f"{record.where}. One image belongs to one split: correct the file"
            )
        record.captions += captions
        if own:
            record.prompts += [prompt_of(row, options)] * len(captions)
        else:
            not_asked += row.question is not None
        if options.group_column is not None:
            record.groups.add(group_of(row, options.group_column))
    if not_asked:
        logger.info(
            "the questions of %d conversations are left out: every image has the model's prompt, or --prompt", not_asked
        )
    if of_lines:
        logger.warning(
            "the captions of %d rows span several lines, the first at %s; each is read as one caption. If every line is a "
            'caption, write them as a list: ["...", "..."]',
            *(len(of_lines), of_lines[0]),
        )
    return list(records.values())


def captions_of_row(row: Row, options: Options) -> list[str]:
    """Clean captions; none of a row that is left out."""
    image = row.name or str(row.image)
    image_id, skip = row.image_id or image, may_skip(row, options)
    if isinstance(row.image, ImageError):
        if not skip:
            raise DataError(f"{row.where}: {row.image}")
        options.drop("unclear or absent images", image_id, image, str(row.image))
        return []
    report = functools.partial(options.drop, "bad captions", image_id, image) if skip else refuse
    captions = clean_captions(row.captions or [None], row.where, image, report)
    options.dropped["images without captions"] += not captions
    return captions


def group_of(row: Row, column: str) -> str:
    if column not in row.columns:
        raise DataError(f"{row.where}: no column {column!r} (--group_column). Columns: {', '.join(row.columns)}")
    if is_missing(row.columns[column]):
        raise DataError(f"{row.where}: nothing in column {column!r} (--group_column). Give every row its group")
    return str(row.columns[column])


def file_sizes(records: list[Record]) -> list[int | None]:
    """Bytes of each image file, None where it is missing."""

    def size(record):
        try:
            return os.stat(record.image).st_size
        except OSError:
            return None

    return in_threads(size, records, 16)  # on a network disk each is a wait


def same_content(images: list, sizes: list[int | None], read) -> list[int]:
    """For each image the index of the first one with exactly the same bytes (its own index where there is none).

    Cheap on large sets: only images of equal size are looked into, first at three short pieces, and only those that
    agree there are hashed in full (xxh3, 128 bits).

    Args:
        images: what identifies each image to `read`: the path of a file, or a row.
        sizes: bytes of each image, None where it is missing.
        read: read(image, start, stop) -> these of its bytes.
    """

    def digest(index, parts):
        try:
            content = [bytes(read(images[index], start, stop)) for start, stop in parts]
        except OSError:  # `check_images` finds it, and says so
            return index.to_bytes(16, "big")
        return xxhash.xxh3_128_digest(b"".join(content))

    def pieces(index):
        starts = (0, sizes[index] // 2, max(0, sizes[index] - 4096))
        return digest(index, [(start, min(start + 4096, sizes[index])) for start in starts])

    def whole(index):
        return digest(index, [(0, sizes[index])])

    keys = np.nan_to_num(np.array(sizes, float))
    indices = np.flatnonzero(keys)  # empty files are not images, let alone the same one
    keys = keys[indices]
    for look in (pieces, whole):
        _, same, number = np.unique(keys, return_inverse=True, return_counts=True)
        indices = indices[number[same] > 1]
        keys = np.array(in_threads(look, indices.tolist(), 16), "S16")
    _, first, same = np.unique(keys, return_index=True, return_inverse=True)
    same_as = np.arange(len(sizes))
    same_as[indices] = indices[first[same]]
    return same_as.tolist()


def read_file(path, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def unite(records: list[Record], first: list[int], official: bool, dropped: Counter) -> list[Record]:
    """Records of equal content become one.

    Without splits of its own, a source's images of equal bytes are one image whatever their names: the captions that
    the first lacks are added to it. With official splits the published images stay as they are, but an image that is in
    two splits is removed from the one nearer to training (train before validation before test).

    Args:
        first: from `same_content`.
        official: the source has its own splits.
    """
    last: dict = {}  # content -> the split that keeps it
    for content, record in zip(first, records, strict=True):
        last[content] = max(last.get(content, 0), NEARNESS[record.split])
    kept: dict = {}
    for content, record in zip(first, records, strict=True):
        if NEARNESS[record.split] < last[content]:
            dropped[f"{record.split} images also in {SPLITS[last[content]]}"] += 1
            continue
        # Rows of one table that hold the same bytes are one image, unless two file names say otherwise.
        one = kept.setdefault((content, record.name if official else None), record)
        if one is record:
            continue
        one.groups |= record.groups
        if one.name == record.name:
            more = pairs_of(record)
        else:
            known = set(pairs_of(one))
            more = [pair for pair in pairs_of(record) if pair not in known]
            dropped["renamed copies of an image"] += 1
        one.captions += [caption for caption, _ in more]
        one.prompts += [prompt for _, prompt in more]
    return list(kept.values())


def name_records(records: list[Record]) -> None:
    """Give every record its id: the source's, else the file name, else (no names, or not unique) the path or
    row number."""
    names = [record.name for record in records if record.image_id is None]
    unique = len(set(names) - {None}) == len(names)
    with_id: dict = {}
    for record in records:
        if record.image_id is None:
            number = record.image if isinstance(record.image, str) else f"{record.image:08d}"
            record.image_id = record.name if unique else number
        other = with_id.setdefault(record.image_id, record)
        if other is not record:
            raise DataError(
                f"image_id {record.image_id!r} names two different images: {other.name or other.image} ({other.where}) "
                f"and {record.name or record.image} ({record.where}). Give each image its own id"
            )


def splits_of_source(records: list[Record]) -> tuple[bool, bool]:
    """(the source has its own splits, nothing is to be drawn). A lone train split is what sources without splits
    have."""
    present = {record.split for record in records}
    if present > {None}:
        without = next(record for record in records if record.split is None)
        raise DataError(f"{without.where}: image {without.name} has no split, others do. Give one to each, or to none")
    return bool(present - {None, "train"}), bool(present - {None, "train", "test"}) or present == {"test"}


def to_dataset(records: list[Record], table: datasets.Dataset | None = None) -> datasets.DatasetDict:
    """Records -> a DatasetDict of image_id, image (undecoded), captions and the extra columns.

    Args:
        table: the source's own table if it holds the images: then image bytes are not copied, a split is a
            selection of its (memory-mapped) rows.
    """
    for record in records if own_prompts(records) else ():  # captions of one prompt next to each other
        both = sorted(pairs_of(record), key=lambda pair: record.prompts.index(pair[1]))
        record.captions, record.prompts = map(list, zip(*both, strict=True))
    if table is None:
        full, rows = _dataset_of_files(records), np.arange(len(records))
    else:
        full, rows = _with_ids_and_captions(table, records), np.array([record.image for record in records])
    splits = np.array([record.split for record in records])
    return datasets.DatasetDict({split: full.select(rows[splits == split]) for split in SPLITS if split in splits})


def _dataset_of_files(records: list[Record]) -> datasets.Dataset:
    image_type = datasets.Image(decode=False)
    images = pa.array([_image_value(str(record.image)) for record in records], image_type.pa_type)
    own = _own_columns(records)
    ours = {"image_id": own.pop("image_id"), "image": images, **own}
    names = dict.fromkeys(itertools.chain.from_iterable(record.extras for record in records))
    names.pop(PROMPTS, None)  # a column of the source that is called like ours gives way
    extras = {name: _column([record.extras.get(name) for record in records]) for name in names}
    # Columns of the source that are called like ours, such as captions beside --caption_column caption, give way.
    return datasets.Dataset(pa.table(ours | extras | ours)).cast_column("image", image_type)


def _own_columns(records: list[Record]) -> dict[str, pa.Array]:
    """What records have besides their image and the source's columns."""
    ours = {
        "image_id": pa.array([record.image_id for record in records], pa.string()),
        "captions": pa.array([record.captions for record in records], CAPTIONS),
    }
    if own_prompts(records):
        ours[PROMPTS] = pa.array([record.prompts for record in records], CAPTIONS)
    return ours


def pairs_of(record: Record) -> list[tuple]:
    """(caption, its prompt) of a record."""
    return list(itertools.zip_longest(record.captions, record.prompts))


def own_prompts(records: list[Record]) -> bool:
    """Whether rows have prompts of their own."""
    return any(prompt is not None for record in records for prompt in record.prompts)


def _with_ids_and_captions(table: datasets.Dataset, records: list[Record]) -> datasets.Dataset:
    full = table.remove_columns(list({PROMPTS} & {*table.column_names}))
    record_of = np.full(len(table), len(records))  # of each row; there is none of this number
    record_of[[record.image for record in records]] = np.arange(len(records))
    places = pa.array(record_of, mask=record_of == len(records))
    for name, column in _own_columns(records).items():
        full = full.add_column(name, column.take(places))
    return full.select_columns(list(dict.fromkeys(["image_id", "image", "captions", *full.column_names])))


def _image_value(path: str) -> dict:
    """A path, or the bytes of a file whose name is not UTF-8, which Arrow cannot hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            return {"bytes": file.read(), "path": path.encode("utf-8", "backslashreplace").decode()}
    return {"bytes": None, "path": path}


def _column(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types: kept readable rather than refused
        return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values])


def table_images(table: datasets.Dataset):
    """The image column of an undecoded table: (sizes in bytes, file names, read), see `same_content`.

    Reads offsets and names only; `read` gives a zero-copy view of the memory-mapped bytes.
    """
    images = table.data.column("image")
    content = pc.struct_field(images, "bytes")  # null where the image is
    names = [None if name is None else os.path.basename(name) for name in pc.struct_field(images, "path").to_pylist()]

    def read(index, start, stop):
        return memoryview(content[index].as_buffer())[start:stop]

    return pc.binary_length(content).to_pylist(), names, read


def texts_of(rows) -> list[list[str]]:
    """The captions of each record, followed by their prompts where rows have their own."""
    captions = rows["captions"][:]
    if PROMPTS not in rows.column_names:
        return captions
    return [[*texts, *map(str, prompts)] for texts, prompts in zip(captions, rows[PROMPTS][:], strict=True)]


def fingerprint(dataset) -> str | None:
    """A hash (16 hex digits) of the ids and captions of each split, whatever the order of records: the same on every
    run and machine for the same data. None for a stream, which would have to be read to its end."""
    if isinstance(dataset, (datasets.IterableDatasetDict, datasets.IterableDataset)):
        return None
    splits = dataset if isinstance(dataset, dict) else {"": dataset}
    digest = hashlib.sha256()
    for split in sorted(splits):
        rows = splits[split]
        records = sorted(zip(rows["image_id"][:], texts_of(rows), strict=True), key=lambda record: record[0])
        digest.update(json.dumps([split, len(rows)]).encode())
        for image_id, captions in records:
            digest.update(json.dumps([image_id, list(captions)], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]

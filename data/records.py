"""Rows of a source -> records, one an image, and the checks that make a split honest.

A source gives rows: an image, one or more captions, maybe a split and an id. Here rows of the same image become one
record, captions are cleaned, files of equal content are found, and splits are drawn over images.
"""

import hashlib
import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from tqdm import tqdm

from data.images import MAX_PIXELS, ImageError, open_image

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # Karpathy's COCO and Flickr JSON: validation images that join training
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
HELD_OUT = 0.05  # share of images of the validation and of the test split when we draw them


SKIPPING = "With --skip_bad_samples such samples are left out of training, but never out of a split that is scored"


class DataError(ValueError):
    """Data that cannot be used as it is; the message says where, what is wrong and what to do."""


@dataclass(slots=True)
class Record:
    """One row of a source; after `merge`, one image. Rows are made in a stream, only merged ones are kept."""

    where: str  # file and line, or the row of a table: for messages
    image: str | int  # path of a file, or row of the source's table
    captions: list
    name: str | None = None  # file name that identifies the image in its source
    image_id: str | None = None
    split: str | None = None
    extras: dict = field(default_factory=dict)


def split_name(name: str, where: str) -> str:
    """A source's own word for a split -> train, validation or test."""
    if str(name).lower() not in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {name!r}. Known: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[str(name).lower()]


def clean_captions(captions, where: str, image: str, report=None) -> list[str]:
    """Collapse white space; an empty, blank or non-string caption is an error.

    Args:
        captions: the raw captions of one row: a string or a list of strings.
        report: called with the message instead of raising, for the rows that are to be skipped.
    """
    if not isinstance(captions, (list, tuple)):
        captions = [captions]
    cleaned = []
    for caption in captions:
        if isinstance(caption, str) and caption.strip():
            caption = caption.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text for Arrow
            cleaned.append(" ".join(caption.split()))
            continue
        fault = f"is {type(caption).__name__}, not text"
        if caption is None or isinstance(caption, str):
            fault = "is empty"
        message = f"{where}: a caption of image {image} {fault} ({caption!r})"
        if report is None:
            raise DataError(f"{message}. Correct the file. {SKIPPING}")
        report(message)
    return cleaned


def may_skip(record: Record) -> bool:
    """A split that scores are reported on is never cut in silence: bad samples of it stay errors."""
    return record.split in (None, "train")


def merge(rows, skip_bad_samples: bool, dropped: Counter, bad_samples: list) -> list[Record]:
    """Rows of the same file (path) become one record, in order of first appearance; captions are cleaned.

    Rows of a table (an int for an image) stay apart here: `same_content` finds which of them are one image.
    """
    records: dict = {}
    for row in rows:
        image = row.name or str(row.image)

        def skip(message, row=row, image=image):
            dropped["bad captions"] += 1
            bad_samples.append({"image_id": row.image_id or image, "image": image, "reason": message})

        skippable = skip_bad_samples and may_skip(row)
        captions = clean_captions(row.captions or [None], row.where, image, skip if skippable else None)
        if not captions:
            dropped["images without captions"] += 1
            continue
        known = records.get(row.image)
        if known is None:
            row.captions = captions
            records[row.image] = row
        elif known.split != row.split:
            raise DataError(
                f"{row.where}: image {image} is in split {row.split!r}, and in {known.split!r} at {known.where}. "
                "One image belongs to one split: correct the file"
            )
        else:
            known.captions += captions
    return list(records.values())


def in_threads(function, items, threads: int, progress: str | None = None) -> list:
    """[function(item) for item in items] on so many threads, in pieces, as a future an item would cost more than most
    of the items do. `progress` names a bar."""
    pieces = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items), desc=progress, disable=not progress) as bar:
        results = []
        for piece in pool.map(lambda piece: [*map(function, piece)], pieces):
            results += piece
            bar.update(len(piece))
    return results


def file_sizes(records: list[Record]) -> list[int | None]:
    """Bytes of each image file, None where it is missing."""

    def size(record):
        try:
            return os.stat(record.image).st_size
        except OSError:
            return None

    return in_threads(size, records, 16)  # on a network disk each is a wait


def drop_missing(records: list[Record], sizes: list, skip_bad_samples: bool, dropped: Counter, bad_samples: list):
    """Records whose image is not there (size None): an error, or dropped. Returns the other records and sizes."""
    missing = [record for record, size in zip(records, sizes, strict=True) if size is None]
    unskippable = missing if not skip_bad_samples else [record for record in missing if not may_skip(record)]
    if unskippable or (missing and len(missing) == len(records)):
        first = (unskippable or missing)[0]
        raise ImageError(
            f"{len(missing)} of {len(records)} images are missing, the first: {described(first)} (named in "
            f"{first.where}). Check --image_dir. {SKIPPING}"
        )
    for record in missing:
        dropped["missing images"] += 1
        image = described(record)
        bad_samples.append(
            {"image_id": record.image_id or record.name, "image": image, "reason": f"{image}: the image is missing"}
        )
    kept = [(record, size) for record, size in zip(records, sizes, strict=True) if size is not None]
    return [record for record, _ in kept], [size for _, size in kept]


def described(record: Record) -> str:
    """The image of a record in a message: the path of its file, else its name or number in the table."""
    return record.image if isinstance(record.image, str) else record.name or f"of row {record.image}"


def same_content(images: list, sizes: list[int], read) -> list[int]:
    """For each image the index of the first one with exactly the same bytes (its own index where there is none).

    Cheap on large sets: only images of equal size are looked into, first at three short pieces, and only those that
    agree there are hashed in full (xxh3, 128 bits).

    Args:
        images: what identifies each image to `read`: the path of a file, or a row.
        sizes: bytes of each image.
        read: read(image, start, stop) -> these of its bytes.
    """
    first = list(range(len(sizes)))
    groups: dict = {}
    for index, size in enumerate(sizes):
        if size > 0:  # empty files are no images, let alone the same one
            groups.setdefault(size, []).append(index)

    def digest(index, parts):
        try:
            content = [bytes(read(images[index], start, stop)) for start, stop in parts]
        except OSError:  # `check_images` finds it, and says so
            return index
        return xxhash.xxh3_128_digest(b"".join(content))

    def pieces(index):
        starts = (0, sizes[index] // 2, max(0, sizes[index] - 4096))
        return digest(index, [(start, min(start + 4096, sizes[index])) for start in starts])

    def whole(index):
        return digest(index, [(0, sizes[index])])

    for look in (pieces, whole):
        indices = [index for group in groups.values() if len(group) > 1 for index in group]
        finer: dict = {}
        for index, value in zip(indices, in_threads(look, indices, 16), strict=True):
            finer.setdefault((sizes[index], value), []).append(index)
        groups = finer
    for group in groups.values():
        for index in group:
            first[index] = group[0]
    return first


def read_file(path, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def unite(records: list[Record], first: list[int], official: bool, dropped: Counter) -> list[Record]:
    """Records of equal content become one.

    Without splits of its own, a source's images of equal bytes are one image whatever their names: the captions that
    the first lacks are added to it. With official splits the published images stay as they are, but bytes that are in
    two splits leave the one nearer to training (train before validation before test).

    Args:
        first: of `same_content`.
        official: the source brings its own splits.
    """
    groups: dict = {}
    for index, record in enumerate(records):
        groups.setdefault(first[index], []).append(record)
    kept = []
    for group in groups.values():
        if official:
            last = max(SPLITS.index(record.split) for record in group)
            for record in group:
                if SPLITS.index(record.split) < last:
                    dropped[f"{record.split} images also in {SPLITS[last]}"] += 1
            group = [record for record in group if SPLITS.index(record.split) == last]
        by_name: dict = {}
        for record in group:
            # Rows of one table that hold the same bytes are one image, unless two file names say otherwise.
            key = record.name if official else None
            known = by_name.setdefault(key, record)
            if known is record:
                continue
            if known.name == record.name:
                known.captions += record.captions
            else:
                known.captions += [caption for caption in record.captions if caption not in known.captions]
                dropped["renamed copies of an image"] += 1
        kept += map(id, by_name.values())
    kept = set(kept)
    return [record for record in records if id(record) in kept]  # in the source's order


def name_records(records: list[Record]) -> None:
    """Give every record its id: the source's, else the file name, else (no names, or not unique) the path or
    row number."""
    without = [record for record in records if record.image_id is None]
    names = [record.name for record in without]
    unique = None not in names and len(set(names)) == len(names)
    for record in without:
        spare = record.image if isinstance(record.image, str) else f"{record.image:08d}"
        record.image_id = record.name if unique else spare
    known: dict = {}
    for record in records:
        other = known.setdefault(record.image_id, record)
        if other is not record:
            raise DataError(
                f"image_id {record.image_id!r} names two different images: {other.name or other.image} ({other.where}) "
                f"and {record.name or record.image} ({record.where}). Give each image its own id"
            )


def splits_of_source(records: list[Record]) -> tuple[bool, bool]:
    """(the source brings splits of its own, nothing is to be drawn). A lone train split is what sources without splits
    have."""
    present = {record.split for record in records}
    if None in present and len(present) > 1:
        without = next(record for record in records if record.split is None)
        raise DataError(f"{without.where}: image {without.name} has no split, others have. Give each one, or none")
    return bool(present - {None, "train"}), bool(present - {None, "train", "test"}) or present == {"test"}


def draw_splits(records: list[Record], seed: int, official: bool, complete: bool) -> str:
    """Give images a split where the source has none, in place. Returns a phrase for the log line.

    90/5/5 over images sorted by id, seeded; with train and test only, 5 % of the training images become validation.

    Args:
        official, complete: of `splits_of_source`.
    """
    if complete:
        return "splits of the source"
    with_test = not official
    pool = sorted((record for record in records if record.split != "test"), key=lambda record: record.image_id)
    if len(pool) < 3:
        raise DataError(
            f"{len(pool)} images are too few to draw train, validation and test splits from. "
            'Add images, or say the split of each (a "split" column, or files called train, validation, test)'
        )
    held_out = max(1, round(HELD_OUT * len(pool)))
    order = list(range(len(pool)))
    random.Random(seed).shuffle(order)
    for rank, index in enumerate(order):
        if rank < held_out:
            pool[index].split = "validation"
        elif with_test and rank < 2 * held_out:
            pool[index].split = "test"
        else:
            pool[index].split = "train"
    # The order of a drawn split is that of its ids, not of the source's rows.
    records[:] = pool + [record for record in records if record.split == "test" and not with_test]
    return f"90/5/5 drawn over images, seed {seed}" if with_test else f"validation drawn from train, seed {seed}"


def to_dataset(records: list[Record], table: datasets.Dataset | None = None) -> datasets.DatasetDict:
    """Records -> a DatasetDict of image_id, image (undecoded), captions and the extra columns.

    Args:
        table: the source's own table where the images lie in it: then image bytes are not copied, a split is a
            selection of its (memory-mapped) rows.
    """
    captions_type = pa.list_(pa.string())
    if table is None:
        extras = list(dict.fromkeys(key for record in records for key in record.extras))
        columns = {key: [record.extras.get(key) for record in records] for key in extras}
        columns = {key: _column(values) for key, values in columns.items()}
        image_type = datasets.Image(decode=False)
        image = pa.array([{"bytes": None, "path": str(record.image)} for record in records], image_type.pa_type)
        full = datasets.Dataset(
            pa.table(
                {
                    "image_id": pa.array([record.image_id for record in records], pa.string()),
                    "image": image,
                    "captions": pa.array([record.captions for record in records], captions_type),
                    **columns,
                }
            )
        ).cast_column("image", image_type)
        rows = dict(zip(map(id, records), range(len(records)), strict=True))
    else:
        ids: list = [None] * len(table)
        captions: list = [None] * len(table)
        for record in records:
            ids[record.image], captions[record.image] = record.image_id, record.captions
        full = table.add_column("image_id", pa.array(ids, pa.string())).add_column(
            "captions", pa.array(captions, captions_type)
        )
        first = ["image_id", "image", "captions"]
        full = full.select_columns(first + [name for name in full.column_names if name not in first])
        rows = {id(record): record.image for record in records}
    splits = {split: [rows[id(record)] for record in records if record.split == split] for split in SPLITS}
    return datasets.DatasetDict({split: full.select(indices) for split, indices in splits.items() if indices})


def _column(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types: kept readable rather than refused
        return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values])


def table_images(table: datasets.Dataset):
    """The image column of an undecoded table: (sizes in bytes, file names, read), see `same_content`.

    Reads offsets and names only; `read` gives a zero-copy view of the memory-mapped bytes.
    """
    chunks, sizes, names, starts = [], [], [], [0]
    for chunk in table.data.column("image").chunks:
        content, path = (pc.struct_field(chunk, name) for name in ("bytes", "path"))  # null where the image is
        chunks.append(content)
        sizes += pc.binary_length(content).to_pylist()
        names += path.to_pylist()
        starts.append(starts[-1] + len(chunk))

    def read(index, start, stop):
        chunk = np.searchsorted(starts, index, side="right") - 1
        return memoryview(chunks[chunk][index - starts[chunk]].as_buffer())[start:stop]

    return sizes, [None if name is None else os.path.basename(name) for name in names], read


def fingerprint(dataset) -> str | None:
    """A hash (16 hex digits) of the ids and captions of each split, whatever the order of records: the same on every
    run and machine for the same data. None for a stream, which would have to be read to its end."""
    if isinstance(dataset, (datasets.IterableDatasetDict, datasets.IterableDataset)):
        return None
    splits = dataset if isinstance(dataset, dict) else {"": dataset}
    digest = hashlib.sha256()
    for split in sorted(splits):
        rows = splits[split]
        records = sorted(zip(rows["image_id"][:], rows["captions"][:], strict=True), key=lambda record: record[0])
        digest.update(json.dumps([split, len(rows)]).encode())
        for image_id, captions in records:
            digest.update(json.dumps([image_id, list(captions)], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def check_images(
    dataset: datasets.DatasetDict,
    num_proc: int | None = None,
    skip_bad_samples: bool = False,
    max_pixels: int = MAX_PIXELS,
    cache_dir=None,
) -> tuple[datasets.DatasetDict, list[dict]]:
    """Decode every image once before training, to find the unreadable ones.

    What was found is kept in a small file of the cache, keyed by every image's path, size and time of change (for
    images inside a table: by the table), so that a second process or run does not decode again. A stream is returned
    as it came: its images are checked when they are read.

    Returns:
        The dataset without the unreadable images, and these as a list of
        `{"image_id", "image", "split", "reason"}` (what train.py writes to bad_samples.jsonl).

    Raises:
        ImageError: an image is unreadable and `skip_bad_samples` is off, or nothing is left of a split.
    """
    if isinstance(dataset, datasets.IterableDatasetDict):
        return dataset, []
    bad: list[dict] = []
    clean = {}
    for split, rows in dataset.items():
        found = _unreadable(rows, split, num_proc, max_pixels, cache_folder(cache_dir) / "checked")
        bad += found
        broken = {sample["row"] for sample in found}
        clean[split] = rows.select([row for row in range(len(rows)) if row not in broken]) if broken else rows
    for sample in bad:
        sample.pop("row")
    if bad and not skip_bad_samples:
        first = "\n".join(f"  {sample['split']}: {sample['reason']}" for sample in bad[:5])
        raise ImageError(
            f"{len(bad)} of {sum(len(rows) for rows in dataset.values())} images cannot be read:\n{first}\n"
            "Correct or remove them, or pass --skip_bad_samples to train without them"
        )
    for split, rows in clean.items():
        if len(rows) == 0:
            raise ImageError(f"no image of split {split} can be read, the first: {bad[0]['reason']}")
    return datasets.DatasetDict(clean), bad


def _unreadable(rows: datasets.Dataset, split: str, num_proc: int | None, max_pixels: int, folder: Path) -> list[dict]:
    column = pa.chunked_array(
        [pc.struct_field(chunk, "path") for chunk in rows.data.column("image").chunks], pa.string()
    )
    if rows._indices is not None:
        column = column.take(rows._indices.column(0))
    key = hashlib.sha256(f"{split} {max_pixels} {rows._fingerprint}".encode())
    for path in column.to_pylist():
        if path is not None and os.path.isfile(path):
            stat = os.stat(path)
            key.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    kept = folder / f"{key.hexdigest()[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))

    rows = rows.select_columns(["image_id", "image"])

    def check(row: int) -> dict | None:
        record = rows[row]
        try:
            # 1/8 scale reads all of a JPEG's stream and costs a sixth of the time.
            open_image(record["image"], max_pixels=max_pixels, size=(1, 1))
        except ImageError as error:
            image = record["image"]["path"] or f"row {row}"
            return {
                "row": row,
                "image_id": record["image_id"],
                "image": image,
                "split": split,
                "reason": str(error) if record["image"]["path"] else f"image {record['image_id']}: {error}",
            }
        return None

    # Threads, not processes: Pillow decodes without holding the interpreter's lock.
    found = in_threads(check, range(len(rows)), num_proc or os.cpu_count() or 1, f"checking {split} images")
    bad = [sample for sample in found if sample is not None]
    write_atomically(kept, json.dumps(bad).encode())
    return bad


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_folder(cache_dir=None) -> Path:
    """Where this repo keeps what it fetched or computed from data: a folder inside the datasets cache."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "image_captioning"

"""Checks of data before use: captions are captions, and images are there and can be read."""

import itertools
import os
import re
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash

from common.caches import cache_folder
from common.errors import DataError
from common.existence import ENDING
from common.files import version_of, whole
from common.limits import cpus
from common.processes import in_threads
from data.columns import is_missing, parse_structure
from data.images import MAX_PIXELS, ImageError, open_image
from data.rows import Options, Record, Row

SKIPPING = "With --skip_bad_samples such samples are left out of training, but never out of a split that is scored"
# The name of an image and a separator: the beginning of a row.
SWALLOWED = re.compile(rf"""([^\s,;|"'/\\]+\.(?:{ENDING}))(?:#\d+)?["']?\s*[,;|\t#]""", re.IGNORECASE)


def refuse(message: str) -> None:
    raise DataError(f"{message}. Correct the file. {SKIPPING}")


def clean_captions(captions: list, where: str, image: str, report: Callable[[str], None] = refuse) -> list[str]:
    """Collapse white space; an empty, blank or non-string caption is an error.

    Args:
        captions: the raw captions of one row.
        report: is called with what is wrong with a caption, which is left out.
    """
    cleaned, about = [], f"{where}: a caption of image {image} is"
    for caption in captions:
        if is_missing(caption):
            report(f"{about} empty ({caption!r})")
        elif not isinstance(caption, str):
            report(f"{about} {type(caption).__name__}, not text ({caption!r})")
        else:
            check_rows(caption, where)
            caption = caption.encode("utf-8", "replace").decode()  # Arrow takes no halves of surrogate pairs
            cleaned.append(" ".join(caption.split()))
    return cleaned


def check_rows(caption: str, where: str) -> None:
    """DataError if a caption holds rows of the file that it was read from."""
    if "\n" in caption and any(SWALLOWED.search(line) for line in caption.splitlines()[1:]):
        raise DataError(
            f"{where}: this caption spans rows of the file: {caption[:80]!r}. A quote opens there and is not closed"
        )


def may_skip(record: Row | Record, options: Options) -> bool:
    """A split that scores are reported on is never cut silently: its bad samples stay errors."""
    return options.skip_bad_samples and record.split in (None, "train")


def drop_missing(records: list[Record], sizes: list, options: Options):
    """Drop records whose image is missing (size None), or raise. Returns the other records and sizes."""
    missing = [record for record, size in zip(records, sizes, strict=True) if size is None]
    unskippable = [record for record in missing if not may_skip(record, options)]
    if unskippable or len(missing) == len(records):
        first = [*unskippable, *missing][0]
        raise ImageError(
            f"{len(missing)} of {len(records)} images are missing, the first: {described(first)} (named in "
            f"{first.where}). Check --image_dir. {SKIPPING}"
        )
    for record in missing:
        image = described(record)
        options.drop("missing images", record.image_id or record.name, image, f"{image}: the image is missing")
    present = [size is not None for size in sizes]
    return list(itertools.compress(records, present)), list(itertools.compress(sizes, present))


def described(record: Record) -> str:
    """The image of a record for messages: the path of its file, else its name or number in the table."""
    return record.image if isinstance(record.image, str) else record.name or f"of row {record.image}"


def check_images(
    dataset: datasets.DatasetDict,
    num_proc: int | None = None,
    skip_bad_samples: bool = False,
) -> tuple[datasets.DatasetDict, list[dict]]:
    """Decode every image once before training, to find the unreadable ones.

    The result is cached in a small file, keyed by every image's path, size and modification time (for images inside
    a table: by the table), so that a second process or run does not decode again. A stream is returned
    unchanged: its images are checked when they are read.

    Args:
        skip_bad_samples: leave unreadable images out of the training split. In a split that is evaluated they are always
            an error, as a score must be that of the whole split.

    Returns:
        The dataset without the unreadable images, and these as a list of
        `{"image_id", "image", "split", "reason"}` (what train.py writes to bad_samples.jsonl).

    Raises:
        ImageError: an image is unreadable and may not be left out, or nothing is left of a split.
    """
    if isinstance(dataset, datasets.IterableDatasetDict):
        return dataset, []
    bad: list[dict] = []
    clean = {}
    for split, rows in dataset.items():
        unreadable = _unreadable(rows, split, num_proc)
        bad += unreadable.values()
        if len(unreadable) == len(rows):
            raise ImageError(f"no image of split {split} can be read, the first: {unreadable[0]['reason']}")
        clean[split] = rows.select(sorted(set(range(len(rows))) - set(unreadable))) if unreadable else rows
    refused = [sample for sample in bad if sample["split"] != "train" or not skip_bad_samples]
    if refused:
        first = "\n".join(f"  {sample['split']}: {sample['reason']}" for sample in refused[:5])
        raise ImageError(
            f"{len(refused)} of {sum(map(len, dataset.values()))} images cannot be read:\n{first}\n"
            "Correct or remove them, or pass --skip_bad_samples to train without them"
        )
    return datasets.DatasetDict(clean), bad


def cached_array(name: str, version: str, compute: Callable[[], np.ndarray], cache_dir=None) -> np.ndarray:
    """What `compute` returns, kept in the cache under `name` until `version` changes."""
    digest = xxhash.xxh3_128_hexdigest(version.encode("utf-8", "surrogateescape"))
    file = cache_folder(cache_dir) / name / f"{digest}.npy"
    if file.exists():
        return np.load(file)
    array = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as temporary, open(temporary, "wb") as opened:
        np.save(opened, array)
    return array


def version_of_images(rows: datasets.Dataset) -> str:
    """What changes when an image of `rows` does: the table, and each file's path, size and time."""
    column = pc.struct_field(rows.data.column("image"), "path")
    if rows._indices is not None:
        column = column.take(rows._indices.column(0))
    lines = [rows._fingerprint]
    lines += [f"{path} {version_of(path)}" for path in filter(None, column.to_pylist()) if os.path.isfile(path)]
    return "\n".join(lines)


def _unreadable(rows: datasets.Dataset, split: str, num_proc: int | None) -> dict[int, dict]:
    """{row: {"image_id", "image", "split", "reason"}} of the images that cannot be read."""
    rows = rows.select_columns(["image_id", "image"])

    def fault(row: int) -> str | None:
        try:
            # 1/8 scale reads all of a JPEG's stream and takes a sixth of the time.
            open_image(rows[row]["image"], size=(1, 1))
        except ImageError as error:
            return str(error)
        return None

    def compute() -> np.ndarray:
        # Threads, not processes: Pillow decodes without holding the interpreter's lock.
        faults = in_threads(fault, range(len(rows)), num_proc or cpus(), f"checking {split} images")
        return np.array(list(itertools.compress(enumerate(faults), faults)), str).reshape(-1, 2)

    unreadable = {}
    for row, reason in cached_array("checked", f"{MAX_PIXELS} {version_of_images(rows)}", compute).tolist():
        image_id, path = rows[int(row)]["image_id"], rows[int(row)]["image"]["path"]
        reason = reason if path else f"image {image_id}: {reason}"
        unreadable[int(row)] = {"image_id": image_id, "image": path or f"row {row}", "split": split, "reason": reason}
    return unreadable


def check_captions(records: list[Record]) -> None:
    """DataError for captions that are something else: a list written as text, rows that an unclosed quote
    swallowed, the file names of other images. It names the line."""
    names = {os.path.basename(record.name) for record in records if record.name}
    for record in records:
        itself = os.path.basename(record.name or "")
        for caption in record.captions:
            if caption[0] in "[{" and parse_structure(caption, record.where) is not None:
                raise DataError(
                    f"{record.where}: the caption of image {described(record)} is a list written as text inside another: "
                    f"{caption[:80]!r}. Write it as one list of captions"
                )
            swallowed = names.intersection(SWALLOWED.findall(caption)) - {itself}
            if swallowed:
                raise DataError(
                    f"{record.where}: the caption of image {described(record)} holds the name of another image, "
                    f"{min(swallowed)}, as if it had swallowed its row: {caption[:80]!r}. Is a quote not closed?"
                )

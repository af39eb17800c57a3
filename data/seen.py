"""What a model has seen: train.py records every image of a run beside the model, and evaluate.py looks there.

An image is recognized by the bytes of its file. So it does not matter how a source is named, what else it holds and in which
order. Ids and captions, which say what changed in a run's data, are kept as hashes.
"""

import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from common.errors import UserError
from common.files import whole
from common.processes import in_threads
from common.text import counted
from data.checks import cached_array, version_of_images
from data.records import texts_of
from data.rows import SPLITS

logger = logging.getLogger(__name__)
NAME = "seen.parquet"
UNREADABLE = bytes(16)  # in place of the hash of an image that cannot be read, which `check_images` reports
SCHEMA = pa.schema(
    [("id", pa.uint64()), ("captions", pa.uint64()), ("content", pa.binary(16)), ("split", pa.string()), ("earlier", pa.bool_())]
)  # fmt: skip


class Seen:
    """The record of a model: a row for each image, with the hashes of its id, of its captions and of its file (xxh3), its
    split, and whether an earlier run saw it, from whose model this one started."""

    def __init__(self, table: pa.Table, model: str):
        self.table, self.model = table, model
        nearest_last = sorted(table.to_pylist(), key=lambda row: SPLITS.index(row["split"]), reverse=True)
        self.of_content = {row["content"]: row["split"] for row in nearest_last}
        self.of_content.pop(UNREADABLE, None)
        trained = table.filter(pc.field("split") == "train")
        self.trained_texts = set(zip(trained["id"].to_pylist(), trained["captions"].to_pylist(), strict=True))
        # A stream's training images are not known in advance, and may be among those held out, too.
        self.has_train = False in trained["earlier"].to_pylist()

    def splits_of(self, rows: datasets.Dataset) -> list[str | None]:
        """The split that each image was in, train before validation before test; None for images it has not seen."""
        return [self.of_content.get(content) for content in contents(rows)]

    def held_out(self, splits, split: str):
        """(splits, phrase for the log line) of a source without splits, whose images are all in `split`: those that
        training had there; if none of them is in the source, those it has not seen. UserError if it has seen all."""
        if isinstance(splits, datasets.IterableDatasetDict):
            return self._held_out_of_stream(splits, split)
        rows = splits[split]
        before = np.array(self.splits_of(rows), object)
        if not any(before):
            return splits, f"no splits in the source, so all images are {split}; the model has seen none of them"
        parts = {name: np.flatnonzero(before == name).tolist() for name in (*SPLITS, None)}
        new = parts.pop(None)
        phrase = f"the split of {self.model}'s training"
        phrase += f"; left out: {counted(len(new), 'images')} that it has not seen" if new else ""
        if not parts[split]:
            parts[split], phrase = new, f"the images that {self.model} has not seen, as none was its {split} split"
        if not parts[split]:
            raise UserError(
                f"{self.model} has seen all of these {len(rows)} images in training, and none as its {split} split. "
                "Name images it has not seen, or pass --score_trained_images to score them all the same."
            )
        chosen = {name: rows.select(indices) for name, indices in parts.items() if indices}
        return datasets.DatasetDict(chosen), phrase

    def _held_out_of_stream(self, streams, split: str):
        chosen = streams[split].filter(lambda row: self.of_content.get(_content(row["image"])) == split)
        if next(iter(chosen), None) is None:
            return streams, f"no splits in the source, so all images are {split}; none was {self.model}'s {split} split"
        return datasets.IterableDatasetDict({split: chosen}), f"the split of {self.model}'s training"

    def overlap(self, rows: datasets.Dataset) -> dict:
        """How many of the images the model was trained on (None where it cannot be known), and how many chose its
        checkpoint or its settings, as validation split."""
        before = self.splits_of(rows)
        texts = zip(map(_hash, rows["image_id"][:]), map(_captions, texts_of(rows)), strict=True)
        if alike := sum(not part and text in self.trained_texts for part, text in zip(before, texts, strict=True)):
            logger.warning(
                "%d images have other bytes than images that %s was trained on, but their ids and captions: if they are these "
                "images written anew (resized, say), their scores are those of trained images",
                *(alike, self.model),
            )
        trained = before.count("train") if self.has_train else None
        return {"images": len(before), "trained_on": trained, "validated_on": before.count("validation")}

    def changes(self, now: "Seen") -> str:
        """What differs between the data of a run and `now`, in words; "" if nothing that it learns from does."""
        was, is_ = self._learnt_from(), now._learnt_from()
        both = was.keys() & is_.keys()
        numbers = {
            "images added": len(is_.keys() - was.keys()),
            "images removed": len(was.keys() - is_.keys()),
        }
        for column, words in enumerate(("images with other captions", "images replaced", "images in another split")):
            numbers[words] = sum(was[key][column] != is_[key][column] for key in both)
        return ", ".join(f"{number:,} {words}" for words, number in numbers.items() if number)

    def _learnt_from(self) -> dict:
        """{hash of the id: (hash of the captions, content, split)}."""
        table = self.table.filter(~pc.field("earlier") & (pc.field("split") != "test"))
        ids, *values = (column.to_pylist() for column in table.columns[:4])
        return dict(zip(ids, zip(*values, strict=True), strict=True))


UNKNOWN = {"trained_on": None, "validated_on": None}  # the overlap of a model without record


def in_words(overlap: dict) -> str:
    """What `Seen.overlap` says, as a sentence."""
    if overlap["trained_on"] is None:
        return "Whether the model was trained on any of these images is not known."
    selected = f", and {overlap['validated_on']:,} selected its checkpoint" if overlap["validated_on"] else ""
    return f"{overlap['trained_on']:,} of these {overlap['images']:,} images were trained on{selected}."


class Unrecorded:
    """A model that was trained on the source, and whose folder has no record: a copy of a run without it."""

    def __init__(self, model: str):
        self.model = model

    def held_out(self, splits, split: str):
        raise UserError(
            f"{self.model} was trained on this source, and {NAME}, which says on which images, is not with it: its {split} split "
            "is not known. Name the folder of the run itself; --score_trained_images scores the split that is drawn now."
        )


def find(model: str | Path | None) -> Seen | None:
    """The record of a model's folder or, for a checkpoint, of its run's; None if there is none (models from elsewhere)."""
    if not model or not Path(model).is_dir():  # a name of the Hub may look like a path into this folder
        return None
    folder = Path(model).resolve()
    file = (folder.parent if folder.name.startswith("checkpoint-") else folder) / NAME
    return Seen(pq.read_table(file, schema=SCHEMA), str(model)) if file.is_file() else None


def begin(folder: Path, splits, start: str | None, checkpoint: str | None) -> None:
    """Record the images of a run in `folder`. UserError if it resumes from a checkpoint of other data.

    Args:
        splits: records by split; those of a stream are unknown.
        start: the model that training starts from, whose record, if it has one, becomes part of this one; None for one
            without weights.
        checkpoint: the one to resume from.
    """
    table = describe(splits)
    resumed = find(checkpoint)
    if resumed and (changes := resumed.changes(Seen(table, str(folder)))):
        raise UserError(
            f"the data changed since {folder} was begun: {changes}. Restore the data to resume it, or name another "
            "--output_dir."
        )
    if earlier := find(start):
        flags = pa.array([True] * len(earlier.table))
        table = pa.concat_tables([table, earlier.table.set_column(4, "earlier", flags)])
    with whole(folder / NAME) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def describe(splits) -> pa.Table:
    """The rows of a record: of all splits but streams."""
    parts = [
        pa.table(
            [
                pa.array(map(_hash, rows["image_id"][:]), pa.uint64()),
                pa.array(map(_captions, texts_of(rows)), pa.uint64()),
                pa.array(contents(rows), pa.binary(16)),
                pa.array([split] * len(rows), pa.string()),
                pa.array([False] * len(rows)),
            ],
            schema=SCHEMA,
        )
        for split, rows in splits.items()
        if isinstance(rows, datasets.Dataset)
    ]
    return pa.concat_tables([SCHEMA.empty_table(), *parts])


def contents(rows: datasets.Dataset) -> list[bytes]:
    """The hash of each image's file, or of its bytes in the table. Kept in the cache, by the size and time of the files."""
    images = rows.select_columns(["image"])

    def compute() -> np.ndarray:
        hashes = in_threads(lambda row: _content(images[row]["image"]), range(len(images)), 16)
        return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)

    return list(map(bytes, cached_array("contents", version_of_images(rows), compute)))


def _content(image: dict) -> bytes:
    try:
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    except (OSError, ValueError, TypeError):  # `check_images` says what is wrong with it
        return UNREADABLE
    return xxhash.xxh3_128_digest(content)


def _captions(captions: list[str]) -> int:
    return _hash("\n".join(sorted(captions)))  # sorted: a source whose rows were moved says the same


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))

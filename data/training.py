"""From records to training data: a checked subset, in samples of an image and the captions that share its encoding."""

import itertools
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from common.errors import DataError
from data.prompts import PROMPTS

logger = logging.getLogger(__name__)
CAPTIONS = pa.list_(pa.string())


def in_memory(split, name: str) -> datasets.Dataset:
    """A split that is evaluated, which is read more than once, from a stream or not. DataError if a stream has no
    image of it."""
    if not isinstance(split, datasets.IterableDataset):
        return one_prompt_each(split)
    records = list(split)
    if not records:
        raise DataError(
            f"no image of the stream is in the {name} split: without splits in the source, --split_shares of the images are "
            "drawn by their bytes, which may be none of only a few images. Leave out --streaming"
        )
    return one_prompt_each(datasets.Dataset.from_list(records, features=split.features))


def one_prompt_each(records: datasets.Dataset) -> datasets.Dataset:
    """The records, those with several prompts once for each, with its captions: x, x#2, ... A caption is scored against the
    answers to what was asked."""
    prompts = records[PROMPTS][:] if PROMPTS in records.column_names else []
    if all(len(set(of_record)) == 1 for of_record in prompts):
        return records
    rows, ids, captions, own = [], [], [], []
    for row, (image_id, texts) in enumerate(zip(records["image_id"][:], records["captions"][:], strict=True)):
        for number, prompt in enumerate(dict.fromkeys(prompts[row]), 1):
            rows.append(row)
            ids.append(image_id if number == 1 else f"{image_id}#{number}")
            captions.append([text for text, its in zip(texts, prompts[row], strict=True) if its == prompt])
            own.append([prompt] * len(captions[-1]))
    if twice := len(ids) - len(set(ids)):
        raise DataError(
            f"{twice} ids are taken by numbered ones, such as x#2 of x, which has several prompts: rename them"
        )
    several = sum(len(set(of_record)) > 1 for of_record in prompts)
    logger.info("%d images have several prompts: they are captioned and scored once for each", several)
    ours = {"image_id": pa.array(ids), "captions": pa.array(captions, CAPTIONS), PROMPTS: pa.array(own, CAPTIONS)}
    split = records.select(rows).remove_columns(list(ours))
    for name, column in ours.items():
        split = split.add_column(name, column)
    return split


def require_training_split(splits, source: str) -> None:
    """DataError that says how to train on a data set that was uploaded for evaluation: one split, called test, say."""
    if "train" not in splits:
        present = ", ".join(splits)
        raise DataError(
            f"{source} has no train split. Splits present: {present}. Pass --draw_splits_from {next(iter(splits))} to draw "
            "train, validation and test from it"
        )


class EncodedRecords(torch.utils.data.Dataset):
    """Records with "features", `features[i]` of record i, in place of their image, which is never read.
    `source` are the records themselves."""

    def __init__(self, records, features):
        self.source, self.features = records, features
        self.records = records.select_columns(["image_id", "captions", *({PROMPTS} & {*records.column_names})])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | str):
        """A record by its number, or a column by its name, as in a datasets.Dataset."""
        return self.records[key] if isinstance(key, str) else {**self.records[key], "features": self.features[key]}


class CaptionPairs(torch.utils.data.Dataset):
    """Every caption of every record once per epoch, in samples of up to `captions_per_image` captions of one image.

    A sample is `{"image_id", "first_caption", "image", "captions", "epoch"}`. With 1 caption per image it is the classic
    list of pairs, with None every sample has all captions of its image. From EncodedRecords it has "features" instead of
    "image".
    """

    def __init__(self, records, captions_per_image: int | None = 1):
        table = records.records if isinstance(records, EncodedRecords) else records
        counts = pyarrow.compute.list_value_length(table.with_format("arrow")["captions"][:]).to_numpy()
        captions_per_image = captions_per_image or int(max(counts, default=1))
        self.records, self.captions_per_image = records, captions_per_image
        if PROMPTS in table.column_names:
            starts = [starts_of(prompts, captions_per_image) for prompts in table[PROMPTS][:]]
            self.record_of = np.repeat(np.arange(len(counts)), list(map(len, starts)))
            self.start_of = np.concatenate(starts, dtype=int)
        else:
            samples = -(-counts // captions_per_image)  # of each record
            self.record_of = np.repeat(np.arange(len(counts)), samples)
            firsts = np.repeat(np.cumsum(samples) - samples, samples)
            self.start_of = (np.arange(len(firsts)) - firsts) * captions_per_image
        # Shared, so that worker processes that outlive an epoch see it move.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.record_of)

    def lengths(self) -> list[int]:
        """Characters of each sample's longest caption."""
        captions = self.records["captions"][:]
        starts = zip(self.record_of, self.start_of, strict=True)
        return [max(map(len, captions[record][start : start + self.captions_per_image])) for record, start in starts]

    def __getitem__(self, index: int) -> dict:
        record = self.records[int(self.record_of[index])]
        return sample_of(record, int(self.start_of[index]), self.captions_per_image, int(self.epoch))


def starts_of(prompts: list, number: int) -> list[int]:
    """Where the samples of a record begin, of whose captions these are the prompts: of `number` captions at most, all of one
    prompt."""
    starts = []
    for _, same in itertools.groupby(range(len(prompts)), key=prompts.__getitem__):
        starts += list(same)[::number]
    return starts


def sample_of(record: dict, start: int, number: int, epoch: int) -> dict:
    """The captions from `start` on of a record, up to `number` of them, and of one prompt."""
    captions = record["captions"][start : start + number]
    if PROMPTS in record:
        prompts = record[PROMPTS][start : start + number]
        prompts = list(itertools.takewhile(lambda prompt: prompt == prompts[0], prompts))
        record = record | {PROMPTS: prompts}
        captions = captions[: len(prompts)]
    sample = {"image_id": record["image_id"], "first_caption": start, "captions": captions, "epoch": epoch}
    return sample | {name: record[name] for name in ("image", "features", PROMPTS) if name in record}


class CaptionStream(torch.utils.data.IterableDataset):
    """CaptionPairs of a streamed split: one pass over it, in an order that is a function of the seed and the epoch (shards
    shuffled, and records within a buffer). In DataLoader workers each yields a share of the pass.
    """

    def __init__(self, records, captions_per_image: int, seed: int, buffer_size: int = 1000):
        self.records = records.shuffle(seed=seed, buffer_size=buffer_size)
        self.captions_per_image = captions_per_image
        self.epoch, self.starts = 0, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.records.set_epoch(epoch)

    def __iter__(self):
        for record in self.records:
            prompts = record.get(PROMPTS, [None] * len(record["captions"]))
            for start in starts_of(prompts, self.captions_per_image):
                yield sample_of(record, start, self.captions_per_image, self.epoch)

    def passes(self):
        """The samples of pass after pass, without end. `starts` are the numbers of the samples that begin one, as far as
        they are known."""
        self.starts, number = [], 0
        for epoch in itertools.count():
            self.set_epoch(epoch)
            self.starts.append(number)
            for sample in self:
                yield sample
                number += 1
            if number == self.starts[-1]:
                raise DataError("the stream has no captioned image in its train split")

    def passes_in(self, samples: int) -> float | None:
        """How many passes the first `samples` are. None within the first pass, whose length is not known."""
        length = self.starts[1] if len(self.starts) > 1 else samples + 1
        return samples / length if samples >= length else None

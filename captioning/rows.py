"""Runs infer.py's images through a captioner: rows that say which caption belongs to which image."""

import re

import torch

from common.errors import DataError, message_of
from data.images import ImageError
from data.prompts import PROMPTS


class ImageRows(torch.utils.data.IterableDataset):
    """The rows that `rows()` yields, in batches that DataLoader workers take in turn, and of them those that `left(row)`
    says are left to do. Workers ask it at different times, so it has no say in who takes which rows."""

    def __init__(self, rows, batch_size: int, left=bool):
        self.rows, self.batch_size, self.left = rows, batch_size, left

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for number, row in enumerate(self.rows()):  # each worker reads all rows, and takes its own
            mine = worker is None or number // self.batch_size % worker.num_workers == worker.id
            if mine and self.left(row):
                own = {} if row["prompt"] is None else {PROMPTS: [row["prompt"]]}
                yield {"image": row["image"], "image_id": row | {"image": None, "number": number}} | own


def worded(text: str, args) -> str:
    """A caption as it is written: without the words --strip at its front, between --prefix and --suffix."""
    for words in args.strip:
        text = re.sub(rf"\A{re.escape(words.strip())}(?!\w)[\s,:]*", "", text, flags=re.IGNORECASE)
    return f"{args.prefix}{text}{args.suffix}"


def caption(captioner, rows: ImageRows, args):
    """(row without its image, {"caption"}, of several {"captions"}, or {"error"}) for each image, with a model here in order;
    those of images that cannot be read only if they are to be skipped. The row has its `number`. With "cut" a caption has no
    end of its own."""
    stream = captioner.stream(
        rows,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        skip_bad_images=args.skip_bad_images,
    )
    try:
        for row, captions in stream:
            failed = isinstance(captions, DataError | ImageError)
            if failed:
                yield row, {"error": str(captions)}
            else:
                cut = {"cut": True} if any(caption.cut for caption in captions) else {}
                captions = [worded(text, args) for text in captions]
                yield row, ({"captions": captions} if len(captions) > 1 else {"caption": captions[0]}) | cut
    except ImageError as error:
        raise ImageError(
            f"{message_of(error)}. With --skip_bad_images such images are written with their error"
        ) from None


def in_order(captions):
    """What `caption` yields of all rows, in their order."""
    waiting, number = {}, 0
    for row, outcome in captions:
        waiting[row["number"]] = row, outcome
        while number in waiting:
            yield waiting.pop(number)
            number += 1

"""Records -> batches. Nothing else makes one."""

import torch

from data import ImageError, open_image
from models.families import special_tokens

IGNORE = -100  # torch's cross-entropy passes over targets of this value


class CaptionCollator:
    """Training batches: pixels, decoder inputs, and labels that are -100 wherever nothing is to be learnt.

    A sample is `{"image": anything data.open_image takes, "captions": [str, ...], "image_id": str, "epoch": int}`, its
    captions being those that share one encoding of the image. With I images and at most K captions an image the batch
    holds `pixel_values` (I, 3, H, W) and `input_ids`, `attention_mask`, `labels` (I * K, L), the captions of an image in
    neighbouring rows. An image with fewer than K captions is filled up with rows that have no label.

    With the prompt "a picture of " and the caption "a dog runs" the row is

        tokens          [DEC]    a  picture   of     a   dog  runs  [SEP]  [PAD]
        input_ids       30522 1037     3861 1997  1037  3899  3216    102      0
        attention_mask      1    1        1    1     1     1     1      1      0
        labels           -100 -100     -100 -100  1037  3899  3216    102   -100

    Labels stand at their own token; the objective shifts them, once. A caption longer than `max_txt_len` tokens
    (prompt and both ends counted in) is cut, and then has no [SEP]: it did not end there.
    """

    def __init__(self, processor, config, *, max_txt_len: int = 40, prompt: str = "", augmentation=None):
        self.tokenizer = processor.tokenizer
        self.images = ImageCollator(processor)
        self.augmentation = augmentation
        self.start, self.end, self.pad = special_tokens(config)
        self.prompt_ids = prompt_tokens(self.tokenizer, prompt)
        self.max_txt_len = max_txt_len
        if len(self.prompt_ids) + 2 >= max_txt_len:
            raise ValueError(f"The prompt '{prompt}' leaves no room for a caption in max_txt_len {max_txt_len}.")

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        images = [open_image(sample["image"]) for sample in samples]
        if self.augmentation:
            images = [
                self.augmentation(image, sample["epoch"], sample["image_id"], sample["captions"])
                for image, sample in zip(images, samples, strict=True)
            ]
        return {
            "pixel_values": self.images.pixel_values(images),
            **self.token_tensors([s["captions"] for s in samples]),
        }

    def token_tensors(self, captions: list[list[str]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` of the captions of each image, each (I * K, L)."""
        per_image = max(map(len, captions))
        rows = [self._row(text) for group in captions for text in [*group, *[None] * (per_image - len(group))]]
        length = max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad),
            "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORE),
        }
        for i, (ids, labels) in enumerate(rows):
            batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][i, : len(ids)] = 1
            batch["labels"][i, : len(ids)] = torch.tensor(labels)
        return batch

    def _row(self, caption: str | None) -> tuple[list[int], list[int]]:
        if caption is None:
            return [self.start], [IGNORE]
        before = [self.start, *self.prompt_ids]
        targets = [*self.tokenizer(caption, add_special_tokens=False)["input_ids"], self.end]
        targets = targets[: self.max_txt_len - len(before)]
        return before + targets, [IGNORE] * len(before) + targets


class ImageCollator:
    """Batches to caption: pixels and the ids of their images. No caption can be in them: the samples' captions are not
    looked at, so that nothing generated from such a batch has seen its reference."""

    def __init__(self, processor, skip_bad_images: bool = False):
        self.image_processor, self.skip_bad_images = processor.image_processor, skip_bad_images

    def __call__(self, samples: list[dict]) -> dict:
        """`pixel_values` (I, 3, H, W) of the I readable images, `image_ids` of all samples, and `errors`, the ImageError
        of each that is not readable by its id. Without `skip_bad_images` such an error is raised."""
        images, errors = [], {}
        for sample in samples:
            try:
                images.append(open_image(sample["image"]))
            except ImageError as error:
                if not self.skip_bad_images:
                    raise
                errors[sample["image_id"]] = error
        ids = [sample["image_id"] for sample in samples]
        return {"pixel_values": self.pixel_values(images) if images else None, "image_ids": ids, "errors": errors}

    def pixel_values(self, images) -> torch.Tensor:
        """(I, 3, H, W) float32 of RGB PIL images."""
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


def prompt_tokens(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, without special tokens."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []

"""Records -> batches. Nothing else makes one."""

import numpy as np
import torch
from PIL import Image

from data import ImageError, open_image
from models.families import special_tokens

IGNORE = -100  # torch's cross-entropy passes over targets of this value


class CaptionCollator:
    """Training batches: pixels, decoder inputs, and labels that are -100 wherever nothing is to be learnt.

    A sample is `{"image": anything data.open_image takes, "captions": [str, ...], "image_id": str, "epoch": int}`, its
    captions being those that share one encoding of the image. With I images and at most K captions an image the batch
    holds `pixel_values` (I, 3, H, W) and `input_ids`, `attention_mask`, `labels` (I * K, L), the captions of an image in
    neighbouring rows. An image with fewer than K captions is filled up with rows that have no label. Samples that have
    "features" (models/features.py) in place of "image" make `pixel_values` of these: (I, patches + 1, hidden).

    With the prompt "a picture of " and the caption "a dog runs" the row is

        tokens          [DEC]    a  picture   of     a   dog  runs  [SEP]  [PAD]
        input_ids       30522 1037     3861 1997  1037  3899  3216    102      0
        attention_mask      1    1        1    1     1     1     1      1      0
        labels           -100 -100     -100 -100  1037  3899  3216    102   -100

    Labels stand at their own token; the objective shifts them, once. A caption longer than `max_txt_len` tokens
    (prompt and both ends counted in) is cut, and then has no [SEP]: it did not end there.
    """

    def __init__(
        self, processor, config, *, max_txt_len: int = 40, prompt: str = "", augmentation=None, fast_jpeg: bool = False
    ):
        self.tokenizer = processor.tokenizer
        self.images = ImageCollator(processor, fast_jpeg=fast_jpeg)
        self.augmentation = augmentation
        self.start, self.end, self.pad = special_tokens(config)
        self.prompt_ids = prompt_tokens(self.tokenizer, prompt)
        self.max_txt_len = max_txt_len
        if len(self.prompt_ids) + 2 >= max_txt_len:
            raise ValueError(f"The prompt '{prompt}' leaves no room for a caption in max_txt_len {max_txt_len}.")

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": self._pixel_values(samples),
            **self.token_tensors([s["captions"] for s in samples]),
        }

    def _pixel_values(self, samples: list[dict]) -> torch.Tensor:
        if "features" in samples[0]:
            return torch.stack([sample["features"] for sample in samples])
        images = [self.images.open(sample["image"]) for sample in samples]
        if self.augmentation:
            images = [
                self.augmentation(image, sample["epoch"], sample["image_id"], sample["captions"])
                for image, sample in zip(images, samples, strict=True)
            ]
        return self.images.pixel_values(images)

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
    looked at, so that nothing generated from such a batch has seen its reference.

    With `fast_jpeg`, large JPEGs are decoded at the smallest of libjpeg's scales that is twice what the model sees.
    `corruption` is data.corruption's: noise on every image, drawn by its id.
    """

    def __init__(self, processor, skip_bad_images: bool = False, fast_jpeg: bool = False, corruption=None):
        self.image_processor, self.skip_bad_images = processor.image_processor, skip_bad_images
        self.corruption = corruption
        self.size = _plain_size(self.image_processor)
        if self.size:
            # What the processor makes of each of a channel's 256 values, (3, 256): its own rounding, bit for bit.
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
            self.values = np.asarray(self.image_processor(ramp, do_resize=False, return_tensors="np")["pixel_values"])
            self.values = np.ascontiguousarray(self.values[0, :, 0], dtype=np.float32)
        self.decoded_size = tuple(2 * side for side in self.size) if self.size and fast_jpeg else None

    def __call__(self, samples: list[dict]) -> dict:
        """`pixel_values` (I, 3, H, W) of the I readable images, `image_ids` of all samples, and `errors`, the ImageError
        of each that is not readable by its id. Without `skip_bad_images` such an error is raised. Samples with "features"
        in place of "image" give these as `pixel_values`."""
        ids = [sample["image_id"] for sample in samples]
        if "features" in samples[0]:
            pixel_values = torch.stack([sample["features"] for sample in samples])
            return {"pixel_values": pixel_values, "image_ids": ids, "errors": {}}
        images, errors = [], {}
        for sample in samples:
            try:
                image = self.open(sample["image"])
                images.append(self.corruption(image, 0, sample["image_id"]) if self.corruption else image)
            except ImageError as error:
                if not self.skip_bad_images:
                    raise
                errors[sample["image_id"]] = error
        return {"pixel_values": self.pixel_values(images) if images else None, "image_ids": ids, "errors": errors}

    def open(self, image) -> Image.Image:
        return open_image(image, size=self.decoded_size)

    def pixel_values(self, images) -> torch.Tensor:
        """(I, 3, H, W) float32 of RGB PIL images: the values of the processor's Pillow backend, whether or not
        torchvision is there, in half of its time."""
        if not self.size:
            return self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        height, width = self.size
        batch = np.empty((len(images), 3, height, width), dtype=np.float32)
        for image, planes in zip(images, batch, strict=True):
            pixels = np.asarray(image.resize((width, height), self.image_processor.resample))
            for channel in range(3):
                np.take(self.values[channel], pixels[:, :, channel], out=planes[channel], mode="clip")
        return torch.from_numpy(batch)


def _plain_size(image_processor) -> tuple[int, int] | None:
    """(height, width) of a processor that resizes to just this and then maps values one by one, as BLIP's does; None if
    it may do more."""
    p, size = image_processor, image_processor.size
    is_blips = type(p).__name__ in ("BlipImageProcessor", "BlipImageProcessorPil", "BlipImageProcessorFast")
    more = getattr(p, "do_center_crop", None) or getattr(p, "do_pad", None)
    if not is_blips or not p.do_resize or more or not isinstance(p.resample, int) or "height" not in size:
        return None
    return (size["height"], size["width"]) if size["height"] and size["width"] else None


def prompt_tokens(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, without special tokens."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []

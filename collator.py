"""Records -> batches. All batches are made here."""

import copy

import numpy as np
import torch
import xxhash
from PIL import Image

from common.errors import UserError
from common.processes import in_threads
from common.prompts import columns_in, plain
from data import ImageError, open_image
from data.prompts import PROMPTS
from models.families import decoder_prompt, family_of, is_encoder_decoder, placeholders, special_tokens
from models.vision import FEATURES, LAYERS

IGNORE = -100  # torch's cross-entropy ignores targets of this value


class CaptionCollator:
    """Training batches: pixels, decoder inputs, and labels that are -100 wherever there is nothing to learn.

    A sample is `{"image": anything data.open_image takes, "captions": [str, ...], "image_id": str, "epoch": int}`, its
    captions being those that share one encoding of the image and one prompt: data.prompts.PROMPTS has it, if it is the
    sample's own. With I images and at most K captions per image the batch
    holds `pixel_values` (I, 3, H, W) and `input_ids`, `attention_mask`, `labels` (I * K, L), the captions of an image in
    neighbouring rows. An image with fewer than K captions is padded with rows that have no labels. Samples with
    "features" (training/feature_cache.py) instead of "image" have these as `pixel_values`, or as a chat model's inputs.

    With BLIP, the prompt "a picture of " and the caption "a dog runs" the row is

        tokens          [DEC]    a  picture   of     a   dog  runs  [SEP]  [PAD]
        input_ids       30522 1037     3861 1997  1037  3899  3216    102      0
        attention_mask      1    1        1    1     1     1     1      1      0
        labels           -100 -100     -100 -100  1037  3899  3216    102   -100

    Labels are aligned with their own token; the objective shifts them, once. Other families have their own prompt in
    front (models/families.py), image placeholders included; where an encoder reads it (T5), `input_ids` are the prompt
    alone, and `decoder_input_ids` and `labels` the caption. `rows_per_image` is K, if K is more than 1 and the model
    does not infer it; `prompt_length` is the number of tokens before a caption in its row.

    With `prompts_only` a batch is for drawing captions: the inputs of I images end with their prompts, and `labels`
    (I * K, 1 + L) are the references' target tokens after an initial -100.

    A caption longer than `max_txt_len` tokens (including the prompt and the start and end tokens, but not placeholders,
    an encoder's prompt or a chat's) is truncated, and then has no end token: it did not end there.
    """

    def __init__(
        self,
        processor,
        config,
        *,
        max_txt_len: int = 40,
        prompt: str = "",
        system_prompt: str | None = None,
        augmentation=None,
        text_augmentation=None,
        fast_jpeg: bool = False,
        prompts_only: bool = False,
    ):
        self.prompts_only = prompts_only
        self.images = ImageCollator(processor, config, prompt=prompt, system_prompt=system_prompt, fast_jpeg=fast_jpeg)
        self.augmentation, self.text_augmentation = augmentation, text_augmentation
        self.max_txt_len = max_txt_len
        self.room_behind(self.images.prompt)

    def __call__(self, samples: list[dict]) -> dict:
        captions = [sample["captions"] for sample in samples]
        if self.text_augmentation:
            captions = [self.text_augmentation(s["captions"], s["epoch"], self._draw_id(s)) for s in samples]
        per_image = max(map(len, captions))
        prompts = list(map(self.images.prompt_of, samples))
        if "features" in samples[0]:
            inputs = self.images.of_features([sample["features"] for sample in samples], prompts)
        else:
            images = in_threads(self._image, samples)
            inputs = self.images.inputs(images, prompts)
        inputs["image_ids"] = [sample["image_id"] for sample in samples]
        return self._with_captions(inputs, captions, prompts, per_image)

    def for_evaluation(self) -> "CaptionCollator":
        """The same collator without augmentation, and with captions as targets."""
        plain = copy.copy(self)
        plain.augmentation = plain.text_augmentation = None
        plain.prompts_only = False
        return plain

    @staticmethod
    def _draw_id(sample: dict) -> str:
        """The id that an augmentation is drawn by: each sample of an image gets its own draw."""
        return f"{sample['image_id']}#{sample.get('first_caption', 0)}"

    def _image(self, sample: dict) -> Image.Image:
        image = self.images.pixels.open(sample["image"])
        if self.augmentation:
            texts = [*sample["captions"], self.images.prompt_of(sample)]  # a question may name a side, too
            image = self.augmentation(image, sample["epoch"], self._draw_id(sample), texts)
        return image

    def token_tensors(self, captions: list[list[str]]) -> dict[str, torch.Tensor]:
        """The batch of each image's captions, without pixels. Not for chat models, whose prompt depends on them."""
        prompts = [self.images.prompt] * len(captions)
        return self._with_captions(self.images.prompts(prompts), captions, prompts, max(map(len, captions)))

    def room_behind(self, prompt: str) -> int:
        """How many tokens of a caption are learnt behind this prompt."""
        room = self.max_txt_len - self.images.words_in(prompt)
        if room < 2:
            raise UserError(f"The prompt '{prompt}' leaves no room for a caption in max_txt_len {self.max_txt_len}.")
        return room

    def _with_captions(self, inputs: dict, captions: list[list[str]], prompts: list[str], per_image: int) -> dict:
        targets = []
        for group, prompt in zip(captions, prompts, strict=True):
            room = self.room_behind(prompt)
            targets += [ids[:room] for ids in self.images.target_ids(group, prompt)]
            targets += [[]] * (per_image - len(group))
        padded, lengths = pad_rows(targets, self.images.pad)
        if self.prompts_only:
            labels = padded.masked_fill(torch.arange(padded.shape[1]) >= lengths[:, None], IGNORE)
            return inputs | {"labels": torch.nn.functional.pad(labels, (1, 0), value=IGNORE)}
        return self.images.with_targets(inputs, padded, lengths)


def pad_rows(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, L) token ids, padded with `pad` on the right, and the length of each row."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), pad)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded, lengths


def rolled(inputs: dict, names: set[str], shape: tuple, places: torch.Tensor) -> dict:
    """`inputs`, those of these names and this (rows, L) shape rolled to the left by (rows,) places."""
    order = (torch.arange(shape[1], device=places.device) + places[:, None]) % shape[1]
    along = {name: inputs[name] for name in names & inputs.keys() if inputs[name].shape == shape}
    return inputs | {name: value.gather(1, order) for name, value in along.items()}


class ImageCollator:
    """Batches to caption: pixels, the prompt, and the image ids. The samples' captions are never read, so nothing
    generated from such a batch has seen its reference. `corruption` is from data.corruption: noise on every image,
    drawn by its id.

    `prompt` is that of every sample without one of its own (data.prompts.PROMPTS); one that holds columns is of none. Shorter
    prompts of a batch are padded on the left, those that an encoder reads on the right. `system_prompt` is for chat models. With `contents` a batch has
    `contents` (I,), a hash of each readable image's pixels. `start_with` are words that a chat model's answers begin with.
    """

    def __init__(
        self,
        processor,
        config,
        *,
        prompt: str = "",
        system_prompt: str | None = None,
        skip_bad_images=False,
        fast_jpeg=False,
        corruption=None,
        contents=False,
        start_with: str | None = None,
    ):
        self.contents = contents
        self.corruption, self.config = corruption, config
        self.template = prompt if columns_in(prompt) else None
        self.prompt = prompt = "" if self.template else plain(prompt)
        self.processor, self.pixels = processor, Pixels(processor.image_processor, fast_jpeg)
        self.skip_bad_images = skip_bad_images
        self.family, self.kind = family_of(config), config.model_type
        family = self.family
        self.joint, self.words = family.prompt is None, prompt.rstrip()
        self.system = {"system": system_prompt} if system_prompt else {}
        if start_with and not family.chats:
            raise UserError(
                f"--start_with is for chat models: a caption of family '{self.kind}' continues --prompt, and --keep_prompt keeps it."
            )
        if system_prompt and not family.chats:
            raise UserError(f"A model of family '{self.kind}' takes no system prompt: leave out --system_prompt.")
        self.placeholders = placeholders(config, processor)
        if self.joint:
            self.lead, self.end = family.answer(processor, prompt, **self.system)
            self.pad = processor.tokenizer.pad_token_id
        else:
            self.end, self.pad = special_tokens(config)
        self.decoder_prompt = decoder_prompt(config)
        self.reads_padding = family.reads_padding or not (self.joint or self.decoder_prompt)
        if self.joint:
            self.started = self.lead + start_with.strip() if start_with else ""
            self.text = self._text(prompt)
            # As apply_chat_template does.
            start = processor.tokenizer.bos_token
            self.adds_special_tokens = not family.writes_special_tokens and not (start and self.text.startswith(start))
        else:
            self.before = family.prompt(processor, config, self.words)
        self.words_before = self.words_in(self.prompt)

    def prompt_of(self, sample: dict) -> str:
        """What is asked about a sample's image. UserError if the prompt holds columns, and the sample has none filled in."""
        prompt = next(iter(sample.get(PROMPTS) or ()), None)
        if prompt is None and self.template:
            raise UserError(
                f"The prompt {self.template!r} holds columns, and there is no row to take them from: give a --prompt without, "
                "or caption a table that has them."
            )
        return self.prompt if prompt is None else prompt

    def words_in(self, prompt: str) -> int:
        """How many tokens of a caption's row are its start and this prompt's words; 0 if an encoder or a chat holds them."""
        if self.joint or is_encoder_decoder(self.config):
            return 0
        image_token = getattr(self.config, "image_token_id", None)
        return sum(token != image_token for token in self._before(prompt)["input_ids"])

    def _text(self, prompt: str) -> str:
        return self.family.joint_prompt(self.processor, prompt, **self.system) + self.started

    def _before(self, prompt: str) -> dict[str, list[int]]:
        words = prompt.rstrip()
        return self.before if words == self.words else self.family.prompt(self.processor, self.config, words)

    def __call__(self, samples: list[dict]) -> dict:
        """The model inputs of the I readable images (`pixel_values` (I, 3, H, W), `input_ids` and `attention_mask`
        (I, P) of the prompt), `image_ids` of all samples, and `errors`, {position: ImageError} of the unreadable ones;
        and where samples have prompts of their own `prompts`, those of the readable images.
        Without `skip_bad_images` such an error is raised. Samples with "features" instead of "image" have these as
        `pixel_values`."""
        ids, prompts = [sample["image_id"] for sample in samples], list(map(self.prompt_of, samples))
        has_prompts = any(PROMPTS in sample for sample in samples)
        if "features" in samples[0]:
            inputs = self.of_features([sample["features"] for sample in samples], prompts)
            inputs |= {"prompts": prompts} if has_prompts else {}
            return {**inputs, "image_ids": ids, "errors": {}}
        opened = in_threads(self._image, samples)
        errors = {i: image for i, image in enumerate(opened) if isinstance(image, ImageError)}
        images = [image for image in opened if not isinstance(image, ImageError)]
        prompts = [prompt for i, prompt in enumerate(prompts) if i not in errors]
        inputs = {"prompts": prompts} if has_prompts else {}
        if self.contents:
            inputs["contents"] = torch.tensor(in_threads(_content, images), dtype=torch.long)
        return {**inputs, **(self.inputs(images, prompts) if images else {}), "image_ids": ids, "errors": errors}

    def _image(self, sample: dict) -> Image.Image | ImageError:
        try:
            image = self.pixels.open(sample["image"])
        except ImageError as error:
            if not self.skip_bad_images:
                raise
            return error
        return self.corruption(image, 0, sample["image_id"]) if self.corruption else image

    def inputs(self, images: list, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The model inputs for RGB PIL images and their prompts."""
        if self.family.image_inputs:
            processed = self.processor.image_processor(images=images, return_tensors="pt")
            pixels = {ours: processed[theirs] for theirs, ours in self.family.image_inputs.items()}
            return {**pixels, **self.prompts(prompts)}
        if not self.joint:
            return {"pixel_values": self.pixels(images), **self.prompts(prompts)}
        inputs = self.processor(
            add_special_tokens=self.adds_special_tokens,
            images=[[image] for image in images],
            text=[self.text if prompt == self.prompt else self._text(prompt) for prompt in prompts],
            padding=True,
            # A caption follows directly after its prompt, but for that of an encoder.
            padding_side="right" if self.decoder_prompt else "left",
            return_tensors="pt",
        )
        inputs.pop("labels", None)  # PaliGemma's processor makes some, with no targets in them
        inputs = dict(inputs)
        if self.family.reads_padding:  # Kosmos-2's processor pads on the right, whatever it is told
            inputs = rolled(
                inputs, self.family.text_inputs, inputs["input_ids"].shape, inputs["attention_mask"].sum(dim=1)
            )
        return inputs

    def of_features(self, features: list, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The model inputs for kept features of images (training/feature_cache.py). Those of a chat model hold its prompt, and
        are joined: rows of text are padded on the left, and all else follows one another."""
        if not self.joint:
            return {"pixel_values": torch.stack(features), **self.prompts(prompts)}
        longest, inputs = max(one["input_ids"].shape[1] for one in features), {}
        for name in features[0]:
            values = [one[name] for one in features]
            if name in self.family.text_inputs:
                fill = self.pad if name == "input_ids" else 0
                values = [torch.nn.functional.pad(v, (longest - v.shape[1], 0), value=fill) for v in values]
            inputs[name] = torch.cat(values, dim=int(name == LAYERS))
        return inputs

    def prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (images, P) of these prompts."""
        of_prompt, inputs = {prompt: self._before(prompt) for prompt in dict.fromkeys(prompts)}, {}
        for name in self.before:
            rows = [of_prompt[prompt][name] for prompt in prompts]
            left = name == "input_ids" and self.decoder_prompt is None
            padded, lengths = pad_rows([row[::-1] for row in rows] if left else rows, self.pad)
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            inputs[name] = padded.flip(1) if left else padded
            inputs[name.replace("input_ids", "attention_mask")] = mask.flip(1) if left else mask
        return inputs

    def with_targets(self, inputs: dict, targets: torch.Tensor, lengths: torch.Tensor) -> dict:
        """A training batch: the model inputs of I images with their prompts, and after each prompt its targets.

        inputs: as made by this collator, images encoded or not; inputs along the text are repeated K times.
        targets: (I * K, L) token ids, of which the first `lengths` (I * K,) of each row count. ValueError for an input
        of the prompt's length whose values for a caption's tokens are unknown.
        """
        images, length = inputs["input_ids"].shape
        times = len(targets) // images
        counted = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
        labels = targets.masked_fill(~counted, IGNORE)
        along = {"input_ids": targets, "attention_mask": counted, **self.family.caption_tokens}
        image_inputs = {"pixel_values", FEATURES, LAYERS, *self.family.image_inputs.values()}
        # BLIP itself handles fewer images than rows.
        batch = {"rows_per_image": times} if times > 1 and self.kind != "blip" else {}
        for name, value in inputs.items():
            if name in self.family.text_inputs:
                value = value.repeat_interleave(times, dim=0)
            elif name not in image_inputs and getattr(value, "shape", ())[:2] == (images, length):
                raise UserError(
                    f"The input '{name}' runs along the prompt, but its values for a caption's tokens are unknown: "
                    "the family's row in models/families.py must give them in caption_tokens."
                )
            if name in along and self.decoder_prompt is None:
                more = along[name]
                if isinstance(more, int):
                    more = torch.full_like(targets, more)
                elif isinstance(more, str):  # LAST
                    more = value[:, -1:].expand(-1, targets.shape[1], *value.shape[2:])
                value = torch.cat([value, more.to(value.dtype)], dim=1)
            batch[name] = value
        if self.decoder_prompt is not None:
            before = torch.tensor(self.decoder_prompt, device=targets.device).expand(len(targets), -1)
            batch["decoder_input_ids"] = torch.cat([before, targets[:, :-1]], dim=1)
            batch["labels"] = torch.cat([torch.full_like(before[:, 1:], IGNORE), labels], dim=1)
        else:
            prompt = batch["input_ids"][:, :length]
            batch["labels"] = torch.cat([torch.full_like(prompt, IGNORE), labels], dim=1)
            pads = length - inputs["attention_mask"].sum(dim=1)
            if self.reads_padding and pads.any():  # then rows begin with their prompts, as alone
                batch = rolled(batch, self.family.text_inputs, batch["labels"].shape, pads.repeat_interleave(times))
                length -= int(pads.max())
            if self.kind != "blip":
                batch["prompt_length"] = length
        return batch

    def target_ids(self, captions: list[str], prompt: str | None = None) -> list[list[int]]:
        """Token ids of each caption as it follows the prompt (default: the collator's), and its end."""
        tokenizer, before, lead = self.processor.tokenizer, 0, self.lead if self.joint else ""
        words = self.words if prompt is None else prompt.rstrip()
        if not self.joint and self.decoder_prompt is None and words:
            # After a word, a caption's first word may be tokenized differently than at the start.
            before, lead = len(tokenizer(words, add_special_tokens=False)["input_ids"]), f"{words} "
        texts = [lead + caption for caption in captions]
        return [[*ids[before:], self.end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _content(image: Image.Image) -> int:
    digest = xxhash.xxh3_64(str(image.size).encode())
    digest.update(image.tobytes())
    return digest.intdigest() - 2**63


class Pixels:
    """Images -> pixel_values, with a processor's settings.

    With `fast_jpeg`, large JPEGs are decoded at the smallest of libjpeg's scales that is twice the model's input size.
    """

    def __init__(self, image_processor, fast_jpeg: bool = False):
        self.image_processor = image_processor
        self.size = _plain_size(image_processor)
        if self.size:
            # The processor's output for each of a channel's 256 values, (3, 256): its own rounding, bit for bit.
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
            values = np.asarray(image_processor(ramp, do_resize=False, return_tensors="np")["pixel_values"])
            self.values = np.ascontiguousarray(values.reshape(3, 256), dtype=np.float32)
        self.decoded_size = tuple(2 * side for side in self.size) if self.size and fast_jpeg else None

    def open(self, image) -> Image.Image:
        """The RGB image of anything data.open_image takes."""
        return open_image(image, size=self.decoded_size)

    def __call__(self, images) -> torch.Tensor:
        """(I, 3, H, W) float32 of RGB PIL images: the values of the processor's Pillow backend, with or without
        torchvision, in half the time."""
        if not self.size:
            return self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        height, width = self.size
        batch = np.empty((len(images), 3, height, width), dtype=np.float32)

        def fill(row: int) -> None:
            pixels = np.asarray(images[row].resize((width, height), self.image_processor.resample))
            for channel in range(3):
                np.take(self.values[channel], pixels[:, :, channel], out=batch[row, channel], mode="clip")

        in_threads(fill, range(len(images)))
        return torch.from_numpy(batch)


# Settings of processors that cut an image into tiles, whose number depends on its shape.
TILING = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan", "image_grid_pinpoints", "max_image_tiles")


def input_size(image_processor) -> tuple[int, int] | None:
    """(height, width) that a processor resizes every image to, as the target of augmentation. None if that depends on
    the image: the processor sets a number of pixels or the length of an edge, or cuts tiles."""
    if any(getattr(image_processor, name, None) for name in TILING):
        return None
    cropped = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", None) else None
    for size in (cropped, getattr(image_processor, "size", None)):
        if size and size.get("height") and size.get("width"):
            return size["height"], size["width"]
    return None


def _plain_size(image_processor) -> tuple[int, int] | None:
    """(height, width) of a processor that resizes to exactly this size and then maps values one by one, as BLIP's does;
    None if it may do more."""
    p, size = image_processor, getattr(image_processor, "size", None)
    is_blips = type(p).__name__ in ("BlipImageProcessor", "BlipImageProcessorPil", "BlipImageProcessorFast")
    more = getattr(p, "do_center_crop", None) or getattr(p, "do_pad", None)
    if not is_blips or not p.do_resize or more or not isinstance(p.resample, int) or "height" not in size:
        return None
    return (size["height"], size["width"]) if size["height"] and size["width"] else None

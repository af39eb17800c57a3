"""Images become captions here, and only here."""

import contextlib
import logging
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from collator import ImageCollator, prompt_tokens
from models.decoding import generate
from models.families import special_tokens
from models.loading import load_model

logger = logging.getLogger(__name__)

# What a caption is generated with where neither a flag nor the checkpoint's generation_config.json says otherwise.
DEFAULTS = {
    "num_beams": 5,
    "max_new_tokens": 30,
    "min_new_tokens": None,
    "length_penalty": 1.0,
    "early_stopping": True,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def processes() -> PartialState:
    """This process among those that torchrun or accelerate launch started; joins them on its first call."""
    return PartialState(cpu=not torch.accelerator.is_available())


class Captioner:
    """A model, its processor and the settings it captions with.

    `settings` are those of `generate`; one that is None or absent is the checkpoint's own (its generation_config.json),
    else that of DEFAULTS. `prompt` None is the prompt that the checkpoint was trained with. The prompt's words are left
    out of the captions, unless `keep_prompt`. `fast_jpeg` and `corruption` are ImageCollator's.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        prompt=None,
        keep_prompt=False,
        autocast=None,
        fast_jpeg=False,
        corruption=None,
        **settings,
    ):
        self.model, self.processor, self.keep_prompt, self.autocast = model, processor, keep_prompt, autocast
        self.fast_jpeg, self.corruption = fast_jpeg, corruption
        self.prompt = prompt if prompt is not None else getattr(model.config, "caption_prompt", "")
        own = model.generation_config
        self.settings = {name: getattr(own, name, None) for name in DEFAULTS}
        self.settings = {name: DEFAULTS[name] if value is None else value for name, value in self.settings.items()}
        self.settings |= {name: value for name, value in settings.items() if value is not None}
        if self.settings["num_beams"] == 1:  # they mean nothing without beams, and generate warns of each
            self.settings.pop("length_penalty"), self.settings.pop("early_stopping")
        self.start, self.end, _ = special_tokens(model.config)
        self.prompt_ids = prompt_tokens(processor.tokenizer, self.prompt)

    @classmethod
    def from_pretrained(cls, model_name_or_path, *, device=None, bf16=None, fast_attention=True, revision="main", **kw):
        """A captioner on `device` (default: this process's own GPU, else the CPU), in bfloat16 where the GPU can."""
        model, processor = load_model(model_name_or_path, fast_attention=fast_attention, revision=revision)
        device = torch.device(device) if device else processes().device
        if bf16 is None:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return cls(model.to(device).eval(), processor, autocast=torch.bfloat16 if bf16 else None, **kw)

    def save_settings(self) -> None:
        """Write prompt and settings into the model's configs, so that its checkpoints are captioned alike."""
        self.model.config.caption_prompt = self.prompt
        self.model.generation_config.update(**{k: v for k, v in self.settings.items() if v is not None})

    def description(self) -> dict:
        """The settings as coco_metrics.json records them."""
        precision = str(self.autocast).removeprefix("torch.") if self.autocast else "float32"
        how = {"precision": precision, "fast_jpeg": self.fast_jpeg}
        if self.corruption:
            how["corrupt"] = self.corruption.spec
        return {"prompt": self.prompt, "keep_prompt": self.keep_prompt, **self.settings, **how}

    def __call__(self, images: list) -> list[str]:
        """One caption an image, for a list of anything that data.open_image takes."""
        samples = [{"image": image, "image_id": str(i)} for i, image in enumerate(images)]
        batch = ImageCollator(self.processor, fast_jpeg=self.fast_jpeg, corruption=self.corruption)(samples)
        return [captions[0] for captions in self.caption_batch(batch)]

    @torch.inference_mode()
    def caption_batch(self, batch: dict) -> list[list[str]]:
        """`num_return_sequences` (default 1) captions for each image of an ImageCollator's batch."""
        pixel_values = batch["pixel_values"].to(self.model.device, non_blocking=True)
        images = pixel_values.shape[0]
        # generate() of BLIP drops the last token, as it expects the prompt to end in [SEP].
        prompt = torch.tensor([self.start, *self.prompt_ids, self.end], device=pixel_values.device).repeat(images, 1)
        precision = (
            torch.autocast(pixel_values.device.type, dtype=self.autocast) if self.autocast else contextlib.nullcontext()
        )
        with precision:
            tokens = generate(self.model, pixel_values=pixel_values, input_ids=prompt, **self.settings)
        if not self.keep_prompt:
            tokens = tokens[:, 1 + len(self.prompt_ids) :]
        texts = [" ".join(t.split()) for t in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        per_image = len(texts) // images
        return [texts[i * per_image : (i + 1) * per_image] for i in range(images)]

    def stream(self, samples: Dataset, *, batch_size: int = 16, num_workers: int = 0, skip_bad_images: bool = False):
        """Yields (image_id, [captions]) of `samples` (a list or map-style dataset of records) in their order.

        An unreadable image raises its ImageError, or with `skip_bad_images` is yielded as (image_id, ImageError)."""
        loader = DataLoader(
            samples,
            batch_size=batch_size,
            collate_fn=ImageCollator(self.processor, skip_bad_images, self.fast_jpeg, self.corruption),
            num_workers=num_workers,
            pin_memory=self.model.device.type == "cuda",
        )
        for batch in loader:
            errors = batch["errors"]
            captions = iter(self.caption_batch(batch) if len(errors) < len(batch["image_ids"]) else [])
            for image_id in batch["image_ids"]:
                yield image_id, errors[image_id] if image_id in errors else next(captions)

    def caption_split(self, records, *, batch_size: int = 16, num_workers: int = 0) -> dict[str, str]:
        """`{image_id: caption}` of a whole split, in its order. In several processes each captions every n-th image,
        and all return the whole."""
        state = processes()
        share = Subset(records, range(state.process_index, len(records), state.num_processes))
        was_training = self.model.training
        self.model.eval()
        pairs = self.stream(share, batch_size=batch_size, num_workers=num_workers)
        progress = show_progress(pairs, len(share))
        captions = {image_id: texts[0] for image_id, texts in progress}
        self.model.train(was_training)
        if state.num_processes > 1:
            captions = {k: v for part in gather_object([captions]) for k, v in part.items()}
        return {image_id: captions[image_id] for image_id in records["image_id"]}


def show_progress(items, total: int, doing: str = "captioning"):
    """A bar for people, or for a log file a line every half minute; on the main process only."""
    return tqdm(
        items,
        total=total,
        desc=doing,
        disable=not processes().is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        leave=False,
    )

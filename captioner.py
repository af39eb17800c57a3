"""Images -> captions. All captioning goes through this module."""

import contextlib
import copy
import logging
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Subset

from collator import ImageCollator, pad_rows
from common.errors import UserError
from common.loaders import ahead, data_loader
from common.processes import captions_in_bfloat16, keep_memory, processes, show_progress
from common.text import Caption
from metrics.coco_caption.text_checks import remove_illegal_characters
from models.decoding import DEFAULTS, WITHOUT_BEAMS, drop_leftovers, generate
from models.decoding_step import CACHE, release_graphs
from models.families import ENCODED, base_model, family_of, model_inputs
from models.loading import load_model
from models.onnx_model import DECODER
from models.prefix import read_prompts
from models.sampling import seeded
from models.vision import check_repeatable, encode_once, encodes_once, with_image_features

logger = logging.getLogger(__name__)

# For these generate refuses integers, which is what JSON and sliders turn 2.0 into.
FLOATS = ("length_penalty", "repetition_penalty", "temperature", "top_p")


class UnfitLengths(UserError):
    """The prompt and the requested lengths do not fit each other or the model."""


def check_lengths(config, prompt: int, settings: dict) -> None:
    """UnfitLengths if `prompt` tokens and max_new_tokens are more than the model has positions for, or if
    min_new_tokens is more than max_new_tokens."""
    least, new = settings["min_new_tokens"] or 0, settings["max_new_tokens"]
    if least > new:
        raise UnfitLengths(f"min_new_tokens, {least}, is more than max_new_tokens, {new}.")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and prompt + new - 1 > positions:  # the last token is not read again
        raise UnfitLengths(
            f"The prompt's {prompt} tokens and max_new_tokens, {new}, are more than the {positions} positions of the "
            "model: shorten the prompt, or lower max_new_tokens."
        )


class Captioner:
    """A model, its processor and the settings it captions with.

    `settings` are those of `generate`; one that is None or absent is taken from the checkpoint (its
    generation_config.json), else from DEFAULTS. Nothing else of that file counts: models.decoding.drop_leftovers takes it
    out of the model. `prompt` None is the prompt that the checkpoint was trained with; one that holds columns (data.prompts)
    is for records that have theirs filled in, and `own_questions` says that records' own are the questions of conversations.
    `system_prompt` and `start_with`, words that answers begin with, are for chat models. The prompt's words are left out of
    the captions, unless `keep_prompt`; `remove_illegal_characters` removes those of metrics.coco_caption.text_checks from
    every caption; both also if the checkpoint was trained with it. With `seed`, do_sample draws captions that depend on it, the
    image and the caption's number alone (models.sampling). `fast_jpeg` and `corruption` are ImageCollator's.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        prompt=None,
        system_prompt=None,
        own_questions=False,
        start_with=None,
        keep_prompt=False,
        autocast=None,
        fast_jpeg=False,
        corruption=None,
        remove_illegal_characters=False,
        seed=None,
        **settings,
    ):
        self.model, self.processor, self.autocast = model, processor, autocast
        self.fast_jpeg, self.corruption = fast_jpeg, corruption
        saved = getattr(model.config, "caption_text", {})
        self.keep_prompt = keep_prompt or saved.get("keep_prompt", False)
        self.filtered = remove_illegal_characters or saved.get("remove_illegal_characters", False)
        default = getattr(model.config, "caption_prompt", family_of(model.config).default_words)
        self.prompt, self.own_questions = default if prompt is None else prompt, own_questions
        self.system_prompt = saved.get("system_prompt") if system_prompt is None else system_prompt
        self.start_with = start_with and start_with.strip()
        asked = {"prompt": self.prompt, "system_prompt": self.system_prompt, "start_with": self.start_with}
        self.seed = seed if settings.get("do_sample") else None
        reading = {"fast_jpeg": fast_jpeg, "corruption": corruption, "contents": self.seed is not None}
        self.collator = ImageCollator(processor, model.config, **asked, **reading)
        self.asked = {n: float(v) if n in FLOATS else v for n, v in settings.items() if v is not None}
        drop_leftovers(base_model(model))
        self.settings = {name: getattr(model.generation_config, name, None) for name in DEFAULTS}
        self.settings = {name: DEFAULTS[name] if value is None else value for name, value in self.settings.items()}
        self.settings |= self.asked
        if self.settings["num_beams"] == 1:
            self.settings = {name: value for name, value in self.settings.items() if name not in WITHOUT_BEAMS}
        number, beams = self.settings.get("num_return_sequences", 1), self.settings["num_beams"]
        if number > beams and not self.settings.get("do_sample"):
            raise UserError(
                f"{number} captions per image are the best of as many beams, and num_beams is {beams}: raise it, or sample "
                "them with do_sample."
            )
        self.count_anew()

    def count_anew(self) -> None:
        """Begin to count captions: `written`, and those of them that were `cut` at max_new_tokens, without an end token."""
        self.written = self.cut = 0

    def counts(self) -> dict[str, int]:
        """What infer.py adds up over a run, besides images and errors, since the count began."""
        return {"cut": self.cut}

    def say_cut(self) -> None:
        """One line about the captions that were cut since the count began, if there are any."""
        if self.cut:
            numbers = (self.cut, self.written, self.settings["max_new_tokens"])
            logger.info("%d of %d captions were cut at max_new_tokens, %d: they have no end of their own", *numbers)

    def with_settings(self, prompt: str | None = None, **settings) -> "Captioner":
        """A captioner with another prompt or other settings of `generate`, otherwise the same; the model is shared."""
        return Captioner(
            self.model,
            self.processor,
            prompt=self.prompt if prompt is None else prompt,
            system_prompt=self.system_prompt,
            own_questions=self.own_questions,
            start_with=self.start_with,
            keep_prompt=self.keep_prompt,
            autocast=self.autocast,
            fast_jpeg=self.fast_jpeg,
            corruption=self.corruption,
            remove_illegal_characters=self.filtered,
            seed=self.seed,
            **self.asked | settings,
        )

    @classmethod
    def from_pretrained(cls, model_name_or_path, *, device=None, bf16=None, loading=None, **kw):
        """A captioner on `device` (default: this process's own GPU, else the CPU), with bfloat16 weights if `bf16`
        (default: captions_in_bfloat16). `loading` is passed to models.loading.load_model, the rest to the captioner."""
        loading, device = dict(loading or {}), torch.device(device) if device else processes().device
        if Path(model_name_or_path, DECODER).is_file():
            device = torch.device("cpu")  # where the graphs' inputs are
        if device.type == "cpu":
            keep_memory()
        bf16 = captions_in_bfloat16(device) if bf16 is None else bf16
        quantized = bool(loading.get("quantization"))
        if bf16 and not quantized:
            loading["dtype"] = "bfloat16"
        model, processor = load_model(model_name_or_path, **loading)
        if not getattr(model, "is_quantized", False):  # a quantized one is already on its device
            model = model.to(device)
        return cls(model.eval(), processor, autocast=torch.bfloat16 if bf16 and quantized else None, **kw)

    def save_settings(self) -> None:
        """Write prompt and settings into the model's configs, so that its checkpoints caption with them."""
        self.model.config.caption_prompt = self.prompt
        self.model.config.caption_text = {
            "keep_prompt": self.keep_prompt,
            "remove_illegal_characters": self.filtered,
            **self._asked(),
        }
        # Beams' settings of the checkpoint before would not let a greedy one be saved.
        self.model.generation_config.update(**dict.fromkeys(WITHOUT_BEAMS) | self.settings)

    def _asked(self) -> dict:
        """What is asked besides the prompt, if anything."""
        asked = {"system_prompt": self.system_prompt, "own_questions": self.own_questions}
        return {name: value for name, value in asked.items() if value}

    def description(self) -> dict:
        """The settings as coco_metrics.json records them."""
        precision = str(self.autocast or getattr(self.model, "precision", self.model.dtype)).removeprefix("torch.")
        settings = {"precision": precision, "fast_jpeg": self.fast_jpeg}
        if self.corruption:
            settings["corrupt"] = self.corruption.spec
        if self.filtered:
            settings["remove_illegal_characters"] = True
        if self.seed is not None:
            settings["seed"] = self.seed
        if self.start_with:
            settings["start_with"] = self.start_with
        return {"prompt": self.prompt, **self._asked(), "keep_prompt": self.keep_prompt, **self.settings, **settings}

    def __call__(self, images: list) -> list[str]:
        """One caption per image, for a list of anything that data.open_image takes."""
        batch = self.collator([{"image": image, "image_id": str(i)} for i, image in enumerate(images)])
        return [captions[0] for captions in self.caption_batch(batch)]

    def caption_batch(self, batch: dict, sweep=()) -> list[list[str]]:
        """`num_return_sequences` (default 1) captions for each image of an ImageCollator's batch; with `sweep`, a list of
        captioners that differ in their settings, one caption from each of them, with one encoding of the images."""
        if sweep:
            with torch.inference_mode():
                encoded = self.encode(batch)
                with self._precision():
                    read = read_prompts(self.model, model_inputs(self.model.config, encoded))
                encoded |= read if CACHE in read else {}
            encoded["prompts"] = batch.get("prompts", ())
            by_setting = [captioner.caption_batch(encoded) for captioner in sweep]
            return [[captions[0] for captions in of_image] for of_image in zip(*by_setting, strict=True)]
        tokens = self.generate_tokens(batch)
        self.written += len(tokens)
        cut = (tokens != self.collator.end).all(dim=1).tolist()
        self.cut += sum(cut)
        per_image = len(tokens) // len(batch["input_ids"])
        texts = self.texts(tokens, [prompt for prompt in batch.get("prompts", ()) for _ in range(per_image)])
        texts = list(map(Caption, texts, cut))
        return [texts[i : i + per_image] for i in range(0, len(texts), per_image)]

    @torch.inference_mode()
    def generate_tokens(self, batch: dict, **settings) -> torch.LongTensor:
        """(images * num_return_sequences, L) token ids that follow the prompt of each image of an ImageCollator's
        batch: including the end token where it was reached, then padding. `settings` are for generate, and override
        the captioner's own."""
        inputs, settings = self._on_device(batch), self.search(**settings)
        contents = inputs.get("contents")
        prompt = inputs["input_ids"]
        if self.collator.reads_padding:
            pads = prompt.shape[1] - inputs["attention_mask"].sum(dim=1)
            if pads.any():
                return self._generate_by_length(inputs, pads, settings)
        inputs.pop("contents", None)
        if contents is not None:
            settings = seeded(self.seed, contents.tolist(), settings)
        check_lengths(self.model.config, prompt.shape[1], settings)
        if self.model.config.model_type == "blip":
            # Its generate() takes no padding, and drops the last token, expecting [SEP].
            inputs["input_ids"] = torch.nn.functional.pad(prompt, (0, 1), value=self.collator.end)
            del inputs["attention_mask"]
        beams = max(settings.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        before = prompt.shape[1]
        if (started := self.collator.decoder_prompt) is not None:
            before = len(started)
            if before > 1:
                inputs["decoder_input_ids"] = torch.tensor(started, device=prompt.device).repeat(len(prompt), 1)
        with self._precision():
            inputs = read_prompts(self.model, model_inputs(self.model.config, inputs), beams)
            if beams > 1:
                check_repeatable(self.model, inputs, len(prompt))
            output = generate(self.model, **inputs, **settings)
        if isinstance(output, torch.Tensor):
            return output[:, before:]
        output.sequences = output.sequences[:, before:]
        return output

    def _generate_by_length(self, inputs: dict, pads: torch.Tensor, settings: dict) -> torch.LongTensor:
        """generate_tokens, for images with equally long prompts at a time: some families count positions from the beginning
        of the row, and padding there would be read."""
        rows, tokens = [], []
        for pad in pads.unique().tolist():
            rows.append((pads == pad).nonzero()[:, 0])
            group = {name: value[rows[-1]] for name, value in inputs.items()}
            along = group["input_ids"].shape
            names = self.collator.family.text_inputs & group.keys()
            group |= {name: group[name][:, pad:] for name in names if group[name].shape == along}
            tokens.append(self.generate_tokens(group, **settings).unflatten(0, (len(rows[-1]), -1)))
        longest = max(part.shape[2] for part in tokens)
        tokens = [torch.nn.functional.pad(f, (0, longest - f.shape[2]), value=self.collator.pad) for f in tokens]
        return torch.cat(tokens)[torch.cat(rows).argsort()].flatten(0, 1)

    def search(self, **settings) -> dict:
        """All that `generate` is told besides the model's inputs: `settings`, else the captioner's own; and which tokens
        end a caption, pad it, and are never in it."""
        settings = WITHOUT_BEAMS | self.settings | settings
        if self.model.config.model_type != "blip":  # whose generate() sets start and end itself
            settings |= {"eos_token_id": self.collator.end, "pad_token_id": self.collator.pad}
        if self.collator.placeholders:
            settings["suppress_tokens"] = self.collator.placeholders
        return settings

    def encode(self, batch: dict) -> dict:
        """The model inputs of `batch`, its images encoded once for everything computed from them, with gradients if
        the encoder is trained; families that cannot take encoded images keep the pixels."""
        inputs = self._on_device(batch)
        inputs.pop("labels", None)
        with self._precision():
            return encode_once(self.model, inputs)

    def texts(self, tokens: torch.LongTensor, prompts: list[str] | None = None) -> list[str]:
        """The captions of rows of generated tokens; `prompts` are those of the rows (default: the captioner's)."""
        if self.start_with:  # decoded with it: what follows may go on with its last word
            before = self.processor.tokenizer(self.start_with, add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            tokens = torch.cat([before.to(tokens.device).expand(len(tokens), -1), tokens], dim=1)
        texts = [" ".join(t.split()) for t in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        if self.filtered:
            texts = [remove_illegal_characters(text) for text in texts]
        if not self.keep_prompt:
            return texts
        prompts = prompts or [self.collator.words] * len(texts)
        return [f"{prompt.rstrip()} {text}".strip() for prompt, text in zip(prompts, texts, strict=True)]

    def rows(self, tokens: torch.LongTensor) -> list[list[int]]:
        """Generated token ids without padding, including the end token where it was reached."""
        end = self.collator.end
        return [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]

    def training_batch(self, batch: dict, rows: list[list[int]]) -> dict:
        """A batch whose targets are `rows` of token ids, equally many for each image of `batch`, after its prompt: for
        the log-probabilities of samples and candidates (objectives.cross_entropy.token_log_probs)."""
        batch = self._on_device(batch)
        batch.pop("labels", None)
        padded, lengths = (tensor.to(self.model.device) for tensor in pad_rows(rows, self.collator.pad))
        return self.collator.with_targets(batch, padded, lengths)

    def _on_device(self, batch: dict) -> dict:
        device, dtype = self.model.device, self.model.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        inputs |= {name: batch[name] for name in (ENCODED, CACHE) if name in batch}
        return with_image_features(self.model, inputs)

    def _precision(self):
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)

    def stream(self, samples: Dataset, *, batch_size: int, num_workers: int, skip_bad_images=False, sweep=()):
        """Yields (image_id, caption_batch's captions) of `samples` (a list or any dataset of records) in their order.

        An unreadable image raises its ImageError, or with `skip_bad_images` is yielded as (image_id, ImageError)."""
        collator = copy.copy(self.collator)
        collator.skip_bad_images = skip_bad_images
        loader = data_loader(
            samples,
            collator,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=self.model.device.type == "cuda",
        )
        for batch in loader if num_workers else ahead(loader):
            errors = batch["errors"]
            captions = iter(self.caption_batch(batch, sweep) if len(errors) < len(batch["image_ids"]) else [])
            for position, image_id in enumerate(batch["image_ids"]):
                yield image_id, errors[position] if position in errors else next(captions)

    def caption_split(self, records, *, batch_size: int = 16, num_workers: int = 0) -> dict[str, str]:
        """`{image_id: caption}` of a whole split, in its order. With several processes, each captions every n-th image,
        and all return the whole split."""
        captions = self._captions(records, batch_size, num_workers)
        return {image_id: texts[0] for image_id, texts in captions.items()}

    def sweep_split(self, records, captioners: list, *, batch_size: int = 16, num_workers: int = 0) -> list[dict]:
        """The result of `caption_split` for each of `captioners` (with_settings). Each image is read and encoded once
        for all of them, if the family takes encoded images, and captioners with equal settings share one search."""
        different = {str(captioner.settings): captioner for captioner in captioners}
        if len(different) > 1 and not encodes_once(self.model):
            name = type(base_model(self.model)).__name__
            logger.info("%s takes no encoded images: each image is encoded again for every setting", name)
        captions = self._captions(records, batch_size, num_workers, list(different.values()))
        captions_of = {
            settings: {image_id: texts[number] for image_id, texts in captions.items()}
            for number, settings in enumerate(different)
        }
        for captioner in captioners:
            captioner.cut = different[str(captioner.settings)].cut
        return [captions_of[str(captioner.settings)] for captioner in captioners]

    def _captions(self, records, batch_size: int, num_workers: int, sweep=()) -> dict[str, list[str]]:
        state = processes()
        share = Subset(records, range(state.process_index, len(records), state.num_processes))
        was_training, captioners = self.model.training, sweep or [self]
        for captioner in captioners:
            captioner.count_anew()
        self.model.eval()
        captions = dict(
            show_progress(self.stream(share, batch_size=batch_size, num_workers=num_workers, sweep=sweep), len(share))
        )
        self.model.train(was_training)
        if was_training:
            release_graphs()
        if state.num_processes > 1:
            captions = {k: v for part in gather_object([captions]) for k, v in part.items()}
            for captioner in captioners:
                counts = zip(*gather_object([(captioner.written, captioner.cut)]), strict=True)
                captioner.written, captioner.cut = map(sum, counts)
        for captioner in captioners:
            captioner.say_cut()
        return {image_id: captions[image_id] for image_id in records["image_id"]}

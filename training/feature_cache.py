"""Features of a frozen vision encoder, computed once and kept, so that later epochs never touch pixels.

A feature file holds one encoded image, and its name is a hash of everything that it depends on: the encoder's weights
and config, the processor's settings, the precision, and the image. Runs and processes can therefore share a folder, a
run that was killed resumes with what is there, and a changed image or encoder gets a new file. Files appear whole, by a
rename, and are read through memory maps, so that all readers share the system's page cache.

Of chat models the projector's output is kept, which the library takes in place of pixels, and the prompt with the image's
placeholders, whose number depends on the image: another prompt is another folder.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import statistics
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save

from common.caches import cache_folder
from common.errors import UserError
from common.files import version_of, whole
from common.limits import free_memory
from common.loaders import data_loader
from common.processes import processes, show_progress
from data import CaptionPairs, EncodedRecords
from data.prompts import PROMPTS
from models.families import base_model, family_of, vision_encoder
from models.vision import FEATURES, encode_images, encodes_once, image_features, takes_encoded, takes_library_features

logger = logging.getLogger(__name__)
SHARE_OF_MEMORY = 0.5  # of the free memory, at most, for features
MEASURED = 8  # images of a chat model that tell how much room one takes


def keep_features(
    place: str, captioner, splits: dict, args, captions_per_image: int | None = 1, augmentation=None
) -> dict:
    """`{split: data.EncodedRecords}` of `splits`, whose "features" are (patches + 1, hidden), or of a chat model its inputs
    for one image (models.vision.image_features); {} if none are kept.

    Every image of `splits` is encoded here, unless a folder holds its features. They have the precision in which the
    captioner runs the model, which is the one in which the decoder reads them: the loss does not change.

    Args:
        place: "memory"; a folder; "off"; or "auto": memory if they fit in SHARE_OF_MEMORY of what is free and there is
            one process, else the cache folder if they fit in half of its free disk space, else off.
        captioner: has the model, which moves to `args.device`.
        splits: `{name: records}`, or None for records that are not used.
        args: TrainArguments. With "auto", nothing is kept if training encodes no more images than keeping would.

    Raises:
        ValueError: a place is named, but they cannot be kept there: a trained encoder, augmentation, a stream, dropout, a
            full disk.
    """
    frozen = not any(parameter.requires_grad for parameter in vision_encoder(captioner.model).parameters())
    if place == "off" or (place == "auto" and not frozen):
        return {}
    splits = {name: records for name, records in splits.items() if records is not None}
    why = _why_not(captioner.model, splits, augmentation)
    if why is None and place == "auto":
        drawn = args.samples_drawn(len(CaptionPairs(splits["train"], captions_per_image)))
        if drawn <= len(splits["train"]):
            why = f"as training encodes {drawn:.0f} of {len(splits['train'])} images, and none of them twice"
    if why is None:
        encoder = _encoder_of(captioner, splits["train"], args)
        if not encoder.agrees:
            why = "as this model gives other logits for features than for pixels"
    if why is None:
        number = sum(map(len, splits.values()))
        size_text = f"{number:,} images x {encoder.about}"
        size = number * encoder.bytes_an_image
        free = free_memory()
        if place == "memory" or (place == "auto" and args.world_size == 1 and size <= SHARE_OF_MEMORY * free):
            logger.info("image features: %s, %s of the %s free memory", size_text, gib(size), gib(free))
            return {name: EncodedRecords(records, encoder.in_memory(records)) for name, records in splits.items()}

        folder = Path(cache_folder() / "features" if place == "auto" else place) / encoder.fingerprint()
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: FeatureFiles(folder, image_keys(records), encoder) for name, records in splits.items()}
        to_write = encoder.bytes_an_image * sum(len(file.missing()) for file in files.values())
        free = shutil.disk_usage(folder).free
        logger.info("image features: %s, %s in %s, %s of it to write now", size_text, gib(size), folder, gib(to_write))
        # All processes have checked before one of them writes, and all come to the same decision.
        if all(gather_object([to_write <= (0.5 if place == "auto" else 1.0) * free])):
            for name, records in splits.items():
                files[name].write(records)
            return {name: EncodedRecords(records, files[name]) for name, records in splits.items()}
        why = f"as {gib(to_write)} are to be written and {folder} has {gib(free)} free"
    if place != "auto":
        raise UserError(f"feature_cache {place}: image features cannot be kept, {why}. Pass --feature_cache off.")
    logger.info("image features are not kept, %s", why)
    return {}


def _encoder_of(captioner, records, args) -> "Encoder":
    vision = vision_encoder(captioner.model)
    if takes_encoded(vision):
        return Encoder(vision.to(args.device), captioner, args.per_device_eval_batch_size, args.dataloader_num_workers)
    return ChatEncoder(captioner, records, args.device, args.dataloader_num_workers)


def _why_not(model, splits: dict, augmentation) -> str | None:
    """Why features cannot replace the encoder, or None."""
    vision, family = vision_encoder(model), family_of(base_model(model).config)
    if any(parameter.requires_grad for parameter in vision.parameters()):
        return "as its vision encoder is trained (--freeze_vision and --use_peft leave it as it is)"
    chats = not takes_encoded(vision)
    if chats and not encodes_once(model):
        return f"as this model does not take the features of its {type(vision).__name__}"
    if family.joint_prompt and not chats:
        return "as this model's processor makes its prompt of the image itself"
    if family.image_inputs:
        return "as this model reads which rows are patches from another input than the features"
    if augmentation:
        return "as augmentation changes an image differently each time"
    if any(isinstance(records, IterableDataset) for records in splits.values()):
        return "as the records of a stream have no index to keep them under"
    if chats and any(parameter.requires_grad for parameter in _of_images(model).values()):
        return (
            "as what its vision encoder gives goes through a projector that is trained (--use_peft leaves it as it is)"
        )
    if chats and any(PROMPTS in records.column_names for records in splits.values()):
        return "as the images have prompts of their own, and the features of this model are kept with one prompt"
    modules = [*vision.modules()]
    if chats:
        modules = {*base_model(model).base_model.modules()} - {*base_model(model).get_decoder().modules()}
    if _drops(vision.config.to_dict()) or any(getattr(module, "p", 0) > 0 for module in modules):
        return "as dropout in the vision encoder makes different features each time"
    return None


def _drops(config: dict) -> bool:
    """Whether an encoder's config sets dropout of any sort, attention's and whole layers' (drop_path_rate) included."""
    return any(
        _drops(value)
        if isinstance(value, dict)
        else "drop" in str(name) and isinstance(value, int | float) and value > 0
        for name, value in config.items()
    )


def _of_images(model) -> dict[str, torch.Tensor]:
    """Names and weights of a chat model without its text decoder: of the encoder, the projector, and what is between."""
    model = base_model(model)
    texts = {id(weight) for weight in model.get_decoder().state_dict(keep_vars=True).values()}
    weights = model.base_model.state_dict(keep_vars=True)
    return {name: weight for name, weight in weights.items() if id(weight) not in texts}


class FeatureFiles:
    """`features[i]`, each in a file of `folder` that is memory-mapped on access."""

    def __init__(self, folder: Path, keys: list[str], encoder):
        self.folder, self.keys, self.encoder = folder, keys, encoder

    def path(self, index: int) -> Path:
        return self.folder / self.keys[index][:2] / self.keys[index]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int):
        return self.encoder.read(self.path(index))

    def missing(self) -> list[int]:
        """One row per image that has no complete file."""
        rows = {key: row for row, key in enumerate(self.keys)}
        return [row for row in rows.values() if not self.encoder.is_whole(self.path(row))]

    def write(self, records) -> None:
        """Encode what is missing. In several processes each writes a share, and all wait for the last."""
        state = processes()
        # By the row's number, as files may appear between two checks; and among this machine's processes, as the folder
        # may be a different one on another machine.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        share = [row for row in self.missing() if row % here == state.local_process_index]
        for row, encoded in self.encoder.encode(records, share):
            path = self.path(row)
            path.parent.mkdir(exist_ok=True)
            with whole(path) as temporary:
                temporary.write_bytes(self.encoder.packed(encoded))
        state.wait_for_everyone()


class Encoder:
    """A frozen vision encoder, run as training runs it. An image's features have `shape` and `dtype`."""

    agrees = True  # the model's class takes features (models/vision.py)

    def __init__(self, vision, captioner, batch_size: int, num_workers: int):
        self._run(vision, captioner, batch_size, num_workers)
        one = self({"pixel_values": self.collator.pixels([Image.new("RGB", (8, 8))])})
        self.shape, self.dtype, self.bytes_an_image = tuple(one.shape[1:]), one.dtype, one.nbytes
        self.about = f"{' x '.join(map(str, self.shape))} {self.dtype}"

    def _run(self, vision, captioner, batch_size: int, num_workers: int) -> None:
        self.vision, self.autocast, self.processor = vision, captioner.autocast, captioner.processor
        self.collator = captioner.collator
        self.batch_size, self.num_workers = batch_size, num_workers
        self.device = next(vision.parameters()).device

    @torch.inference_mode()
    def __call__(self, batch: dict):
        """The features of each image of an ImageCollator's batch, on the CPU: (images, patches + 1, hidden)."""
        with self._precision():
            features = encode_images(self.vision, batch["pixel_values"].to(self.device, non_blocking=True))
        return features.to(self.autocast or features.dtype).cpu()

    def _precision(self):
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def encode(self, records, rows):
        """Yields (row, features) for these rows of `records`."""
        if not len(rows):
            return
        loader = data_loader(
            records.select_columns(["image_id", "image", *({PROMPTS} & {*records.column_names})]).select(rows),
            self.collator,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        was_training = self.vision.training
        self.vision.eval()
        encoded = (features for batch in loader for features in self(batch))
        yield from zip(rows, show_progress(encoded, len(rows), "encoding images"), strict=True)
        self.vision.train(was_training)

    def in_memory(self, records) -> torch.Tensor:
        """(records, patches + 1, hidden)."""
        features = torch.empty(len(records), *self.shape, dtype=self.dtype)
        for row, encoded in self.encode(records, range(len(records))):
            features[row] = encoded
        return features

    def packed(self, features: torch.Tensor):
        return features.contiguous().view(torch.uint8).numpy()

    def read(self, path: Path) -> torch.Tensor:
        size = math.prod(self.shape)
        return torch.from_file(str(path), shared=False, size=size, dtype=self.dtype).view(self.shape)

    def is_whole(self, path: Path) -> bool:
        try:
            return path.stat().st_size == self.bytes_an_image
        except FileNotFoundError:
            return False

    def fingerprint(self) -> str:
        """Hash of what the features of an image depend on besides the image."""
        settings, weights = self._depends_on()
        for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
            settings["vision"].pop(name, None)
        processor = self.processor.image_processor.to_dict()
        settings |= {"processor": processor, "decoded_size": self.collator.pixels.decoded_size, "dtype": self.dtype}
        digest = hashlib.blake2b(digest_size=12)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, weight in weights.items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _depends_on(self) -> tuple[dict, dict]:
        """Settings and weights of the encoder."""
        return {"vision": self.vision.config.to_dict()}, self.vision.state_dict()


class ChatEncoder(Encoder):
    """A frozen tower and projector of a chat model. An image's features are all inputs that the model takes for it, by name;
    the number of an image's tokens depends on its size, so each is encoded alone."""

    def __init__(self, captioner, records, device, num_workers: int):
        """records: some of them tell how much room an image takes."""
        if captioner.model.device != device:
            captioner.model.to(device)
        self._run(base_model(captioner.model), captioner, 1, num_workers)
        batches = [self.collator([records[row]]) for row in range(0, len(records), math.ceil(len(records) / MEASURED))]
        with self._precision():
            self.agrees = takes_library_features(self.vision, self._on_device(batches[0]))
        if self.agrees:
            features = [self(batch)[0] for batch in batches]
            self.dtype = features[0][FEATURES].dtype
            self.bytes_an_image = statistics.mean(len(self.packed(one)) for one in features)
            self.about = f"about {self.bytes_an_image / 2**20:.3f} MiB, {self.dtype}"

    @torch.inference_mode()
    def __call__(self, batch: dict) -> list[dict]:
        """Of the one image of an ImageCollator's batch."""
        with self._precision():
            features = image_features(self.vision, self._on_device(batch))
        return [{name: value.contiguous().cpu() for name, value in features.items()}]

    def _on_device(self, batch: dict) -> dict:
        tensors = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        floats = {name: value.to(self.vision.dtype) for name, value in tensors.items() if value.is_floating_point()}
        return tensors | floats

    def in_memory(self, records) -> "Packed":
        return Packed(self.packed(encoded) for _, encoded in self.encode(records, range(len(records))))

    def packed(self, features: dict) -> bytes:
        return save(features)

    def read(self, path: Path) -> dict:
        return load_file(path)

    def is_whole(self, path: Path) -> bool:
        try:
            with safe_open(path, "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def _depends_on(self) -> tuple[dict, dict]:
        config, tokenizer = self.vision.config.to_dict(), self.processor.tokenizer
        config.pop("text_config", None)
        ids = tokenizer(self.collator.text, add_special_tokens=self.collator.adds_special_tokens)["input_ids"]
        return {"vision": config, "prompt": ids, "autocast": self.autocast}, _of_images(self.vision)


class Packed(list):
    """Features of a chat model, each as the bytes of its file: one object, which worker processes share."""

    def __getitem__(self, index: int) -> dict:
        return load(super().__getitem__(index))


def image_keys(records: Dataset) -> list[str]:
    """A hash of each record's image: of its bytes, or of its file's path, size and modification time."""
    keys = []
    for row in records.select_columns(["image"]):
        path, content = row["image"]["path"], row["image"]["bytes"]
        if content is None:
            content = f"{os.path.abspath(path)} {version_of(path)}".encode("utf-8", "surrogateescape")
        keys.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return keys


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"

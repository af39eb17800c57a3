"""What train.py and evaluate.py print about a run: what it will do, how long it takes, and what to do with what it left."""

import logging
import shlex
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from common.logs import duration
from models.families import base_model

logger = logging.getLogger(__name__)
PAUSE = 30  # seconds between two lines on the time left


class RunWords(TrainerCallback):
    """Logs the header of a training run, and, where no progress bar shows it, the time left.

    Args:
        splits: of records, for their sizes.
        train_dataset: says how many captions of an image a sample has.
    """

    def __init__(self, splits: dict, train_dataset):
        self.splits, self.per_image = splits, train_dataset.captions_per_image
        self.said = float("-inf")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            logger.info("%s", "\n".join(header(args, state, model, self.splits, self.per_image)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        now, done = time.monotonic(), state.global_step - self.first
        left = state.max_steps - state.global_step
        if (
            "loss" in logs
            and args.disable_tqdm
            and state.is_world_process_zero
            and left > 0
            and now - self.said > PAUSE
        ):
            self.said = now
            seconds = (now - self.began) / done * left
            logger.info("step %d of %d, about %s left", state.global_step, state.max_steps, duration(seconds))


def header(args, state, model, splits: dict, per_image: int) -> list[str]:
    """What a training run will do, in lines; a sample has up to `per_image` captions of its image."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    weights, trained = sum(n for n, _ in parameters), sum(n for n, is_trained in parameters if is_trained)
    precision = f"{args.autocast_dtype} autocast" if args.autocast_dtype else str(base_model(model).dtype)
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    batch = [f"{args.per_device_train_batch_size} images"]
    batch += [f"x {args.gradient_accumulation_steps} accumulated"] * (args.gradient_accumulation_steps > 1)
    batch += [f"x {args.world_size} processes"] * (args.world_size > 1)
    captions = "one caption of each" if per_image == 1 else f"up to {per_image} captions of each"
    steps = f"{state.max_steps:,}" + (
        f" ({args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)})" if args.max_steps <= 0 else ""
    )
    steps += f", from step {state.global_step:,}" if state.global_step else ""
    return [
        "training:",
        f"  device     {device_of(args)}, {precision.replace('torch.', '')}",
        f"  model      {type(base_model(model)).__name__}, {weights:,} weights, {trained:,} trained ({trained / weights:.1%})",
        f"  data       {'; '.join(f'{name} {sizes(split)}' for name, split in splits.items())}",
        f"  step       {' '.join(batch)} = {images} images, {captions}",
        f"  steps      {steps}",
        f"  output     {args.output_dir}; if it is stopped, the same command resumes it",
        "  in the log: grad_norm before it is clipped; data_wait, the share of the time that steps wait for data",
    ]


def device_of(args) -> str:
    """The device of this process, and GPUs that nothing uses."""
    if args.device.type != "cuda":
        return str(args.device)
    name, count = torch.cuda.get_device_name(args.device), torch.cuda.device_count()
    idle = (
        f"; {count} GPUs are here, and torchrun --nproc_per_node {count} train.py ... uses all"
        if args.world_size < count
        else ""
    )
    return f"{args.device} ({name}{idle})"


def sizes(split) -> str:
    try:
        return f"{len(split):,} images with {sum(map(len, split['captions'])):,} captions"
    except TypeError:  # a stream has no length
        return "a stream"


def report_to_open(folder: Path) -> str:
    return f"open {shlex.quote(str(folder / 'report.html'))}"


def next_steps(folder: Path, report: bool) -> str:
    """What to open and what to type once a model is in `folder`."""
    name = shlex.quote(str(folder))
    lines = [report_to_open(folder)] * report
    lines += [f"python {script} --model_name_or_path {name}" for script in ("infer.py PHOTO.jpg", "demo.py")]
    return f"the model, its scores, captions, curves and card are in {folder}. Next:\n  " + "\n  ".join(lines)

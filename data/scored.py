"""The split that evaluate.py scores: one that the model was not trained on."""

import json
import os
from pathlib import Path

from common.errors import UserError
from common.provenance import without_secrets
from data import seen
from data.sources import load
from data.training import in_memory


def load_scored(model: str, data_args, args, asked: dict) -> tuple:
    """(splits of records; how many of the scored ones the model has seen). UserError if it was trained on some of them."""
    record = seen.find(model)
    drawn = data_args.draw_splits_from is not None
    if record is None and trained_on(model, data_args):
        drawn, record = args.score_trained_images, None if args.score_trained_images else seen.Unrecorded(model)
    options = {
        "splits": (args.split, "train") if args.seen_in_training else (args.split,),
        "max_samples": {args.split: args.max_samples} if args.max_samples is not None else None,
    }
    splits = load(
        **data_args.source(), **asked, **options, all_as=None if record is None and drawn else args.split, seen=record
    )
    records = in_memory(splits[args.split], args.split)
    overlap = record.overlap(records) if isinstance(record, seen.Seen) else {"images": len(records), **seen.UNKNOWN}
    if overlap["trained_on"] and args.split != "train" and not args.score_trained_images:
        raise UserError(
            f"{model} was trained on {overlap['trained_on']:,} of these {len(records):,} images ({args.split} split of "
            f"{data_args.dataset_name}). Name others, or pass --score_trained_images to score them all the same."
        )
    return {**splits, args.split: records}, overlap


def trained_on(model: str, data_args) -> bool:
    """Whether train.py trained this model on a data set of this name."""
    runs = filter(Path.is_file, (Path(model, "run.json"), Path(model).parent / "run.json"))
    names = [json.loads(run.read_text(encoding="utf-8"))["flags"].get("dataset_name") for run in runs]
    named = without_secrets(data_args.dataset_name)  # as run.json has it
    return os.path.abspath(named) in map(os.path.abspath, filter(None, names))

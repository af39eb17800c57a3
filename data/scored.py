"""The split that evaluate.py scores: one that the model was not trained on."""

from common.errors import UserError
from data import seen
from data.sources import load
from data.training import in_memory


def load_scored(model: str, data_args, args) -> tuple:
    """(splits of records; how many of the scored ones the model has seen). UserError if it was trained on some of them."""
    record = seen.find(model)
    drawn = record is None and data_args.draw_splits_from is not None
    options = {
        "splits": (args.split, "train") if args.seen_in_training else (args.split,),
        "max_samples": {args.split: args.max_samples} if args.max_samples is not None else None,
    }
    splits = load(**data_args.source(), **options, all_as=None if drawn else args.split, seen=record)
    records = in_memory(splits[args.split], args.split)
    overlap = record.overlap(records) if record else {"images": len(records), **seen.UNKNOWN}
    if overlap["trained_on"] and args.split != "train" and not args.score_trained_images:
        raise UserError(
            f"{model} was trained on {overlap['trained_on']:,} of these {len(records):,} images ({args.split} split of "
            f"{data_args.dataset_name}). Name others, or pass --score_trained_images to score them all the same."
        )
    return {**splits, args.split: records}, overlap

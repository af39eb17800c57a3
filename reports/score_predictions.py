"""Scores of captions that exist already, from any system."""

import re

import datasets

from common.errors import DataError
from common.processes import processes
from data.caption_files import find_images, in_both, load_predictions, read_references
from metrics.clip_scores import load_scorers
from metrics.coco_caption.text_checks import remove_illegal_characters
from reports import outputs
from reports.score_split import score_split


def score_predictions(folder, data_args, generation_args, metric_args, args, judges=()):
    """ScoredSplit of existing captions, from any system."""
    read = read_references(args.references, args.split)
    columns = {"image_column": data_args.image_column, "caption_column": data_args.caption_column}
    predictions = load_predictions(args.predictions, read, args.common, **columns)
    references = read.captions
    numbered = [(image, re.sub(r"#\d+$", "", image)) for image in predictions if image not in references]
    if other := next((image for image, its in numbered if its != image and its in references), None):
        raise DataError(
            f"{args.predictions}: {other!r} answers another question about an image that is asked several, and references "
            "in a file are not told apart by question. Score each question's answers with the model: evaluate.py "
            "--model_name_or_path."
        )
    if args.common:
        predictions, references = in_both(predictions, references)
    if generation_args.remove_illegal_characters:
        predictions = {image: remove_illegal_characters(caption) for image, caption in predictions.items()}
    scorers = load_scorers(metric_args, processes().device)
    columns = {"image_id": list(references), "captions": list(references.values())}
    for name in outputs.subset_columns(
        {name for image_columns in read.columns.values() for name in image_columns}, metric_args
    ):
        columns[name] = [read.columns[image].get(name) for image in references]
    if scorers or data_args.image_dir:
        images = find_images(data_args.image_dir, references, read.names)
        columns["image"] = [str(path) for path in images]
    source = {"predictions": args.predictions, "references": args.references}
    looking = {"scorers": scorers, "num_workers": args.dataloader_num_workers, "judges": judges}
    records = datasets.Dataset.from_dict(columns)
    return score_split(folder, predictions, records, metric_args, args.seed, source=source, **looking)

"""Caption a split and score it, or score existing captions.

python evaluate.py --model_name_or_path DIR --dataset_name NAME --split test --output_dir OUT
python evaluate.py --model_name_or_path DIR --dataset_name NAME --corrupt jpeg:10 --output_dir OUT    (robustness)
python evaluate.py --predictions P.json --references R.json --output_dir OUT
python evaluate.py ... --split validation --sweep "num_beams=1,3,5 length_penalty=0.6,1.0" [--save_best_sweep]
python evaluate.py --compare RUN_A RUN_B --output_dir OUT    (folders that evaluate.py or train.py wrote scores to)
python evaluate.py --human_judgments FILE [--references R.json] --output_dir OUT    (which scores agree with people)
python evaluate.py ... --clip_metrics clip-s pac-s --clip_model openai/clip-vit-base-patch32 --pac_checkpoint FILE.pth
"""

from arguments import EVALUATE_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(EVALUATE_GROUPS)  # answers --help and mistakes before torch is imported

import json
import logging
import os
from pathlib import Path

import datasets

import data
from captioner import Captioner
from common.errors import UserError
from common.files import output_folder, write_json, write_text
from common.processes import processes
from common.provenance import environment
from data import seen
from data.caption_files import find_images, load_predictions, read_references
from metrics.clip_scores import load_scorers
from metrics.coco_caption.text_checks import remove_illegal_characters
from reports import comparison, outputs
from reports.human import compare_with_people
from reports.plots import plot_sweep
from reports.report import write_comparison_report
from reports.score_split import score_split
from reports.sweep import check_sweep, score_sweep, sweep_settings
from reports.sweep import summary as sweep_summary

logger = logging.getLogger("evaluate")


def main():
    model_args, data_args, generation_args, metric_args, args = parse(EVALUATE_GROUPS)
    folder = output_folder(args.output_dir)
    if args.compare:
        return compare_runs(folder, args, metric_args)
    check_flags(args, metric_args, model_args)
    outputs.warn_of_missing_scores(metric_args)
    if args.human_judgments:
        return compare_with_people(folder, data_args.image_dir, metric_args, args)
    if args.predictions:
        return score_predictions(folder, data_args, generation_args, metric_args, args)

    # Load the data and the model
    state = processes()
    with state.main_process_first():
        splits, overlap = load_splits(model_args, data_args, args)
    records = splits[args.split]
    scorers = load_scorers(metric_args, state.device) if state.is_main_process else []
    captioner = load_captioner(model_args, generation_args, args)

    # Caption
    how = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    looking = {"scorers": scorers, "num_workers": args.dataloader_num_workers}
    sweep = None
    if args.sweep:
        captioners = [captioner.with_settings(**setting) for setting in sweep_settings(args.sweep)]
        captions = captioner.sweep_split(records, captioners, **how)
        if state.is_main_process:
            sweep = choose_settings(folder, captions, records, metric_args, args, looking)
            captioner, predictions = captioners[sweep["best"]], captions[sweep["best"]]
            if args.save_best_sweep:
                save_settings(captioner, model_args.model_name_or_path)
    else:
        predictions = captioner.caption_split(records, **how)

    # Score
    if state.is_main_process:
        if args.seen_in_training:
            looking["training_captions"] = (text for row in splits["train"] for text in row["captions"])
        model, name = model_args.model_name_or_path, data_args.dataset_name
        source = {"split": args.split, "dataset_name": name, "model": model, "seen": overlap}
        showing = {"captioner": captioner, "sweep": sweep}
        scored = score_split(folder, predictions, records, metric_args, args.seed, source=source, **showing, **looking)
        check_gate(args.fail_under, scored.scores)


def check_flags(args, metric_args, model_args) -> None:
    data.corruption(args.corrupt)
    outputs.bars(args.fail_under)
    if args.sweep:
        sweep_settings(args.sweep)
        check_sweep(args, metric_args, model_args.model_name_or_path)


def compare_runs(folder, args, metric_args) -> None:
    if groups := comparison.read_groups(args.compare):
        found = comparison.compare_groups(groups, metric_args.bootstrap_samples, args.seed)
    else:
        runs = comparison.read_runs(args.compare)
        found = comparison.compare(runs, metric_args.bootstrap_samples, args.seed)
    write_json(folder / "comparison.json", found | environment())
    for name, text in comparison.tables(found).items():
        write_text(folder / name, text)
    logger.info("differences, in %s:\n%s\n%s", folder, comparison.summary(found), found["note"])
    if metric_args.report and not groups:
        write_comparison_report(folder, runs, found)


def score_predictions(folder, data_args, generation_args, metric_args, args) -> None:
    """Score existing captions, from any system."""
    found = read_references(args.references, args.split)
    columns = {"image_column": data_args.image_column, "caption_column": data_args.caption_column}
    predictions = load_predictions(args.predictions, found, args.common, **columns)
    references = found.captions
    if args.common:
        predictions, references = in_both(predictions, references)
    if generation_args.remove_illegal_characters:
        predictions = {image: remove_illegal_characters(caption) for image, caption in predictions.items()}
    scorers = load_scorers(metric_args, processes().device)
    columns = {"image_id": list(references), "captions": list(references.values())}
    for name in outputs.subset_columns({name for of_one in found.columns.values() for name in of_one}, metric_args):
        columns[name] = [found.columns[image].get(name) for image in references]
    if scorers or data_args.image_dir:
        images = find_images(data_args.image_dir, references, found.names)
        columns["image"] = [str(path) for path in images]
    source = {"predictions": args.predictions, "references": args.references}
    looking = {"scorers": scorers, "num_workers": args.dataloader_num_workers}
    records = datasets.Dataset.from_dict(columns)
    scored = score_split(folder, predictions, records, metric_args, args.seed, source=source, **looking)
    check_gate(args.fail_under, scored.scores)


def in_both(predictions: dict, references: dict) -> tuple[dict, dict]:
    """The images that both have, in the references' order; how many are left out is logged."""
    common = [image for image in references if image in predictions]
    if not common:
        first = f"{next(iter(predictions), None)!r} and {next(iter(references))!r}"
        raise UserError(f"--common: predictions and references have no image in common, such as {first}.")
    left_out = len(predictions) - len(common), len(references) - len(common)
    logger.info("%d images in common; left out %d predictions and %d images with references", len(common), *left_out)
    return {image: predictions[image] for image in common}, {image: references[image] for image in common}


def check_gate(fail_under: str | None, scores: dict) -> None:
    """Ends the script with exit code 2 if a score misses its threshold; all results are written by then."""
    if below := outputs.below_bars(fail_under, scores):
        raise UserError(f"fail_under: {'; '.join(below)}.")


def load_splits(model_args, data_args, args) -> tuple:
    """(splits of records; how many of the scored ones the model has seen). UserError if it was trained on some of them."""
    name = model_args.model_name_or_path
    record = seen.find(name)
    drawn = data_args.draw_splits_from is not None
    if record is None and trained_on(name, data_args):
        drawn, record = args.score_trained_images, None if args.score_trained_images else seen.Unrecorded(name)
    options = {
        "splits": (args.split, "train") if args.seen_in_training else (args.split,),
        "max_samples": {args.split: args.max_samples} if args.max_samples is not None else None,
    }
    splits = data.load(
        **data_args.source(), **options, all_as=None if record is None and drawn else args.split, seen=record
    )
    records = data.in_memory(splits[args.split], args.split)
    overlap = record.overlap(records) if isinstance(record, seen.Seen) else {"images": len(records), **seen.UNKNOWN}
    if overlap["trained_on"] and args.split != "train" and not args.score_trained_images:
        raise UserError(
            f"{name} was trained on {overlap['trained_on']:,} of these {len(records):,} images ({args.split} split of "
            f"{data_args.dataset_name}). Name others, or pass --score_trained_images to score them all the same."
        )
    return {**splits, args.split: records}, overlap


def trained_on(model: str, data_args) -> bool:
    """Whether train.py trained this model on a data set of this name."""
    runs = [folder / "run.json" for folder in (Path(model), Path(model).parent) if (folder / "run.json").is_file()]
    names = [json.loads(run.read_text(encoding="utf-8"))["flags"].get("dataset_name") for run in runs]
    return any(name and os.path.abspath(name) == os.path.abspath(data_args.dataset_name) for name in names)


def load_captioner(model_args, generation_args, args) -> Captioner:
    return Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        corruption=data.corruption(args.corrupt),
        **vars(generation_args),
    )


def choose_settings(folder, captions: list[dict], records, metric_args, args, looking: dict) -> dict:
    """Score the captions of every setting of the sweep. Returns the content of sweep.json, with the best's index."""
    settings = sweep_settings(args.sweep)
    found = [{"settings": s, "captions": c} for s, c in zip(settings, captions, strict=True)]
    write_json(folder / "sweep_captions.json", found)
    sweep = score_sweep(settings, captions, records, args.sweep_metric, metric_args, args.seed, **looking)
    write_json(folder / "sweep.json", {**sweep, "split": args.split, **environment()})
    plot_sweep(sweep, folder)
    logger.info("settings by %s on %s:\n%s", args.sweep_metric, args.split, sweep_summary(sweep))
    return sweep


def save_settings(captioner: Captioner, model_name_or_path: str) -> None:
    """Make the captioner's settings the defaults of its checkpoint."""
    captioner.save_settings()
    captioner.model.generation_config.save_pretrained(model_name_or_path)
    chosen = {name: value for name, value in captioner.settings.items() if value is not None}
    logger.info("written to %s: %s", Path(model_name_or_path, "generation_config.json"), chosen)


if __name__ == "__main__":
    run(main)

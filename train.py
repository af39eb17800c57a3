"""Fine-tune an image captioner.

    python train.py captions.csv --output_dir runs/mine
    python train.py [RECIPE.yaml] [DATASET] [--flag value ...]
    torchrun --nproc_per_node 2 train.py RECIPE.yaml

Writes to the output folder a model that from_pretrained loads, its scores on the validation and test splits, its
captions, a report that shows them, training curves and a model card. After a kill, the same command resumes from the
last checkpoint.
"""

from arguments import TRAIN_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(TRAIN_GROUPS)  # answers --help and mistakes before torch is imported

import dataclasses
import functools
import logging
from pathlib import Path

from transformers import set_seed

import data
from common.errors import UserError
from common.files import output_folder
from common.sharding import gathered
from data import seen
from metrics.clip_scores import load_scorers
from models.adapters import settle
from objectives import build_objective, check_objective
from reports import outputs
from reports.console import RunWords, next_steps
from reports.model_card import run_facts, write_card
from reports.plots import plot_curves, training_panels
from reports.score_split import score_split
from training.building import (
    as_loaded,
    build_collator,
    build_datasets,
    check_best,
    load_augmentations,
    load_captioner,
    plan_memory,
    questions,
)
from training.checkpoints import claimed, find_checkpoint, processes_by_step, record_run, reward_files
from training.lengths import fit_lengths
from training.patience import patience_of
from training.sharding import check_sharding
from training.trainer import CaptionTrainer

logger = logging.getLogger("train")


def main():
    groups = parse(TRAIN_GROUPS)
    model_args, scratch_args, adapter_args, data_args, _, objective_args, metric_args, args = groups

    # Set up the run
    reward_metrics = check_objective(args, objective_args, metric_args, scratch_args, data_args)
    check_best(args, [*metric_args.clip_metrics, *reward_metrics])
    check_sharding(args, model_args, scratch_args)
    start = None if scratch_args.model_config else model_args.model_name_or_path
    settle(adapter_args, start, model_args.model_revision)
    if args.dry_run:
        return plan_memory(model_args, scratch_args, adapter_args, data_args, objective_args, args)
    folder = output_folder(args.output_dir)
    with claimed(folder, args):
        checkpoint = find_checkpoint(folder, flags_of(groups), args.resume_from_checkpoint, args.world_size)
        outputs.warn_of_missing_scores(metric_args)
        fine_tune(groups, reward_metrics, folder, checkpoint)


def flags_of(groups) -> dict:
    return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}


def fine_tune(groups, reward_metrics, folder, checkpoint):
    """Load, train from `checkpoint` or from the start, evaluate, and write everything to `folder`."""
    model_args, scratch_args, adapter_args, data_args, generation_args, objective_args, metric_args, args = groups
    scorers = load_scorers(metric_args, args.device, reward_metrics)
    augmentations = load_augmentations(data_args, args.seed, metric_args.caption_language)
    set_seed(args.seed)

    # Load the data and the model
    asked = questions(model_args, scratch_args, generation_args)
    splits, bad_samples = load_splits(groups, checkpoint, asked)
    captioner = load_captioner(model_args, scratch_args, adapter_args, generation_args, splits["train"], args, asked)
    lengths = fit_lengths(captioner, splits["train"], data_args, generation_args, checkpoint)
    flags = flags_of(groups)  # with these lengths

    # Build the trainer
    objective = build_objective(args, objective_args, captioner, splits["train"], scorers, metric_args)
    collator = build_collator(captioner, augmentations, data_args, getattr(objective, "prompts_only", False))
    train_dataset, validation = build_datasets(splits, captioner, collator, scratch_args, data_args, args)
    trainer = CaptionTrainer(
        model=captioner.model,
        args=args,
        processing_class=captioner.processor,
        objective=objective,
        captioner=captioner,
        data_collator=collator,
        train_dataset=train_dataset,
        validation=validation,
        scorers=scorers,
        caption_language=metric_args.caption_language,
        score=functools.partial(outputs.quick_scores, metric_args),
        callbacks=[RunWords(splits, train_dataset), *patience_of(args)],
    )

    # Train, save, evaluate, push
    train_metrics = train(trainer, checkpoint, folder, flags, bad_samples, lengths)
    scored = evaluate(trainer, splits, scorers, metric_args, data_args, model_args, folder)
    if trainer.is_world_process_zero():
        conclude(trainer, splits, train_metrics, scored, folder, flags, metric_args)
    if args.push_to_hub:
        trainer.push_to_hub()


def load_splits(groups, checkpoint, asked: dict) -> tuple:
    """(splits of records, bad training samples that were left out), recorded in the output folder. ValueError if a required
    split is missing, or if the data are not those of the checkpoint."""
    model_args, scratch_args, _, data_args, *_, args = groups
    bad_rows = []
    with args.main_process_first(desc="preparing the dataset"):
        splits = data.load(**data_args.source(), **asked, max_samples=data_args.max_samples, bad_samples=bad_rows)
        data.require_training_split(splits, data_args.dataset_name)
        splits, bad_images = data.check_images(splits, skip_bad_samples=data_args.skip_bad_samples)
    if "validation" not in splits and args.eval_strategy != "no":
        raise UserError(f"{data_args.dataset_name} has no validation split. Pass --eval_strategy no to train without.")
    held_out = {name: data.in_memory(splits[name], name) for name in ("validation", "test") if name in splits}
    splits = {"train": splits["train"], **held_out}
    if args.process_index == 0:
        start = None if scratch_args.model_config else model_args.model_name_or_path
        seen.begin(Path(args.output_dir), splits, start, checkpoint)
    return splits, bad_rows + bad_images


def train(trainer, checkpoint, folder, flags, bad_samples, lengths) -> dict:
    """Train, save the best model to `folder`, and return the Trainer's metrics."""
    if trainer.is_world_process_zero():
        processes = processes_by_step(folder, checkpoint, trainer.args.world_size)
        record_run(folder, flags, processes=processes, lengths=lengths, reward_files=reward_files(flags))
        outputs.write_bad_samples(folder, bad_samples)
    trainer.accelerator.wait_for_everyone()
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | trainer.peak_memory()
    trainer.save_model()
    trainer.save_metrics("train", metrics, combined=False)
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_curves(training_panels(trainer.state), folder)
    return metrics


def evaluate(trainer, splits, scorers, metric_args, data_args, model_args, folder) -> list:
    """Caption and score the validation and test splits. Returns a ScoredSplit for each, on the main process."""
    args, scored = trainer.args, []
    training_captions = (
        None if data_args.streaming else [text for group in splits["train"]["captions"] for text in group]
    )
    with gathered(trainer.model):  # entered by all processes; after captioning, only the first one continues
        captioner = as_loaded(trainer.captioner, model_args, args)
        for name in ("validation", "test"):
            if name not in splits:
                continue
            records, workers = splits[name], args.dataloader_num_workers
            predictions = captioner.caption_split(records, batch_size=args.eval_batch_size, num_workers=workers)
            if not trainer.is_world_process_zero():
                continue
            source = {"split": name, "dataset_name": data_args.dataset_name, "model": str(folder)}
            source["seen"] = seen.find(folder).overlap(records)
            where = folder if name == "test" or "test" not in splits else output_folder(folder / name)
            parts = {"captioner": captioner, "curves": training_panels(trainer.state)}
            options = {"training_captions": training_captions, "scorers": scorers, "num_workers": workers}
            scored.append(
                score_split(where, predictions, records, metric_args, args.seed, source=source, **parts, **options)
            )
            if name == "validation":
                trainer.save_metrics("eval", outputs.flat(scored[-1].scores, "eval"), combined=False)
    return scored


def conclude(trainer, splits, train_metrics, scored, folder, flags, metric_args) -> None:
    """Record the run, write its card, and say what to do next."""
    facts = record_run(folder, flags, **run_facts(trainer, splits, train_metrics, scored))
    write_card(folder, facts, [split.scores for split in reversed(scored)], trainer.captioner)
    logger.info("%s", next_steps(folder, metric_args.report and bool(scored)))


if __name__ == "__main__":
    run(main)

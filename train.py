"""Fine-tune an image captioner.

    python train.py [RECIPE.yaml] [--flag value ...]
    torchrun --nproc_per_node 2 train.py RECIPE.yaml

Leaves in the output folder a model that from_pretrained loads, its scores on the validation and the test split, its
captions, a report that shows them, its training curves and its model card. Started again after a kill, it resumes from
the last checkpoint.
"""

from arguments import TRAIN_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(TRAIN_GROUPS)  # answers --help and mistakes before torch is imported

import dataclasses
import logging

from transformers import EarlyStoppingCallback, set_seed

import data
from captioner import Captioner
from collator import CaptionCollator, input_size
from common.errors import UserError
from common.files import output_folder
from common.processes import device_memory
from common.sharding import gathered, strategy
from data.tokens import check_captions_can_be_written
from metrics.clip_scores import load_scorers
from models.families import vision_encoder
from models.loading import build_model, load_model, make_trainable
from objectives import build_objective, check_objective
from reports import outputs
from reports.model_card import run_facts, write_card
from reports.plots import plot_curves, training_panels
from reports.score_split import score_split
from training.checkpoints import find_checkpoint, record_run
from training.feature_cache import keep_features
from training.memory import plan
from training.sharding import check_sharding, shard
from training.trainer import CaptionTrainer

logger = logging.getLogger("train")


def main():
    groups = parse(TRAIN_GROUPS)
    model_args, scratch_args, adapter_args, data_args, generation_args, objective_args, metric_args, args = groups

    # Set up the run
    reward_metrics = check_objective(args, objective_args, metric_args, scratch_args, data_args)
    check_sharding(args, model_args, scratch_args)
    if args.dry_run:
        return plan_memory(model_args, scratch_args, adapter_args, data_args, objective_args, args)
    flags = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}
    folder = output_folder(args.output_dir)
    checkpoint = find_checkpoint(folder, flags, args.resume_from_checkpoint)
    outputs.warn_of_missing_scores(metric_args)
    scorers = load_scorers(metric_args, args.device, reward_metrics)
    augmentations = load_augmentations(data_args, args.seed)
    set_seed(args.seed)

    # Load the data and the model
    splits, bad_samples = load_splits(data_args, args)
    captioner = load_captioner(model_args, scratch_args, adapter_args, generation_args, splits["train"], args)

    # Build the trainer
    collator = build_collator(captioner, augmentations, data_args, args)
    objective = build_objective(args, objective_args, captioner, splits["train"], scorers, metric_args.caption_language)
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
        callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
    )

    # Train, save, evaluate, push
    train_metrics = train(trainer, checkpoint, folder, flags, bad_samples)
    scored = evaluate(trainer, splits, scorers, metric_args, data_args, folder)
    if trainer.is_world_process_zero():
        facts = run_facts(trainer, splits, train_metrics, scored[-1].examples() if scored else [])
        write_card(folder, record_run(folder, flags, **facts), [split.scores for split in reversed(scored)])
        logger.info("the model, its scores, captions, report, curves and card are in %s", folder)
    if args.push_to_hub:
        trainer.push_to_hub()


def plan_memory(model_args, scratch_args, adapter_args, data_args, objective_args, args) -> None:
    """Print what memory the run will need of each process; reads the model's config and processor, and no weights."""
    words = [f"word{number}" for number in range(8000)]  # of a vocabulary that is counted, the most
    model, processor = open_model(model_args, scratch_args, adapter_args, words, weights=False)
    model = make_trainable(model, adapter_args, scratch_args.freeze_vision)
    captioner = Captioner(model, processor, fast_jpeg=model_args.fast_jpeg)
    no_augmentations = {"augmentation": None, "text_augmentation": None}
    collator = build_collator(captioner, no_augmentations, data_args, args).for_evaluation()
    drawn = {"scst": objective_args.scst_samples, "dico": objective_args.dico_candidates}
    rows = drawn.get(args.objective, data_args.captions_per_image)
    found = plan(model, collator, args, rows, data_args.max_txt_len, model_args.quantization)
    if args.process_index == 0:
        print("\n".join(found.lines(device_memory(args.device), args.world_size)))


def load_augmentations(data_args, seed: int) -> dict:
    """Augmentations of images and captions as CaptionCollator takes them; ValueError names an unknown operation."""
    images, texts = data_args.augment, data_args.augment_text
    return {
        "augmentation": data.Augmentation(images, seed=seed) if images else None,
        "text_augmentation": data.TextAugmentation(texts, seed) if texts else None,
    }


def load_splits(data_args, args) -> tuple:
    """(splits of records, bad training samples that were left out); ValueError if a split that is needed is missing."""
    bad_rows = []
    with args.main_process_first(desc="preparing the dataset"):
        splits = data.load(**data_args.source(), max_samples=data_args.max_samples, bad_samples=bad_rows)
        data.require_training_split(splits, data_args.dataset_name)
        splits, bad_images = data.check_training_images(splits, skip_bad_samples=data_args.skip_bad_samples)
    if "validation" not in splits and args.eval_strategy != "no":
        raise UserError(f"{data_args.dataset_name} has no validation split. Pass --eval_strategy no to train without.")
    held_out = {name: data.in_memory(splits[name], name) for name in ("validation", "test") if name in splits}
    return {"train": splits["train"], **held_out}, bad_rows + bad_images


def open_model(model_args, scratch_args, adapter_args, captions, weights: bool = True) -> tuple:
    """(model, processor): of random weights, with a vocabulary of `captions` where none is named, or a pretrained one, of
    which `weights` may be left out."""
    if not scratch_args.model_config:
        merge = not adapter_args.use_peft
        return load_model(model_args.model_name_or_path, merge=merge, weights=weights, **model_args.loading())
    vocab, accents = scratch_args.tokenizer_vocab, scratch_args.strip_accents
    return build_model(scratch_args.model_config, vocab, captions, model_args.fast_attention, accents)


def load_captioner(model_args, scratch_args, adapter_args, generation_args, train_records, args) -> Captioner:
    """A pretrained captioner or one of random weights; what is to be trained is left trainable, and the model shared
    between processes if they were launched so."""
    captions = lambda: (text for row in train_records for text in row["captions"])  # noqa: E731
    model, processor = open_model(model_args, scratch_args, adapter_args, captions())
    check_captions_can_be_written(processor.tokenizer, captions())
    model = shard(make_trainable(model, adapter_args, scratch_args.freeze_vision), args)
    how = {"autocast": args.autocast_dtype, "fast_jpeg": model_args.fast_jpeg}
    captioner = Captioner(model, processor, **how, **vars(generation_args))
    captioner.save_settings()
    return captioner


def build_collator(captioner, augmentations: dict, data_args, args) -> CaptionCollator:
    if augmentations["augmentation"]:
        augmentations["augmentation"].size = input_size(captioner.processor.image_processor)
    return CaptionCollator(
        captioner.processor,
        captioner.model.config,
        max_txt_len=data_args.max_txt_len,
        prompt=captioner.prompt,
        fast_jpeg=captioner.fast_jpeg,
        prompts_only=args.objective != "cross_entropy",  # the other objectives learn from captions of the model's own
        **augmentations,
    )


def build_datasets(splits, captioner, collator, scratch_args, data_args, args) -> tuple:
    """(training dataset, validation records or None), with a frozen encoder's images encoded in advance."""
    used = {"train": splits["train"], "validation": splits.get("validation") if args.eval_strategy != "no" else None}
    # Rewards look at all references of an image at once.
    per_image = None if collator.prompts_only else data_args.captions_per_image
    frozen = not any(parameter.requires_grad for parameter in vision_encoder(captioner.model).parameters())
    if frozen and not strategy():
        used |= keep_features(scratch_args.feature_cache, captioner, used, args, per_image, collator.augmentation)
    if data_args.streaming:
        return data.CaptionStream(splits["train"], data_args.captions_per_image, seed=args.seed), used["validation"]
    return data.CaptionPairs(used["train"], per_image), used["validation"]


def train(trainer, checkpoint, folder, flags, bad_samples) -> dict:
    """Train, save the best model to `folder`, and return the Trainer's metrics."""
    if trainer.is_world_process_zero():
        record_run(folder, flags)
        outputs.write_bad_samples(folder, bad_samples)
    trainer.accelerator.wait_for_everyone()
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | trainer.peak_memory()
    trainer.save_model()
    trainer.save_metrics("train", metrics, combined=False)
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_curves(training_panels(trainer.state), folder)
    return metrics


def evaluate(trainer, splits, scorers, metric_args, data_args, folder) -> list:
    """Caption and score the validation and the test split; a ScoredSplit of each, on the main process."""
    args, captioner, scored = trainer.args, trainer.captioner, []
    known = None if data_args.streaming else [text for group in splits["train"]["captions"] for text in group]
    with gathered(trainer.model):  # by every process once; what comes after captioning the first does alone
        for name in ("validation", "test"):
            if name not in splits:
                continue
            records, workers = splits[name], args.dataloader_num_workers
            predictions = captioner.caption_split(records, batch_size=args.eval_batch_size, num_workers=workers)
            if not trainer.is_world_process_zero():
                continue
            source = {"split": name, "dataset_name": data_args.dataset_name, "model": str(folder)}
            where = folder if name == "test" or "test" not in splits else output_folder(folder / name)
            looks = {"captioner": captioner, "curves": training_panels(trainer.state)}
            options = {"training_captions": known, "scorers": scorers, "num_workers": workers}
            scored.append(
                score_split(where, predictions, records, metric_args, args.seed, source=source, **looks, **options)
            )
            if name == "validation":
                trainer.save_metrics("eval", outputs.flat(scored[-1].scores, "eval"), combined=False)
    return scored


if __name__ == "__main__":
    run(main)

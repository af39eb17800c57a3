"""Fine-tune an image captioner.

    python train.py [RECIPE.yaml] [--flag value ...]
    torchrun --nproc_per_node 2 train.py RECIPE.yaml

Leaves in the output folder a model that from_pretrained loads, its scores on the validation and the test split, its
captions, a report that shows them, its training curves and its model card. Started again after a kill, it goes on from
the last checkpoint.
"""

import dataclasses
import functools
import logging

from transformers import EarlyStoppingCallback, set_seed

import data
from arguments import TRAIN_GROUPS
from captioner import Captioner
from collator import CaptionCollator, input_size
from common.cli import parse, run
from common.files import output_folder, write_text
from metrics.clip_scores import load_scorers
from models.families import vision_encoder
from models.loading import build_model, load_model, make_trainable
from objectives import build_objective, check_objective
from reports import outputs as results
from reports.attention_maps import maps_of_worst
from reports.model_card import finish_run, write_card
from reports.plots import plot_curves
from reports.report import write_report
from training.checkpoints import find_checkpoint, record_run
from training.feature_cache import keep_features
from training.trainer import CaptionTrainer

logger = logging.getLogger("train")


def main():
    groups = parse(TRAIN_GROUPS)
    model_args, scratch_args, adapter_args, data_args, generation_args, objective_args, metric_args, args = groups
    reward_metrics = check_objective(args, objective_args, metric_args, scratch_args, data_args)
    flags = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}
    folder = output_folder(args.output_dir)
    checkpoint = find_checkpoint(folder, flags, args.resume_from_checkpoint)
    results.warn_of_missing_scores(metric_args)
    scorers = load_scorers(metric_args, args.device, reward_metrics)
    augmentation = data.Augmentation(data_args.augment, seed=args.seed) if data_args.augment else None
    text_augmentation = data.TextAugmentation(data_args.augment_text, args.seed) if data_args.augment_text else None
    set_seed(args.seed)

    # Data: records, one an image
    with args.main_process_first(desc="preparing the dataset"):
        bad_rows = []
        splits = data.load(**data_args.source(), max_samples=data_args.max_samples, bad_samples=bad_rows)
        splits, bad_images = data.check_training_images(splits, skip_bad_samples=data_args.skip_bad_samples)
    if "train" not in splits:
        raise ValueError(f"{data_args.dataset_name} has no training split. It has: {', '.join(splits)}.")
    train, validation, test = splits["train"], *(data.in_memory(splits.get(name)) for name in ("validation", "test"))
    if validation is None and args.eval_strategy != "no":
        raise ValueError(f"{data_args.dataset_name} has no validation split. Pass --eval_strategy no to train without.")

    # Model
    if scratch_args.model_config:
        vocab, captions = scratch_args.tokenizer_vocab, (text for row in train for text in row["captions"])
        model, processor = build_model(scratch_args.model_config, vocab, captions, model_args.fast_attention)
    else:
        model, processor = load_model(
            model_args.model_name_or_path, merge=not adapter_args.use_peft, **model_args.loading()
        )
    model = make_trainable(model, adapter_args, scratch_args.freeze_vision)
    how = {"autocast": args.autocast_dtype, "fast_jpeg": model_args.fast_jpeg}
    captioner = Captioner(model, processor, **how, **vars(generation_args))
    captioner.save_settings()

    # Train
    collating = {"max_txt_len": data_args.max_txt_len, "prompt": captioner.prompt, "fast_jpeg": model_args.fast_jpeg}
    if augmentation:
        augmentation.size = input_size(processor.image_processor)
    # What training goes through: records, or with a frozen encoder these with their encoded images.
    used = {"train": train, "validation": validation if args.eval_strategy != "no" else None}
    draws = args.objective != "cross_entropy"  # captions of its own; the references are then all of the image
    per_image = None if draws else data_args.captions_per_image
    if not any(parameter.requires_grad for parameter in vision_encoder(model).parameters()):
        used |= keep_features(scratch_args.feature_cache, captioner, used, args, per_image, augmentation)
    if data_args.streaming:
        pairs = data.CaptionStream(train, data_args.captions_per_image, seed=args.seed)
    else:
        pairs = data.CaptionPairs(used["train"], per_image)
    trainer = CaptionTrainer(
        model=model,
        args=args,
        processing_class=processor,
        objective=build_objective(args, objective_args, captioner, train, scorers),
        captioner=captioner,
        data_collator=CaptionCollator(
            processor,
            model.config,
            augmentation=augmentation,
            text_augmentation=text_augmentation,
            prompts_only=draws,
            **collating,
        ),
        eval_collator=CaptionCollator(processor, model.config, **collating),
        train_dataset=pairs,
        eval_dataset=used["validation"] and data.CaptionPairs(used["validation"], data_args.captions_per_image),
        validation=used["validation"],
        callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
        scorers=scorers,
        validation_images=validation["image"] if scorers and validation is not None else None,
        shown=validation.select(range(min(8, len(validation)))) if validation is not None else None,
    )
    if trainer.is_world_process_zero():
        record_run(folder, flags)
        results.write_bad_samples(folder, bad_rows + bad_images)
        if args.push_to_hub:  # the Hub leaves out what this names: pictures and texts of the data
            write_text(folder / ".gitignore", "report.html\nper_image.jsonl\n")
    trainer.accelerator.wait_for_everyone()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", outcome.metrics | trainer.peak_memory(), combined=False)
    trainer.save_state()

    # Evaluate
    known = None if data_args.streaming else [text for group in train["captions"] for text in group]
    examples, scored = [], []
    for name, records in (("validation", validation), ("test", test)):
        if records is None:
            continue
        predictions = captioner.caption_split(
            records, batch_size=args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers
        )
        if not trainer.is_world_process_zero():
            continue
        target = folder if name == "test" or test is None else output_folder(folder / name)
        results.write_predictions(target, predictions)
        scores, rows = results.score_records(
            predictions,
            records,
            metric_args,
            args.seed,
            training_captions=known,
            scorers=scorers,
            num_workers=args.dataloader_num_workers,
        )
        results.write_scores(
            target,
            scores,
            rows,
            split=name,
            dataset_name=data_args.dataset_name,
            dataset_fingerprint=data.fingerprint(records),
            model=str(folder),
            generation=captioner.description(),
        )
        scored.append((target, rows, records["image"]))
        logger.info("%s:\n%s", name, results.summary(scores))
        if name == "validation":
            trainer.save_metrics("eval", results.flat(scores, "eval"), combined=False)
        first = records.select(range(min(5, len(records))))
        examples = [
            {"image_id": row["image_id"], "caption": predictions[row["image_id"]], "references": row["captions"]}
            for row in first.select_columns(["image_id", "captions"])
        ]

    # Save
    if trainer.is_world_process_zero():
        plot_curves(trainer.state.log_history, folder)
        finish_run(folder, trainer, splits, examples)
        write_card(folder)
        for target, rows, images in scored if metric_args.report else ():
            looks = functools.partial(maps_of_worst, captioner, rows, images, metric_args.report_maps)
            write_report(target, rows, images, curves=folder / "training_curves.svg", looks=looks)
        logger.info("the model, its scores, captions, report, curves and card are in %s", folder)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run(main)

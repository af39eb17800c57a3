"""Caption a split and score it, or score captions that exist already.

python evaluate.py --model_name_or_path DIR --dataset_name NAME --split test --output_dir OUT
python evaluate.py --model_name_or_path DIR --dataset_name NAME --corrupt jpeg:10 --output_dir OUT    (robustness)
python evaluate.py --predictions P.json --references R.json --output_dir OUT
python evaluate.py ... --split validation --sweep "num_beams=1,3,5 length_penalty=0.6,1.0" [--save_best_sweep]
python evaluate.py --compare RUN_A RUN_B --output_dir OUT    (folders that evaluate.py or train.py wrote scores to)
python evaluate.py ... --clip_metrics clip-s pac-s --clip_model openai/clip-vit-base-patch32 --pac_checkpoint FILE.pth
"""

import functools
import json
import logging
from pathlib import Path

import data
from arguments import (
    DataArguments,
    EvaluateArguments,
    GenerationArguments,
    MetricArguments,
    ModelArguments,
)
from captioner import Captioner
from common.cli import parse, run
from common.files import output_folder, write_json
from common.processes import processes
from common.provenance import environment
from data.caption_files import find_images, load_predictions, load_references
from metrics.clip_scores import load_scorers
from metrics.coco_caption.text_checks import remove_illegal_characters
from reports import comparison
from reports import outputs as results
from reports.attention_maps import maps_of_worst
from reports.plots import plot_sweep
from reports.report import write_comparison_report, write_report
from reports.sweep import check_sweep, score_sweep, sweep_settings
from reports.sweep import summary as sweep_summary

logger = logging.getLogger("evaluate")


def main():
    model_args, data_args, generation_args, metric_args, args = parse(
        (ModelArguments, DataArguments, GenerationArguments, MetricArguments, EvaluateArguments)
    )
    folder = output_folder(args.output_dir)
    if args.compare:
        runs = comparison.read_runs(args.compare)
        found = comparison.compare(runs, metric_args.bootstrap_samples, args.seed)
        write_json(folder / "comparison.json", found | environment())
        logger.info("differences, in %s:\n%s\n%s", folder, comparison.summary(found), found["note"])
        if metric_args.report:
            write_comparison_report(folder, runs, found)
        return
    results.warn_of_missing_scores(metric_args)
    if bool(args.predictions) != bool(args.references):
        raise ValueError("--predictions and --references go together: captions, and what to score them against.")
    if args.predictions and args.corrupt:
        raise ValueError("--corrupt changes the images that are captioned, and with --predictions none is.")
    settings = sweep_settings(args.sweep) if args.sweep else []
    if settings:
        check_sweep(args, metric_args, model_args.model_name_or_path)
    sweep = looks = None
    corruption = data.corruption(args.corrupt)

    if args.predictions:
        predictions, references = load_predictions(args.predictions), load_references(args.references)
        if generation_args.remove_illegal_characters:
            predictions = {image: remove_illegal_characters(caption) for image, caption in predictions.items()}
        scorers = load_scorers(metric_args, processes().device)
        images = find_images(data_args.image_dir, references) if scorers or data_args.image_dir else None
        looking = {"scorers": scorers, "images": images, "num_workers": args.dataloader_num_workers}
        scores, rows = results.score_captions(predictions, references, metric_args, args.seed, **looking)
        source = {"predictions": args.predictions, "references": args.references}
    else:
        state = processes()
        with state.main_process_first():
            splits = data.load(
                **data_args.source(),
                splits=(args.split, "train") if args.seen_in_training else (args.split,),
                max_samples={args.split: args.max_samples} if args.max_samples is not None else None,
            )
        records = data.in_memory(splits[args.split])
        scorers = load_scorers(metric_args, state.device) if state.is_main_process else []
        captioner = Captioner.from_pretrained(
            model_args.model_name_or_path,
            bf16=args.bf16,
            fast_jpeg=model_args.fast_jpeg,
            loading=model_args.loading(),
            corruption=corruption,
            **vars(generation_args),
        )
        how = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
        captioners = [captioner.with_settings(**setting) for setting in settings]
        if settings:
            tried = captioner.sweep_split(records, captioners, **how)
        else:
            predictions = captioner.caption_split(records, **how)
        if not state.is_main_process:
            return
        if settings:
            found = [{"settings": s, "captions": c} for s, c in zip(settings, tried, strict=True)]
            write_json(folder / "sweep_captions.json", found)
            looking = {"scorers": scorers, "num_workers": args.dataloader_num_workers}
            sweep = score_sweep(settings, tried, records, args.sweep_metric, metric_args, args.seed, **looking)
            captioner, predictions = captioners[sweep["best"]], tried[sweep["best"]]
            write_json(folder / "sweep.json", {**sweep, "split": args.split, **environment()})
            plot_sweep(sweep, folder)
            logger.info("settings by %s on %s:\n%s", args.sweep_metric, args.split, sweep_summary(sweep))
            if args.save_best_sweep:
                path = Path(model_args.model_name_or_path, "generation_config.json")
                own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                chosen = {name: value for name, value in captioner.settings.items() if value is not None}
                write_json(path, own | chosen)
                logger.info("written to %s: %s", path, settings[sweep["best"]])
        results.write_predictions(folder, predictions)
        captions = (text for row in splits["train"] for text in row["captions"]) if args.seen_in_training else None
        scores, rows = results.score_records(
            predictions,
            records,
            metric_args,
            args.seed,
            training_captions=captions,
            scorers=scorers,
            num_workers=args.dataloader_num_workers,
        )
        source = {
            "split": args.split,
            "dataset_name": data_args.dataset_name,
            "dataset_fingerprint": data.fingerprint(records),
            "model": model_args.model_name_or_path,
            "generation": captioner.description(),
        }
        images = records["image"]
        looks = functools.partial(maps_of_worst, captioner, rows, images, metric_args.report_maps)
    results.write_scores(folder, scores, rows, **source)
    logger.info("scores of %d images, in %s:\n%s", len(predictions), folder, results.summary(scores))
    if metric_args.report:
        write_report(folder, rows, images, sweep=sweep, looks=looks)


if __name__ == "__main__":
    run(main)

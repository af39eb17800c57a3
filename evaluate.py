"""Caption a split and score it, or score existing captions.

python evaluate.py captions.csv --model_name_or_path DIR --output_dir OUT
python evaluate.py --model_name_or_path DIR --dataset_name NAME --corrupt jpeg:10 --output_dir OUT    (robustness)
python evaluate.py --predictions P.json --references R.json --output_dir OUT
python evaluate.py ... --split validation --sweep "num_beams=1,3,5 length_penalty=0.6,1.0" [--save_best_sweep]
python evaluate.py --compare RUN_A RUN_B --output_dir OUT    (folders that evaluate.py or train.py wrote scores to)
python evaluate.py --predictions P.jsonl --references captions.jsonl --languages all    (a set in several languages, as XM3600)
python evaluate.py --human_judgments FILE [--references R.json] --output_dir OUT    (which scores agree with people)
python evaluate.py ... --judge clair --llm openai:MODEL [--base_url http://localhost:8000/v1]    (a language model's score)
python evaluate.py ... --clip_metrics clip-s pac-s --clip_model openai/clip-vit-base-patch32 --pac_checkpoint FILE.pth
"""

from arguments import EVALUATE_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(EVALUATE_GROUPS)  # answers --help and mistakes before torch is imported

import logging

import data
from captioner import Captioner
from captioning import server
from common.errors import BelowThreshold, UserError
from common.files import output_folder, write_json, write_text
from common.processes import processes
from common.provenance import environment
from data.scored import load_scored
from metrics.clip_scores import load_scorers
from models.loading import asks
from reports import comparison, outputs
from reports.console import report_to_open
from reports.human import compare_with_people
from reports.languages import score_languages
from reports.report import write_comparison_report
from reports.score_predictions import score_predictions
from reports.score_split import score_split
from reports.sweep import check_sweep, choose_settings, save_settings, sweep_settings
from rewriting.judging import load_judges

logger = logging.getLogger("evaluate")


def main():
    model_args, data_args, generation_args, metric_args, args, judge_args = parse(EVALUATE_GROUPS)
    folder = output_folder(args.output_dir)
    if args.compare:
        return compare_runs(folder, args, metric_args)
    check_flags(args, generation_args, metric_args, model_args)
    server.check_flags(model_args, generation_args, judge_args, args)
    outputs.warn_of_missing_scores(metric_args)
    judges = load_judges(judge_args, folder)
    if args.human_judgments:
        return compare_with_people(folder, data_args.image_dir, metric_args, args, judges)
    if args.languages:
        return score_languages(folder, metric_args, args)
    if args.predictions:
        scored = score_predictions(folder, data_args, generation_args, metric_args, args, judges)
        return conclude(args, metric_args, scored, judges)

    # Load the data and the model
    state = processes()
    asked = asks(model_args.model_name_or_path, model_args.model_revision, generation_args.settings()["prompt"])
    with state.main_process_first():
        splits, overlap = load_scored(model_args.model_name_or_path, data_args, args, asked)
    records = splits[args.split]
    scorers = load_scorers(metric_args, state.device) if state.is_main_process else []
    served = server.is_served(model_args.model_name_or_path)
    if served:
        where = {"corruption": data.corruption(args.corrupt), "journal_file": folder / "answers.jsonl"}
        captioner = server.connect(model_args, generation_args, judge_args, args.seed, **where)
    else:
        captioner = load_captioner(model_args, generation_args, args, asked["own_questions"])

    # Caption
    options = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    looking = {"scorers": scorers, "num_workers": args.dataloader_num_workers}
    sweep = None
    if args.sweep:
        captioners = [captioner.with_settings(**setting) for setting in sweep_settings(args.sweep)]
        captions = captioner.sweep_split(records, captioners, **options)
        if state.is_main_process:
            sweep = choose_settings(folder, captions, records, metric_args, args, looking)
            captioner, predictions = captioners[sweep["best"]], captions[sweep["best"]]
            if args.save_best_sweep:
                save_settings(captioner, model_args.model_name_or_path)
    else:
        predictions = captioner.caption_split(records, **options)

    # Score
    if state.is_main_process:
        if args.seen_in_training:
            looking["training_captions"] = (text for row in splits["train"] for text in row["captions"])
        model, name = model_args.model_name_or_path, data_args.dataset_name
        source = {"split": args.split, "dataset_name": name, "model": model, "seen": overlap}
        source |= {"server": captioner.record()} if served else {}
        showing = {"captioner": captioner, "sweep": sweep, "judges": judges}
        scored = score_split(folder, predictions, records, metric_args, args.seed, source=source, **showing, **looking)
        conclude(args, metric_args, scored, judges)


def check_flags(args, generation_args, metric_args, model_args) -> None:
    if (generation_args.num_return_sequences or 1) > 1:
        raise UserError(
            "evaluate.py scores one caption per image, the first of several: leave out --num_return_sequences."
        )
    if args.sweep and generation_args.do_sample:
        raise UserError(
            "--sweep chooses the settings of a search, and --do_sample draws captions: leave one of them out."
        )
    data.corruption(args.corrupt)
    outputs.bars(args.fail_under)
    if args.sweep:
        sweep_settings(args.sweep)
        check_sweep(args, metric_args, model_args.model_name_or_path)


def compare_runs(folder, args, metric_args) -> None:
    if groups := comparison.read_groups(args.compare):
        differences = comparison.compare_groups(groups, metric_args.bootstrap_samples, args.seed)
    else:
        runs = comparison.read_runs(args.compare)
        differences = comparison.compare(runs, metric_args.bootstrap_samples, args.seed)
    write_json(folder / "comparison.json", differences | environment())
    for name, text in comparison.tables(differences, args.compare_scores).items():
        write_text(folder / name, text)
    logger.info(
        "differences, in %s:\n%s\n%s", folder, comparison.summary(differences, args.compare_scores), differences["note"]
    )
    if metric_args.report and not groups:
        write_comparison_report(folder, runs, differences)
        logger.info("%s", report_to_open(folder))


def conclude(args, metric_args, scored, judges) -> None:
    """Say what to open; end the script with exit code 3 if a score misses its threshold, 2 if a judge failed. All results are written by then."""
    if metric_args.spice == "auto" and (reason := scored.scores["unavailable"].get("SPICE")):
        logger.info("SPICE was not computed: %s", reason)
    if metric_args.report:
        logger.info("%s", report_to_open(scored.folder))
    if failed := next((judge.failure for judge in judges if judge.failure), None):
        raise UserError(failed)
    if below := outputs.below_bars(args.fail_under, scored.scores):
        raise BelowThreshold(f"fail_under: {'; '.join(below)}.")


def load_captioner(model_args, generation_args, args, own_questions: bool = False) -> Captioner:
    return Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        corruption=data.corruption(args.corrupt),
        own_questions=own_questions,
        seed=args.seed,
        **generation_args.settings(),
    )


if __name__ == "__main__":
    run(main)

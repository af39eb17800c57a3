"""Generation settings compared: the scores of each, which one is the best, and which others are as good."""

import dataclasses
import itertools
import logging
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from arguments import GenerationArguments
from common.cli import convert, flags_of
from common.errors import UserError
from common.files import write_json
from common.habits import nearest
from common.provenance import environment
from metrics.clip_scores import NAMES
from metrics.coco_caption.coco import preflight
from metrics.names import SCORES, is_better_low, score_named
from reports.comparison import paired_bootstrap
from reports.outputs import metrics_cache, score_records
from reports.plots import plot_sweep
from reports.significance import p_in_words

logger = logging.getLogger(__name__)

NOTE = (
    "p says how often chance alone would show so large a difference from the best setting (a bootstrap-t over the "
    "images, not corrected for the number of settings): where it is large, the cheaper setting is as good a choice. The "
    "best setting was chosen on these very captions, so its own score is optimistic: report another split's."
)
SHOWN = tuple(name for name in SCORES if name != "scene_facts")


def sweep_settings(sweep: str) -> list[dict]:
    """Every combination of "num_beams=1,3,5 length_penalty=0.6,1.0", one dict each, the last key varying fastest.

    ValueError for a key that is not a generation setting, and for a value of another type than its flag's.
    """
    parser = HfArgumentParser((GenerationArguments,), allow_abbrev=False)
    flags = flags_of(parser)
    for name in (
        "help",
        "prompt",
        "prompt_column",
        "system_prompt",
        "keep_prompt",
        "remove_illegal_characters",
    ):  # not settings of a search
        del flags[name]
    values = {}
    for part in sweep.split():
        name, equals, listed = part.partition("=")
        if not equals or not listed:
            raise UserError(f"sweep: '{part}' is not of the form key=value,value. Example: num_beams=1,3,5")
        if name not in flags:
            raise UserError(f"sweep: '{name}' cannot be swept.{nearest(name, flags)} Known: {', '.join(flags)}.")
        if name in values:
            raise UserError(f"sweep: '{name}' is given twice: list all its values after one '='.")
        try:
            converted = [convert(yaml.safe_load(value), flags[name]) for value in listed.split(",")]
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"sweep: {name}: {error}") from None
        if None in converted:
            raise UserError(f"sweep: {name}: a value is missing in '{part}'.")
        values[name] = list(dict.fromkeys(converted))
    if not values:
        raise UserError("sweep: no setting to sweep. Example: --sweep 'num_beams=1,3,5 length_penalty=0.6,1.0'")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def check_sweep(args, metric_args, model: str) -> None:
    """ValueError, before anything is captioned, if the sweep of these EvaluateArguments cannot work."""
    if args.predictions:
        raise UserError("--sweep captions with several settings, and with --predictions nothing is captioned.")
    clip = [prefix + NAMES[name] for name in metric_args.clip_metrics if name in NAMES for prefix in ("", "Ref")]
    if args.sweep_metric not in (*SHOWN, *clip):
        raise UserError(f"--sweep_metric {args.sweep_metric}: choose one of {', '.join((*SHOWN, *clip))}.")
    if args.sweep_metric in ("CHAIRs", "CHAIRi", "object_recall") and not metric_args.instances:
        raise UserError(f"--sweep_metric {args.sweep_metric} needs --instances.")
    asked = _java_scores(args.sweep_metric, metric_args)
    if reason := preflight(**asked, cache=metrics_cache(), language=metric_args.caption_language).get(
        args.sweep_metric
    ):
        raise UserError(f"--sweep_metric {args.sweep_metric}: {reason}")
    if args.save_best_sweep and not Path(model, "config.json").is_file():
        raise UserError(f"--save_best_sweep writes into the model's folder, and {model} is not a folder.")


def _java_scores(metric: str, metric_args) -> dict:
    """METEOR and SPICE take minutes in Java: they are computed only where they choose the best setting."""
    return {"meteor": metric == "METEOR", "spice": metric in ("SPICE", "SPIDEr") and (metric_args.spice or "auto")}


def score_sweep(
    settings: list[dict], captions: list[dict], records, metric: str, metric_args, seed: int, **how
) -> dict:
    """What sweep.json holds: {"metric", "best": index of the best setting, "settings": [{"settings", "rank", "scores",
    "interval", "mean_length", "p"}], "note"}.

    Args:
        settings: of each run; captions: its `{image_id: caption}`. Equal captions are scored once.
        metric: chooses the best. METEOR and SPICE are computed only if they are asked for here.
        how: for reports.outputs.score_records.
    """
    asked = dataclasses.replace(metric_args, **_java_scores(metric, metric_args))
    scored, results = {}, []
    for predictions in captions:
        texts = tuple(predictions.values())
        if texts not in scored:
            scored[texts] = score_records(predictions, records, asked, seed, **how)
        results.append(scored[texts])
    if results[0][0][metric] is None:
        raise UserError(
            f"sweep_metric: {metric} failed, {results[0][0]['unavailable'][metric]}. The captions are kept."
        )
    sign = 1 if is_better_low(metric) else -1
    order = sorted(
        range(len(results)), key=lambda place: sign * results[place][0][metric]
    )  # stable: the first of equal ones
    best = order[0]
    p = {}
    if asked.bootstrap_samples >= 100:
        for texts, (_, rows) in scored.items():
            p[texts] = paired_bootstrap(results[best][1], rows, asked.bootstrap_samples, seed, metric)[metric]["p"]
    table = [
        {
            "settings": setting,
            "rank": order.index(place) + 1,
            "scores": {name: scores[name] for name in dict.fromkeys((metric, *SHOWN)) if scores.get(name) is not None},
            "interval": scores["intervals"].get(metric),
            "mean_length": scores["corpus"]["mean_length"],
            "p": None if place == best else p.get(tuple(captions[place].values())),
        }
        for place, (setting, (scores, _)) in enumerate(zip(settings, results, strict=True))
    ]
    return {"metric": metric, "best": best, "settings": table, "note": NOTE}


def summary(sweep: dict) -> str:
    """The table as readable lines, the best first."""
    metric, rows = sweep["metric"], sorted(sweep["settings"], key=lambda row: row["rank"])
    lines = []
    for row in rows:
        setting = "  ".join(f"{key} {value}" for key, value in row["settings"].items())
        between = "  [{:.4f}, {:.4f}]".format(*row["interval"]) if row["interval"] else ""
        p = "" if row["p"] is None else f"  {p_in_words(row['p'])}"
        words = f"{row['mean_length']:.1f} words"
        lines.append(f"  {setting}  {score_named(metric).label} {row['scores'][metric]:.4f}{between}  {words}{p}")
    return "\n".join(lines)


def choose_settings(folder, captions: list[dict], records, metric_args, args, looking: dict) -> dict:
    """Score the captions of every setting of the sweep. Returns the content of sweep.json, with the best's index."""
    settings = sweep_settings(args.sweep)
    kept = [{"settings": s, "captions": c} for s, c in zip(settings, captions, strict=True)]
    write_json(folder / "sweep_captions.json", kept)
    sweep = score_sweep(settings, captions, records, args.sweep_metric, metric_args, args.seed, **looking)
    write_json(folder / "sweep.json", {**sweep, "split": args.split, **environment()})
    plot_sweep(sweep, folder)
    logger.info("settings by %s on %s:\n%s", args.sweep_metric, args.split, summary(sweep))
    return sweep


def save_settings(captioner, model_name_or_path: str) -> None:
    """Make the captioner's settings the defaults of its checkpoint."""
    captioner.save_settings()
    captioner.model.generation_config.save_pretrained(model_name_or_path)
    chosen = {name: value for name, value in captioner.settings.items() if value is not None}
    logger.info("written to %s: %s", Path(model_name_or_path, "generation_config.json"), chosen)

"""What a run leaves behind: predictions.json, coco_metrics.json and per_image.jsonl, with where they came from."""

import csv
import dataclasses
import io
import json
import logging
from pathlib import Path

from common.caches import cache_folder
from common.errors import UserError
from common.files import write_json, write_text
from common.provenance import environment, hide_secrets
from common.text import json_line, spreadsheet_cell
from data.seen import in_words
from drawn_scenes.facts import scene_facts, score_scene_facts
from metrics.chair import chair_scores, read_instances
from metrics.clip_scores import clip_scores
from metrics.coco_caption.coco import InvalidCaptions, preflight, score
from metrics.names import QUICK, SCORES, in_order, is_better_low, is_shown, name_of, score_named

logger = logging.getLogger(__name__)

SUBSET_COLUMNS = ("text_detected", "domain")  # VizWiz's and nocaps'
MOST_SUBSETS = 50


def write_predictions(folder: Path, predictions: dict[str, str]) -> None:
    """predictions.json in COCO's results format. Written before anything is scored, so that no scorer can lose it."""
    rows = [{"image_id": image_id, "caption": caption} for image_id, caption in predictions.items()]
    write_json(folder / "predictions.json", rows)


def write_bad_samples(folder: Path, samples: list[dict]) -> None:
    """bad_samples.jsonl: the training samples that were left out, with the reason; nothing if there are none."""
    if samples:
        write_text(folder / "bad_samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        logger.warning("left out %d bad training samples, listed in %s", len(samples), folder / "bad_samples.jsonl")


def write_scores(folder: Path, scores: dict, rows: list[dict], **source) -> dict:
    """coco_metrics.json: the scores, then what was scored (`source`) and where. per_image.jsonl: `rows` of
    score_captions, for report.html and for evaluate.py --compare; per_image.csv: their scores as a table. Returns what
    coco_metrics.json holds."""
    scores = {**scores, **hide_secrets(source), **environment()}
    write_json(folder / "coco_metrics.json", scores)
    write_text(folder / "per_image.jsonl", "".join(map(json_line, rows)))
    write_text(folder / "per_image.csv", _table_of_images(rows))
    return scores


def _table_of_images(rows: list[dict]) -> str:
    """per_image.csv: a line for each image, with a column for each score."""
    names = in_order(dict.fromkeys(name for row in rows for name in row["scores"]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image_id", "caption", "references", *names])
    for row in rows:
        scores = ["" if row["scores"].get(name) is None else row["scores"][name] for name in names]
        texts = row["image_id"], row["caption"], " | ".join(row["references"])
        writer.writerow([*map(spreadsheet_cell, texts), *scores])
    return file.getvalue()


def warn_of_missing_scores(metric_args) -> None:
    """Warns before hours of captioning which scores that were asked for will be missing, and why."""
    asked = {"meteor": metric_args.meteor, "spice": metric_args.spice, "language": metric_args.caption_language}
    try:
        reasons = preflight(**asked, cache=metrics_cache())
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, reason in reasons.items():
        if name != "SPICE" or metric_args.spice != "auto":
            logger.warning("%s will be null: %s", name, reason)


def metrics_cache() -> Path:
    """Where SPICE and METEOR keep what they fetch, parse and unpack."""
    return cache_folder() / "metrics"


def flat(scores: dict, prefix: str) -> dict:
    """The plain numbers of `scores`, as the Trainer's own result files hold them."""
    return {f"{prefix}_{name}": value for name, value in scores.items() if isinstance(value, int | float)}


def score_records(predictions: dict[str, str], records, metric_args, seed: int, **options):
    """`score_captions` for the captions of a split's records. Drawn scenes are checked for truth as well; VizWiz's
    photographs with legible text, and those without, are scored separately under `subsets`."""
    references = dict(zip(records["image_id"], records["captions"], strict=True))
    images = records["image"] if "image" in records.column_names else ()
    metrics, rows = score_captions(predictions, references, metric_args, seed, images=images, **options)
    if "facts" in records.column_names:
        facts = [json.loads(scene) for scene in records["facts"]]
        metrics["scene_facts"] = score_scene_facts(predictions, dict(zip(references, facts, strict=True)))
        for row, scene in zip(rows, facts, strict=True):
            true, total = (counts.total() for counts in scene_facts(row["caption"], scene))
            row["scores"]["scene_facts"], row["statistics"]["scene_facts"] = true / total, [true, total]
    for column in subset_columns(records.column_names, metric_args):
        groups: dict[str, list[dict]] = {}
        for row, value in zip(rows, records[column], strict=True):
            if value is not None:
                name = {True: column, False: f"no_{column}"}[value] if isinstance(value, bool) else str(value)
                groups.setdefault(name, []).append(row)
        if len(groups) > MOST_SUBSETS:
            raise UserError(f"subset_column: {column} has {len(groups)} values; at most {MOST_SUBSETS} can be scored.")
        metrics.setdefault("subsets", {})
        metrics["subsets"] |= {name: _subset_scores(group, metric_args, seed) for name, group in groups.items()}
    return metrics, rows


def subset_columns(there, metric_args) -> list[str]:
    """The columns by whose values images are scored separately. UserError if the one that was named is missing."""
    named = metric_args.subset_column
    if named and named not in there:
        raise UserError(f"subset_column: there is no column {named!r}. Columns: {', '.join(sorted(there)) or 'none'}.")
    return [name for name in ((named,) if named else SUBSET_COLUMNS) if name in there]


def _subset_scores(rows: list[dict], metric_args, seed: int) -> dict:
    """The scores of each subset of images on its own, CIDEr's document frequencies included. SPICE and the CLIP-based
    scores are means over images: they are not computed again."""
    part, part_rows = score_captions(
        {row["image_id"]: row["caption"] for row in rows},
        {row["image_id"]: row["references"] for row in rows},
        dataclasses.replace(metric_args, spice=False, instances=None),
        seed,
    )
    for name in {name for row in rows for name in row["scores"]} - set(part_rows[0]["scores"]):
        values = [row["scores"][name] for row in rows if name in row["scores"]]
        part[name] = sum(values) / len(values)
    return {name: part[name] for name in part if name not in ("unavailable", "not_asked_for", "sacrebleu_signature")}


def score_captions(
    predictions,
    references,
    metric_args,
    seed: int,
    *,
    training_captions=None,
    scorers=(),
    judges=(),
    images=(),
    split="",
    num_workers=0,
) -> tuple[dict, list[dict]]:
    """Scores by metrics.score with the flags of MetricArguments, by `scorers` (ClipScorer), which look at `images`, one for
    each of the references, and by `judges` (rewriting.judging.Judge).

    Returns (metrics, rows): what coco_metrics.json and per_image.jsonl hold. A row, one per image in the references'
    order, is {"image_id", "caption", "references", "scores": {metric: value}, "statistics": {name: counts}}.
    """
    try:
        metrics, per_image = score(
            predictions,
            references,
            meteor=metric_args.meteor,
            spice=metric_args.spice,
            spice_samples=metric_args.spice_samples,
            cache=metrics_cache(),
            language=metric_args.caption_language,
            java_timeout=metric_args.java_timeout,
            bootstrap_samples=metric_args.bootstrap_samples,
            seed=seed,
            training_captions=training_captions,
        )
    except InvalidCaptions as error:  # the metric's files import nothing of ours, so that evaluate.load can copy them
        raise UserError(str(error)) from None
    options = {"bootstrap_samples": metric_args.bootstrap_samples, "seed": seed}
    more = [judge.scores(predictions, references, **options) for judge in judges]
    if scorers:
        looking = {"split": split, "num_workers": num_workers}
        more.append(clip_scores(scorers, predictions, references, images, **options, **looking))
    for more_scores, of_images in more:
        metrics["intervals"] |= more_scores.pop("intervals")
        metrics["unavailable"] |= more_scores.pop("unavailable", {})
        metrics |= more_scores
        for name, values in of_images.items():
            for image_id, value in zip(references, values.tolist(), strict=True):
                if value == value:  # a judge may have no question about an image
                    per_image[image_id][name] = value
    if metric_args.instances:
        more_scores, hallucinated = chair_scores(
            predictions, references, read_instances(metric_args.instances), **options
        )
        metrics["intervals"] |= more_scores.pop("intervals")
        metrics |= more_scores
        for image_id, objects in hallucinated.items():
            row = per_image[image_id]
            row["CHAIRs"] = float(bool(objects["hallucinated"]))
            row["statistics"] |= objects["statistics"]
            row["objects"] = {"named": objects["objects"]} | {
                name: objects[name] for name in ("hallucinated", "missed")
            }
            for name, (part, whole) in objects["statistics"].items():
                row[name] = part / whole if whole else 0.0
    rows = []
    for image_id, captions in references.items():
        scores = per_image[image_id]
        more = {name: scores.pop(name) for name in ("statistics", "spice_tuples", "objects") if name in scores}
        row = {"image_id": image_id, "caption": predictions[image_id], "references": list(captions)}
        rows.append({**row, "scores": scores, **more})
    return metrics, rows


def quick_scores(metric_args, predictions: dict, references: dict, language: str) -> tuple[dict, list[dict]]:
    """`score_captions` for an evaluation in training: without Java, intervals, and what looks at images."""
    quick = dataclasses.replace(metric_args, **QUICK, instances=None, caption_language=language)
    return score_captions(predictions, references, quick, 0)


def summary(metrics: dict) -> str:
    """The scores as readable lines: each with its interval, or with the reason why it is missing."""
    lines = []
    names = [name for name in SCORES if name in metrics and name != "scene_facts" and is_shown(name, metrics)]
    width = max(len(score_named(name).label) for name in names)
    for name in names:
        value = metrics[name]
        if value is None:
            reason = metrics["unavailable"][name]
            lines.append(
                f"  {score_named(name).label:<{width}} null    {reason if len(reason) < 80 else reason[:77] + '...'}"
            )
        else:
            lines.append(f"  {score_named(name).label:<{width}} {value:.4f}{_between(metrics, name)}")
    if categories := metrics.get("SPICE_categories"):
        values = ", ".join(f"{name} {value:.4f}" for name, value in categories.items() if value is not None)
        lines.append(f"  SPICE by category: {values}")
    for metric, weights in metrics.get("clip_weights", {}).items():
        for name in (metric, f"Ref{metric}"):
            lines.append(f"  {name:<10} {metrics[name]:.4f}{_between(metrics, name)}")
        file = Path(weights.get("pac_checkpoint", weights["clip_model"])).name
        lines[-2] += f"  by {file}, sha256 {weights['sha256'][:12]}"
    shares = ("distinct", "bad_endings", "repeated_words", "empty")
    corpus = ", ".join(f"{name} {metrics['corpus'][name]:.3f}" for name in shares)
    lines.append(f"  captions   {metrics['corpus']['mean_length']:.1f} words on average; shares: {corpus}")
    if "seen" in metrics:
        lines.append(f"  {in_words(metrics['seen'])}")
    for name, part in metrics.get("subsets", {}).items():
        had = [score for score in (*names, *metrics.get("clip_weights", ())) if part.get(score) is not None]
        scores = ", ".join(f"{score_named(score).label} {part[score]:.4f}" for score in had)
        lines.append(f"  {name}, {part['counts']['images']} images: {scores}")
    if facts := metrics.get("scene_facts"):
        lines.append(
            f"  scene_facts {facts['scene_facts']:.4f}  "
            + ", ".join(f"{k} {v:.3f}" for k, v in facts.items() if k != "scene_facts" and isinstance(v, float))
        )
    return "\n".join(lines)


def bars(fail_under: str | None) -> dict[str, float]:
    """{score: bar} of "CIDEr=1.0 Bleu_4=0.3". UserError if it is not of that form."""
    bars_of = {}
    for part in (fail_under or "").split():
        name, _, value = part.partition("=")
        try:
            bars_of[name] = float(value)
        except ValueError:
            raise UserError(f"fail_under: '{part}' is not of the form CIDEr=1.0.") from None
    return bars_of


def below_bars(fail_under: str | None, scores: dict) -> list[str]:
    """What of the scores misses its bar, and by how much, a line each. UserError for a name that is not a score here."""
    missed = []
    for name, bar in bars(fail_under).items():
        key = name_of(name)
        value = scores.get(key)
        if isinstance(value, dict):
            value = value.get(key)
        if key not in scores or isinstance(value, dict | str | bool | list):
            names = [key for key, value in scores.items() if isinstance(value, float)]
            raise UserError(f"fail_under: there is no score '{name}' here. Scores: {', '.join(names)}.")
        if value is None:
            missed.append(f"{name} is null ({scores['unavailable'].get(key)}), its bar is {bar:g}")
        elif (value > bar) if is_better_low(key) else (value < bar):
            way = "above" if is_better_low(key) else "below"
            missed.append(f"{name} is {value:.4f}, {abs(value - bar):.4f} {way} {bar:g}")
    return missed


def _between(metrics: dict, name: str) -> str:
    interval = metrics.get("intervals", {}).get(name)
    return f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""

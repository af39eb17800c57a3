"""Which differences between captioners are real: a paired bootstrap test over the images that all of them captioned."""

import json
import os
from pathlib import Path

import numpy as np

from common.errors import UserError
from metrics.coco_caption.coco import corpus_scores, resampled_scores

SIGNIFICANT = 0.05
NOTE = (
    "Each run is compared with the first. The interval and p come from resamples of the images, the same for both runs: "
    "they tell what other images of this kind would change, not what training again with another seed would. With "
    "several runs p is corrected for their number (Holm), but not for looking at several scores: choose the one to "
    "decide by beforehand."
)


def read_run(folder: str) -> dict:
    """{"folder", "scores": coco_metrics.json, "rows": per_image.jsonl} of a folder that evaluate.py or train.py wrote.

    ValueError if it is none.
    """
    found = {}
    for name in ("coco_metrics.json", "per_image.jsonl"):
        path = Path(folder) / name
        try:
            text = path.read_text(encoding="utf-8")
            lines = [text] if name.endswith(".json") else text.strip("\n").split("\n")
            found[name] = [json.loads(line) for line in lines]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"compare: {folder} holds no {name}. Let evaluate.py score these captions first.") from None
        except ValueError as error:
            raise UserError(f"compare: {path} is damaged ({error}). Let evaluate.py write it again.") from None
    return {"folder": str(folder), "scores": found["coco_metrics.json"][0], "rows": found["per_image.jsonl"]}


def read_runs(folders: list[str]) -> dict[str, dict]:
    """{short name: run} of two folders or more, their rows in the first one's order.

    ValueError names the images that not all of them have, and images whose references differ.
    """
    if len(folders) < 2:
        raise UserError("compare: name two folders or more that evaluate.py or train.py wrote scores to.")
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("compare: the same folder is named twice.")
    shared = os.path.commonpath(paths)
    names = [os.path.relpath(path, shared) if str(path) != shared else path.name for path in paths]
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    first = runs[names[0]]
    expected = {row["image_id"]: row["references"] for row in first["rows"]}
    for run in list(runs.values())[1:]:
        rows = {row["image_id"]: row for row in run["rows"]}
        for lacking, has, images in (
            (run, first, [image for image in expected if image not in rows]),
            (first, run, [image for image in rows if image not in expected]),
        ):
            if images:
                raise UserError(
                    f"compare: {lacking['folder']} lacks {len(images)} images of {has['folder']}: "
                    f"{', '.join(map(repr, images[:5]))}{', ...' if len(images) > 5 else ''}. Only captions of the "
                    "same images can be compared: score both on one split."
                )
        differing = [image for image in expected if rows[image]["references"] != expected[image]]
        if differing:
            raise UserError(
                f"compare: {run['folder']} and {first['folder']} have other references for {len(differing)} images: "
                f"{', '.join(map(repr, differing[:5]))}. Score both against the same ones."
            )
        run["rows"] = [rows[image] for image in expected]
    return runs


def statistics(rows: list[dict]) -> dict[str, np.ndarray]:
    """The rows of per_image.jsonl as metrics.coco_caption.coco.resampled_scores takes them; NaN where an image has no such value."""
    summed = list(rows[0]["statistics"])
    found = {name: np.array([row["statistics"][name] for row in rows], dtype=float) for name in summed}
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    for name in names:
        if name not in summed and not name.startswith("Bleu_"):
            found[name] = np.array([row["scores"].get(name, np.nan) for row in rows], dtype=float)
    return found


def paired_bootstrap(
    baseline: list[dict], other: list[dict], samples: int, seed: int, metric: str | None = None
) -> dict:
    """How far `other` is above `baseline`, {metric: {"difference", "interval", "p"}}. Both are rows of per_image.jsonl,
    of the same images in the same order. `metric` is the only one to test; by default all are.

    `samples` times, as many images as there are are drawn with replacement, and both runs are scored on them as a corpus.
    The interval has 95 % of the differences of these resamples. p is two-sided: the share of resamples whose difference
    lies at least as far from the mean of all resamples as the difference itself lies from 0, that is how often chance
    alone would show such a difference (Efron and Tibshirani, "An Introduction to the Bootstrap", section 16.4; Riezler
    and Maxwell, "On some pitfalls in automatic evaluation and significance testing for MT", 2005). sacreBLEU's
    --paired-bs takes absolute differences before their mean, and so calls more differences real: of equally good
    captioners its p is below 0.5. A score that only one of the runs has is left out.
    """
    one, two = statistics(baseline), statistics(other)
    if metric:
        name = "Bleu" if metric.startswith("Bleu_") else metric
        one, two = {name: one[name]}, {name: two[name]}
    for name in set(one) | set(two):
        unknown = np.isnan(one[name]) | np.isnan(two[name]) if name in one and name in two else np.array([True])
        if unknown.all():
            one.pop(name, None), two.pop(name, None)
        elif unknown.any():  # SPICE is scored on a sample, and the runs may have had different ones
            one[name], two[name] = (np.where(unknown, np.nan, values) for values in (one[name], two[name]))
    scores = corpus_scores(one), corpus_scores(two)
    below, above = resampled_scores(one, samples, seed), resampled_scores(two, samples, seed)
    found = {}
    for metric in scores[0]:
        difference = scores[1][metric] - scores[0][metric]
        resampled = above[metric] - below[metric]
        as_far = np.abs(resampled - resampled.mean()) >= abs(difference)
        found[metric] = {
            "difference": difference,
            "interval": np.percentile(resampled, [2.5, 97.5]).tolist(),
            "p": float((as_far.sum() + 1) / (samples + 1)),
        }
    return found


def compare(runs: dict[str, dict], samples: int, seed: int) -> dict:
    """What comparison.json holds: the scores of all runs, and how far each is above or below the first, and whether
    that is real: p, by Holm's method corrected for the number of runs that are compared with the first, below 0.05."""
    if samples < 100:
        raise UserError(f"compare: bootstrap_samples {samples} is too few to tell chance from a difference; 1000 do.")
    baseline, *others = runs
    differences = {name: paired_bootstrap(runs[baseline]["rows"], runs[name]["rows"], samples, seed) for name in others}
    for metric in {metric for found in differences.values() for metric in found}:
        tests = sorted((found[metric] for found in differences.values() if metric in found), key=lambda test: test["p"])
        corrected = 0.0
        for rank, test in enumerate(tests):
            corrected = max(corrected, min(1.0, test["p"] * (len(tests) - rank)))
            test["p_corrected"], test["real"] = corrected, corrected < SIGNIFICANT
    return {
        "images": len(runs[baseline]["rows"]),
        "baseline": baseline,
        "runs": {name: {"folder": run["folder"], "scores": run["scores"]} for name, run in runs.items()},
        "scores": list(dict.fromkeys(metric for found in differences.values() for metric in found)),
        "differences": differences,
        "bootstrap_samples": samples,
        "seed": seed,
        "note": NOTE,
    }


def summary(comparison: dict) -> str:
    """The differences in lines for people."""
    lines = []
    for name, found in comparison["differences"].items():
        lines.append(f"  {name} against {comparison['baseline']}, {comparison['images']} images:")
        for metric, test in found.items():
            low, high = test["interval"]
            lines.append(
                f"    {metric:<12} {test['difference']:+.4f}  [{low:+.4f}, {high:+.4f}]  p {test['p_corrected']:.3f}  "
                + ("better" if test["difference"] > 0 else "worse" if test["difference"] < 0 else "equal")
                + ("" if test["real"] else ", but it may be chance")
            )
    return "\n".join(lines)

"""From the captions of a split to its scores and report: shared by train.py and evaluate.py."""

import dataclasses
import functools
import logging
from pathlib import Path

from common.text import counted
from data import fingerprint
from reports import outputs
from reports.attention_maps import maps_of_worst
from reports.report import write_report

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ScoredSplit:
    """The captions of a split and what they scored: `scores` as coco_metrics.json holds them, `rows` as per_image.jsonl."""

    folder: Path
    predictions: dict[str, str]
    records: object
    scores: dict
    rows: list[dict]

    def examples(self, number: int = 5) -> list[dict]:
        """The first captions with their references, for the model card."""
        return [{name: row[name] for name in ("image_id", "caption", "references")} for row in self.rows[:number]]


def score_split(
    folder: Path,
    predictions: dict[str, str],
    records,
    metric_args,
    seed: int,
    *,
    source: dict,
    captioner=None,
    curves: list[dict] = (),
    sweep: dict | None = None,
    **options,
) -> ScoredSplit:
    """Write predictions.json, coco_metrics.json, per_image.jsonl and report.html of a split to `folder`, in this order:
    a scorer that fails cannot lose captions, and a report that fails cannot lose scores.

    Args:
        predictions: `{image_id: caption}` of every record.
        records: a datasets.Dataset with `image_id`, `captions` and, where there are pictures to show, `image`.
        metric_args: MetricArguments. seed: of bootstrap resamples and subsamples.
        source: what was captioned, for coco_metrics.json. The records' fingerprint and the captioner's settings are added.
        captioner: the one that captioned, if there is one: its attention is shown for the lowest CIDEr.
        curves, sweep: for reports.report.write_report.
        options: for reports.outputs.score_records.
    """
    outputs.write_predictions(folder, predictions)
    options |= {"split": source.get("split", "")}
    scores, rows = outputs.score_records(predictions, records, metric_args, seed, **options)
    source |= {"dataset_fingerprint": fingerprint(records)}
    if captioner:
        scores["counts"]["cut_captions"] = captioner.cut
        source |= {"generation": captioner.description()}
    scores = outputs.write_scores(folder, scores, rows, **source)
    of = f"{source['split']} images" if source.get("split") else "images"
    logger.info("scores of %s, in %s:\n%s", counted(len(predictions), of), folder, outputs.summary(scores))
    if metric_args.report:
        images = records["image"] if "image" in records.column_names else None
        maps = captioner and functools.partial(maps_of_worst, captioner, rows, images, metric_args.report_maps)
        write_report(folder, scores, rows, images, curves=curves, sweep=sweep, looks=maps)
    return ScoredSplit(folder, predictions, records, scores, rows)

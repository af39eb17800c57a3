"""Scores of captions in several languages as one set: a table of languages, and the mean over them."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_json, write_text
from common.provenance import environment
from data.languages import read_languages
from metrics.coco_caption.coco import resampled_scores
from metrics.coco_caption.languages import tokenization
from metrics.names import in_order, score_named, shown
from reports.comparison import statistics
from reports.outputs import score_captions, write_scores

logger = logging.getLogger(__name__)
SHOWN = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE", "sacrebleu")


def score_languages(folder: Path, metric_args, args) -> None:
    """Write languages.json and its table languages.md, and the results of each language to a folder of its name.

    Args:
        args: EvaluateArguments; `languages` are codes, or all that predictions and references have.
    """
    predictions, references = read_languages(args.predictions), read_languages(args.references)
    both = [language for language in references if language in predictions]
    languages = both if args.languages == ["all"] else args.languages
    if missing := [language for language in languages if language not in both] or ([] if both else ["any language"]):
        raise UserError(
            f"languages: predictions and references do not both have {', '.join(missing)}; both have: {', '.join(both)}."
        )
    result: dict = {"languages": {}, "mean": {}}
    resampled: dict[str, list] = {}
    for language in languages:
        scores, rows = of_language(predictions[language], references[language], language, metric_args, args)
        (folder / language).mkdir(exist_ok=True)
        write_scores(folder / language, scores, rows, predictions=args.predictions, references=args.references)
        kept = {name: scores[name] for name in in_order(SHOWN)} | {"intervals": scores["intervals"]}
        kept |= {"images": len(rows), "tokens": tokenization(language), "unavailable": scores["unavailable"]}
        result["languages"][language] = kept
        if metric_args.bootstrap_samples:
            for name, values in resampled_scores(statistics(rows), metric_args.bootstrap_samples, args.seed).items():
                resampled.setdefault(name, []).append(values)
    for name in SHOWN:
        values = [scores[name] for scores in result["languages"].values()]
        if None not in values:
            of_all = np.mean(resampled[name], axis=0) if resampled else None
            interval = None if of_all is None else np.percentile(of_all, [2.5, 97.5]).tolist()
            result["mean"][name] = {"value": float(np.mean(values)), "interval": interval}
    write_json(folder / "languages.json", result | environment())
    write_text(folder / "languages.md", table(result))
    logger.info("scores of %d languages, in %s:\n%s", len(languages), folder, table(result))


def of_language(predictions: dict, references: dict, language: str, metric_args, args) -> tuple[dict, list[dict]]:
    if several := next((image for image, captions in predictions.items() if len(captions) > 1), None):
        raise UserError(f"{args.predictions}: image {several!r} has several captions in {language}; one is scored.")
    captions = {image: texts[0] for image, texts in predictions.items()}
    if args.common:
        captions, references = ({i: d[i] for i in references if i in predictions} for d in (captions, references))
    code = language.replace("_", "-")
    try:
        return score_captions(captions, references, dataclasses.replace(metric_args, caption_language=code), args.seed)
    except UserError as error:
        raise UserError(f"{language}: {error}") from None


def table(result: dict) -> str:
    """Markdown: a line for each language and one for the mean, intervals in brackets; METEOR and SPICE are of English only."""
    names = [name for name in in_order(SHOWN) if any(row[name] is not None for row in result["languages"].values())]
    lines = [
        f"| language | images | tokens | {' | '.join(score_named(name).label for name in names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for language, row in result["languages"].items():
        cells = [_cell(name, row[name], row["intervals"].get(name)) for name in names]
        lines.append(f"| {language} | {row['images']} | {row['tokens']} | {' | '.join(cells)} |")
    means = [result["mean"].get(name, {"value": None, "interval": None}) for name in names]
    cells = [_cell(name, mean["value"], mean["interval"]) for name, mean in zip(names, means, strict=True)]
    lines.append(f"| mean of {len(result['languages'])} | | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "–"
    return shown(name, value) + (f" [{shown(name, interval[0])}, {shown(name, interval[1])}]" if interval else "")

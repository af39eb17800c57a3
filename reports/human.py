"""Which scores agree with people: every score that can be computed of captions that people judged, and the user's own."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_json, write_text
from common.processes import processes
from common.provenance import environment
from common.text import json_line
from data.caption_files import find_images, match_images, read_references
from metrics.agreement import accuracy_on_pairs, agreement_with_ratings, pairs_of_ratings
from metrics.clip_scores import load_scorers
from metrics.judgments import Judgments, read_judgments
from metrics.names import in_order, score_named
from reports.outputs import score_captions

logger = logging.getLogger(__name__)
AGREEMENTS = {"tau_b": "tau-b", "tau_c": "tau-c", "pairwise_accuracy": "pairwise accuracy"}


def compare_with_people(folder: Path, image_dir: str | None, metric_args, args, judges=()) -> None:
    """Write human_judgments.json, its table human_judgments.md, and judged_captions.jsonl with the scores of each caption.

    Args:
        args: EvaluateArguments with human_judgments, and references where that file has none.
    """
    judgments = read_judgments(args.human_judgments, args.references, args.score_columns)
    references, names, left_out = references_of(judgments, args)
    scored, unavailable = score_judged(judgments, references, names, image_dir, metric_args, args, judges)
    agreement = agreements(judgments, scored, left_out, metric_args.bootstrap_samples, args.seed)
    result = {
        "human_judgments": args.human_judgments,
        "images": len({image for image, *_ in judgments.captions}),
        "captions": len(judgments.captions) - len(left_out),
        "ratings": len(judgments.ratings),
        "pairs": len(judgments.pairs),
        "without_rating": judgments.unrated,
        "left_out_as_references": len(left_out),
        "scores": {name: agreement[name] for name in in_order(agreement)},
        "unavailable": unavailable,
        "bootstrap_samples": metric_args.bootstrap_samples,
        "seed": args.seed,
    }
    rows = [
        {"image_id": image, "caption": caption, "scores": {name: values[number] for name, values in scored.items()}}
        for number, (image, caption, _) in enumerate(judgments.captions)
        if number not in left_out
    ]
    write_text(folder / "judged_captions.jsonl", "".join(map(json_line, rows)))
    write_json(folder / "human_judgments.json", result | environment())
    write_text(folder / "human_judgments.md", table(result))
    logger.info("%s, in %s:\n%s", summary(result), folder, table(result))


def references_of(judgments: Judgments, args) -> tuple[list[list[str]], dict[str, str], set[int]]:
    """(references of each judged caption, file names of images that have one, numbers of the captions to leave out).

    UserError where a caption has no references and the user has no scores of their own.
    """
    captions, names = judgments.captions, {}
    if args.references and not all(texts for *_, texts in captions):
        source = read_references(args.references, args.split)
        ids = match_images([image for image, *_ in captions], source)
        references = [
            list(texts) or source.captions.get(image, []) for image, (*_, texts) in zip(ids, captions, strict=True)
        ]
        names = {
            image: source.names[one] for (image, *_), one in zip(captions, ids, strict=True) if one in source.names
        }
    else:
        references = [list(texts) for *_, texts in captions]
    missing = [image for (image, *_), texts in zip(captions, references, strict=True) if not texts]
    if missing and not args.score_columns:
        has = (
            f"has none of {len(missing)} captions' images" if args.references else "is not given, and the file has none"
        )
        raise UserError(f"--references {has}, such as {missing[0]!r}: scores compare a caption with references.")
    copies = {
        number
        for number, ((_, caption, _), texts) in enumerate(zip(captions, references, strict=True))
        if judgments.without_copies and caption in texts
    }
    return ([] if missing else references), names, copies


def score_judged(
    judgments, references, names, image_dir, metric_args, args, judges
) -> tuple[dict[str, list], dict[str, str]]:
    """({score: its value for each judged caption, None where there is none}, {score: why it is missing})."""
    if not references:
        return {}, {"CIDEr": "human_judgments and references have no reference captions"}
    captions = {str(number): caption for number, (_, caption, _) in enumerate(judgments.captions)}
    plain = dataclasses.replace(metric_args, bootstrap_samples=0, instances=None, spice_samples=0)
    metrics, rows = score_captions(
        captions, dict(zip(captions, references, strict=True)), plain, args.seed, judges=judges
    )
    scored: dict[str, list] = {name: [row["scores"].get(name) for row in rows] for name in rows[0]["scores"]}
    if scorers := load_scorers(metric_args, processes().device):
        images = [image for image, *_ in judgments.captions]
        files = dict(zip(dict.fromkeys(images), find_images(image_dir, dict.fromkeys(images), names), strict=True))
        keys, pictures = [("", image) for image in images], [str(files[image]) for image in images]
        for scorer in scorers:
            options = {"num_workers": args.dataloader_num_workers}
            values = scorer.score(keys, pictures, list(captions.values()), references, **options)
            scored |= {scorer.name: values[0].tolist(), f"Ref{scorer.name}": values[1].tolist()}
    return scored, metrics["unavailable"]


def agreements(judgments: Judgments, scored: dict[str, list], left_out: set[int], samples: int, seed: int) -> dict:
    """{score: {"tau_b", "tau_c", "pairwise_accuracy"}} and for pairs {"pairwise_accuracy", "by_category"}."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(image for image, *_ in judgments.captions))}
    image_of = np.array([numbers[image] for image, *_ in judgments.captions])
    values = {name: np.array(of_one, dtype=float) for name, of_one in scored.items()}
    result: dict[str, dict] = {}
    if judgments.ratings:
        captions, ratings = (np.array(column) for column in zip(*judgments.ratings, strict=True))
        kept = ~np.isin(captions, list(left_out))
        captions, ratings, images = captions[kept], ratings[kept], image_of[captions[kept]]
        pairs, preferred = pairs_of_ratings(captions, ratings, images)
        columns = {name: of_one[captions] for name, of_one in values.items()}
        columns |= {name: np.array(of_one, dtype=float)[kept] for name, of_one in judgments.columns.items()}
        for name, of_judgments in columns.items():
            of_captions = np.full(len(image_of), np.nan)
            of_captions[captions] = of_judgments
            sides = of_captions[pairs[:, 0]], of_captions[pairs[:, 1]]
            result[name] = agreement_with_ratings(of_judgments, ratings, images, samples, seed)
            result[name]["pairwise_accuracy"] = accuracy_on_pairs(
                *sides, preferred, image_of[pairs[:, 0]], samples, seed
            )
    if judgments.pairs:
        first, second, preferred, categories = (np.array(column) for column in zip(*judgments.pairs, strict=True))
        sides = {name: (of_one[first], of_one[second]) for name, of_one in values.items()}
        sides |= {name: np.array(of_one, dtype=float).T for name, of_one in judgments.columns.items()}
        for name, (a, b) in sides.items():
            accuracy = {None: np.ones(len(a), dtype=bool)} | {
                c: categories == c for c in dict.fromkeys(categories) if c
            }
            parts = {
                category: accuracy_on_pairs(a[of], b[of], preferred[of], image_of[first][of], samples, seed)
                for category, of in accuracy.items()
            }
            result[name] = {"pairwise_accuracy": parts.pop(None)} | ({"by_category": parts} if parts else {})
    return result


def table(result: dict) -> str:
    """Markdown: a line for each score, its agreements times 100 with their intervals."""
    first = next(iter(result["scores"].values()))
    columns = {name: label for name, label in AGREEMENTS.items() if name in first}
    lines = [f"| | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for name, agreement in result["scores"].items():
        lines.append(f"| {score_named(name).label} | {' | '.join(_cell(agreement[column]) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(agreement: dict) -> str:
    if agreement["value"] is None:
        return "–"
    interval = agreement["interval"]
    return f"{100 * agreement['value']:.3f}" + (
        f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    )


def summary(result: dict) -> str:
    counts = [f"{result['captions']:,} captions of {result['images']:,} images"]
    counts += [f"{result[name]:,} {name}" for name in ("ratings", "pairs") if result[name]]
    if result["left_out_as_references"]:
        counts.append(f"{result['left_out_as_references']} captions left out that are references word for word")
    if result["without_rating"]:
        counts.append(f"{result['without_rating']} without a rating")
    counts += [f"{name} is missing: {why}" for name, why in result["unavailable"].items()]
    return "agreement with people, times 100: " + "; ".join(counts)

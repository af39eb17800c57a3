"""Which differences between captioners are real: tests over the images that all of them captioned, and over seeds."""

import csv
import glob
import io
import json
import os
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.text import spreadsheet_cell
from metrics.coco_caption.coco import corpus_scores
from metrics.names import in_order, is_better_low, name_of, score_named
from reports.significance import FEWEST_IMAGES, group_test, p_in_words, paired_tests, pseudo_values

SIGNIFICANT = 0.05
NOTE = (
    "Each run is compared with the first. The interval and p come from resamples of the images, the same for both runs: "
    "they tell what other images of this kind would change, not what training again with another seed would. With "
    "several runs p is corrected for their number (Holm), but not for looking at several scores: choose the one to "
    f"decide by beforehand. Below {FEWEST_IMAGES} images there is no p."
)


def read_run(folder: str) -> dict:
    """{"folder", "scores": coco_metrics.json, "rows": per_image.jsonl} of a folder that evaluate.py or train.py wrote.

    ValueError if it is not one.
    """
    content = {}
    for name in ("coco_metrics.json", "per_image.jsonl"):
        path = Path(folder) / name
        try:
            text = path.read_text(encoding="utf-8")
            lines = [text] if name.endswith(".json") else text.strip("\n").split("\n")
            content[name] = [json.loads(line) for line in lines]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"compare: {folder} holds no {name}. Score its captions with evaluate.py.") from None
        except ValueError as error:
            raise UserError(f"compare: {path} is damaged ({error}). Write it again with evaluate.py.") from None
    return {"folder": str(folder), "scores": content["coco_metrics.json"][0], "rows": content["per_image.jsonl"]}


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
                    f"{', '.join(map(repr, images[:5]))}{' and more' if len(images) > 5 else ''}. Only captions of the "
                    "same images can be compared: score both on one split."
                )
        differing = [image for image in expected if rows[image]["references"] != expected[image]]
        if differing:
            raise UserError(
                f"compare: {run['folder']} and {first['folder']} have different references for {len(differing)} images: "
                f"{', '.join(map(repr, differing[:5]))}. Score both against the same ones."
            )
        run["rows"] = [rows[image] for image in expected]
    return runs


def statistics(rows: list[dict]) -> dict[str, np.ndarray]:
    """The rows of per_image.jsonl as metrics.coco_caption.coco.resampled_scores takes them; NaN where an image has no such value."""
    summed = list(rows[0]["statistics"])
    table = {name: np.array([row["statistics"][name] for row in rows], dtype=float) for name in summed}
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    for name in names:
        if name not in summed and not name.startswith("Bleu_"):
            table[name] = np.array([row["scores"].get(name, np.nan) for row in rows], dtype=float)
    return table


def paired_bootstrap(
    baseline: list[dict], other: list[dict], samples: int, seed: int, metric: str | None = None
) -> dict:
    """How far `other` is above `baseline`, {metric: {"difference", "interval", "p"}}. Both are rows of per_image.jsonl,
    of the same images in the same order. `metric` is the only one to test; by default all are.

    Interval and p come from `samples` resamples of the images, the same for both runs (significance.paired_tests). A score
    that only one of the runs has is left out.
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
    below, above = pseudo_values(one), pseudo_values(two)
    differences = {name: (scores[1][name] - scores[0][name], above[name] - below[name]) for name in below}
    return paired_tests(differences, samples, seed)


def compare(runs: dict[str, dict], samples: int, seed: int) -> dict:
    """What comparison.json holds: the scores of all runs, and how far each is above or below the first, and whether
    that is real: p, by Holm's method corrected for the number of runs that are compared with the first, below 0.05."""
    if samples < 100:
        raise UserError(f"compare: bootstrap_samples {samples} is too few to tell chance from a difference; use 1000.")
    baseline, *others = runs
    differences = {name: paired_bootstrap(runs[baseline]["rows"], runs[name]["rows"], samples, seed) for name in others}
    _correct(differences)
    return {
        "images": len(runs[baseline]["rows"]),
        "baseline": baseline,
        "runs": {name: {"folder": run["folder"], "scores": run["scores"]} for name, run in runs.items()},
        "scores": list(dict.fromkeys(metric for of_run in differences.values() for metric in of_run)),
        "differences": differences,
        "bootstrap_samples": samples,
        "seed": seed,
        "note": NOTE,
    }


def _is_better(metric: str, test: dict) -> bool:
    return (test["difference"] > 0) != is_better_low(metric)


GROUP_NOTE = (
    "Each group is compared with the first by the mean of its runs. The interval and p are of t tests whose variance has "
    "that of the runs' scores within the groups and that of the images: they tell what other images and other seeds of "
    "this kind would change. With several groups p is corrected for their number (Holm). Two groups of one run each have "
    f"no p: nothing tells what another seed would change; nor have fewer than {FEWEST_IMAGES} images."
)


def read_groups(named: list[str]) -> dict[str, list[dict]] | None:
    """{group: its runs} of "A=runs/a-*" "B=runs/b-*", all rows in one order; None if these are plain folders.

    UserError for a pattern without folders, and for what read_runs refuses.
    """
    pairs = [(entry, *entry.partition("=")) for entry in named]
    if not any(equals and not Path(entry).exists() for entry, _, equals, _ in pairs):
        return None
    groups: dict[str, list[str]] = {}
    for entry, name, equals, pattern in pairs:
        if not equals or not name:
            raise UserError(f"compare: '{entry}' is not of the form NAME=FOLDERS, such as A=runs/a-*.")
        folders = sorted(folder for folder in glob.glob(pattern) if (Path(folder) / "coco_metrics.json").is_file())
        if not folders:
            raise UserError(f"compare: no folder that matches {pattern} holds a coco_metrics.json.")
        groups.setdefault(name, []).extend(folders)
    if len(groups) < 2:
        raise UserError("compare: name two groups or more, such as 'A=runs/a-*' 'B=runs/b-*'.")
    runs = iter(read_runs([folder for folders in groups.values() for folder in folders]).values())
    return {name: [next(runs) for _ in folders] for name, folders in groups.items()}


def compare_groups(groups: dict[str, list[dict]], samples: int, seed: int) -> dict:
    """What comparison.json holds for groups of runs: mean and standard deviation (n - 1) of each score over a group's
    runs, and how far each group's mean is above or below the first group's."""
    if samples < 100:
        raise UserError(f"compare: bootstrap_samples {samples} is too few to tell chance from a difference; use 1000.")
    tables = {name: [statistics(run["rows"]) for run in runs] for name, runs in groups.items()}
    shared = _on_shared_images([table for of_group in tables.values() for table in of_group])
    scores: dict[str, dict] = {}
    values: dict[str, dict] = {}
    for group, of_group in tables.items():
        kept = [{name: table[name] for name in table if name in shared} for table in of_group]
        of_runs, of_images = [corpus_scores(table) for table in kept], [pseudo_values(table) for table in kept]
        scores[group] = {metric: np.array([of_run[metric] for of_run in of_runs]) for metric in of_runs[0]}
        values[group] = {metric: np.stack([of_run[metric] for of_run in of_images]) for metric in of_images[0]}
    baseline, *others = groups
    differences = {
        name: {metric: _group_test(metric, scores, values, baseline, name) for metric in values[name]}
        for name in others
    }
    _correct(differences)
    return {
        "images": len(groups[baseline][0]["rows"]),
        "baseline": baseline,
        "groups": {
            name: {
                "folders": [run["folder"] for run in runs],
                "scores": {
                    metric: {
                        "mean": float(values.mean()),
                        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
                        "values": values.tolist(),
                    }
                    for metric, values in scores[name].items()
                },
            }
            for name, runs in groups.items()
        },
        "scores": in_order(scores[baseline]),
        "differences": differences,
        "bootstrap_samples": samples,
        "seed": seed,
        "note": GROUP_NOTE,
    }


def _on_shared_images(tables: list[dict[str, np.ndarray]]) -> set[str]:
    """The scores that all tables have. An image that one of them lacks (SPICE is scored on a sample) becomes NaN in all."""
    shared = set.intersection(*map(set, tables))
    for name in sorted(shared):
        columns = [table[name] for table in tables]
        unknown = np.logical_or.reduce([np.isnan(column.reshape(len(column), -1)[:, 0]) for column in columns])
        if unknown.all():
            shared = shared - {name}
        elif unknown.any():
            for table in tables:
                table[name] = np.where(unknown, np.nan, table[name])
    return shared


def _group_test(metric: str, scores: dict, values: dict, baseline: str, other: str) -> dict:
    of_images = [values[name][metric] for name in (baseline, other)]
    scored = ~np.isnan(of_images[0][0])
    means = scores[baseline][metric], scores[other][metric]
    return group_test(tuple(group[:, scored] for group in of_images), means)


def _correct(differences: dict[str, dict]) -> None:
    """Adds to each test its p by Holm's method, corrected for the number of comparisons, and whether it is real."""
    for metric in {metric for of_run in differences.values() for metric in of_run}:
        every = [of_run[metric] for of_run in differences.values() if metric in of_run]
        for test in every:
            test["p_corrected"], test["real"] = None, False
        tests = sorted((test for test in every if test["p"] is not None), key=lambda test: test["p"])
        corrected = 0.0
        for rank, test in enumerate(tests):
            corrected = max(corrected, min(1.0, test["p"] * (len(tests) - rank)))
            test["p_corrected"], test["real"] = corrected, corrected < SIGNIFICANT


def summary(comparison: dict, columns: list[str] = ()) -> str:
    """The differences as readable lines, of the scores `columns` as in `tables`."""
    lines, chosen = [], [name_of(column) for column in columns]
    for name, tests in comparison["differences"].items():
        lines.append(f"  {name} against {comparison['baseline']}, {comparison['images']} images:")
        for metric in chosen or in_order(tests):
            test = tests[metric]
            between = "[{:+.4f}, {:+.4f}]  ".format(*test["interval"]) if test["interval"] else ""
            between += p_in_words(test["p_corrected"] if test["interval"] else None)
            lines.append(
                f"    {score_named(metric).label:<13} {test['difference']:+9.4f}  {between}  "
                + ("equal" if not test["difference"] else "better" if _is_better(metric, test) else "worse")
                + ("" if test["real"] else ", but it may be chance")
            )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- tables


def tables(comparison: dict, columns: list[str] = ()) -> dict[str, str]:
    """{file name: content}: the scores and differences as Markdown, as LaTeX (needs the package booktabs), and as CSV with
    a line for each run or group and score. The best of each score is bold; a star marks what differs from the first beyond
    chance.

    Args:
        columns: the scores to show, by name or label, in this order; by default all that every run has.
    """
    rows = _rows(comparison)
    shared = [name for name in in_order(comparison["scores"]) if all(name in row for row in rows.values())]
    metrics = [name_of(column) for column in columns] or shared
    if missing := [column for column in columns if name_of(column) not in shared]:
        labels = ", ".join(score_named(name).label for name in shared)
        raise UserError(f"compare_scores: not every run has {', '.join(missing)}. All have: {labels}.")
    best = {
        metric: (min if is_better_low(metric) else max)(
            round(row[metric][0], _decimals(metric)) for row in rows.values()
        )
        for metric in metrics
    }
    cells = {
        name: [
            _Cell(metric, *row[metric][:2], best[metric], comparison["differences"].get(name, {}).get(metric))
            for metric in metrics
        ]
        for name, row in rows.items()
    }
    labels, note = [score_named(name).label for name in metrics], _note(comparison, rows)
    return {
        "comparison.md": _markdown(labels, cells, note),
        "comparison.tex": _latex(labels, cells, note),
        "comparison.csv": _csv(metrics, rows, comparison["differences"]),
    }


def _note(comparison: dict, rows: dict[str, dict]) -> str:
    """What a table's reader has to know, the numbers of seeds among it."""
    runs = {name: next(iter(cells.values()))[2] for name, cells in rows.items()}
    parts = [f"{comparison['images']:,} images"]
    if "groups" in comparison:
        counts = set(runs.values())
        of_each = ", ".join(f"{number} ({name})" for name, number in runs.items())
        parts.append(f"mean ± standard deviation of {counts.pop() if len(counts) == 1 else of_each} runs")
    return "; ".join([*parts, "bold: the best", f"*: differs from {comparison['baseline']}, p < {SIGNIFICANT}"])


def _rows(comparison: dict) -> dict[str, dict]:
    """{run or group: {score: (mean, standard deviation or None, runs)}}"""
    if "groups" in comparison:
        return {
            name: {
                metric: (score["mean"], score["std"], len(score["values"])) for metric, score in group["scores"].items()
            }
            for name, group in comparison["groups"].items()
        }
    rows = {}
    for name, run in comparison["runs"].items():
        values = {metric: run["scores"].get(metric) for metric in comparison["scores"]}
        values = {metric: value.get(metric) if isinstance(value, dict) else value for metric, value in values.items()}
        rows[name] = {metric: (value, None, 1) for metric, value in values.items() if value is not None}
    return rows


def _decimals(metric: str) -> int:
    return score_named(metric).decimals


class _Cell:
    """A score of a run or group as a table has it; `std` is None for a single run."""

    def __init__(self, metric: str, mean: float, std: float | None, best: float, test: dict | None):
        self.mean = f"{mean:.{_decimals(metric)}f}"
        self.std = None if std is None else f"{std:.{_decimals(metric)}f}"
        self.is_best, self.is_real = round(mean, _decimals(metric)) == best, bool(test and test["real"])


def _markdown(labels: list[str], cells: dict[str, list[_Cell]], note: str) -> str:
    lines = [f"| | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for name, row in cells.items():
        texts = [
            (f"**{cell.mean}**" if cell.is_best else cell.mean)
            + (f" ± {cell.std}" if cell.std else "")
            + ("*" if cell.is_real else "")
            for cell in row
        ]
        lines.append(f"| {name.replace('|', '&#124;')} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", note]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def _latex(labels: list[str], cells: dict[str, list[_Cell]], note: str) -> str:
    def text(words: str) -> str:
        return "".join(_LATEX.get(character, character) for character in words)

    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(labels)}}}",
        "\\toprule",
        " & ".join(["", *map(text, labels)]) + r" \\",
        "\\midrule",
    ]
    for name, row in cells.items():
        values = [
            "$"
            + (f"\\mathbf{{{cell.mean}}}" if cell.is_best else cell.mean)
            + (f" \\pm {cell.std}" if cell.std else "")
            + ("^{*}" if cell.is_real else "")
            + "$"
            for cell in row
        ]
        lines.append(" & ".join([text(name), *values]) + r" \\")
    words = text(note).replace("±", r"$\pm$").replace("<", "$<$").replace("*", "$^{*}$")
    lines += ["\\bottomrule", f"\\multicolumn{{{len(labels) + 1}}}{{l}}{{\\footnotesize {words}}}", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def _csv(metrics: list[str], rows: dict, differences: dict) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "score", "mean", "std", "runs", "difference", "low", "high", "p", "p_corrected"])
    for name, cells in rows.items():
        for metric in metrics:
            mean, std, runs = cells[metric]
            test = differences.get(name, {}).get(metric)
            tested = (
                [test["difference"], *(test["interval"] or ["", ""]), test["p"], test["p_corrected"]]
                if test
                else [""] * 5
            )
            writer.writerow([spreadsheet_cell(name), metric, mean, "" if std is None else std, runs, *tested])
    return file.getvalue()

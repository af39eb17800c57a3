"""Geometry of the charts that report.html draws as SVG: histograms and lines in a box of 100 by 40, y pointing down."""

import math
from collections import Counter

from metrics.coco_caption.tokenizer import tokenize

WIDTH, HEIGHT = 100, 40


def charts(runs: dict[str, dict]) -> list[dict]:
    """Histograms over the images: of CIDEr, length and CLIP-based scores; for several runs, how far CIDEr is above or
    below the first run's."""
    first, *others = runs.values()
    scores = [row["scores"] for row in first["rows"]]
    if others:
        made = []
        for name, run in list(runs.items())[1:]:
            values = [
                b["scores"]["CIDEr"] - a["scores"]["CIDEr"] for a, b in zip(first["rows"], run["rows"], strict=True)
            ]
            made.append(histogram(values, f"CIDEr: {name} minus {next(iter(runs))}", x_name="difference per image"))
        return made
    lengths = [len(tokens) for tokens in tokenize(row["caption"] for row in first["rows"])]
    made = [histogram([image_scores["CIDEr"] for image_scores in scores], "CIDEr per image", x_name="CIDEr")]
    made.append(histogram(lengths, "Words per caption", whole=True, x_name="words"))
    made += [
        histogram([image_scores[name] for image_scores in scores], f"{name} per image", x_name=name)
        for name in scores[0]
        if name.endswith(("CLIP-S", "PAC-S", "PAC-S++"))
    ]
    return made


def histogram(values: list[float], title: str, whole: bool = False, x_name: str = "", y_name: str = "images") -> dict:
    """What the template draws: {"title", "text", "x_name", "y_name", "bars": [{"x", "y", "width", "height", "text"}],
    "x_ticks": [{"x", "text"}], "y_ticks": [{"y", "text"}], "zero": x or None, "most": count of the highest bar}.

    `whole` numbers have one bar each if there are few of them.
    """
    low, high = min(values), max(values)
    width = nice_step((high - low) / 20 if high > low else (abs(low) or 1) / 10)
    if whole:
        width = max(1, round(width))
    start = math.floor(low / width + 1e-9) * width
    if low == high:  # one bar, in the middle of ten or at the axis
        start -= 5 * width if low < 0 else min(5 * width, start)
    counts = Counter(math.floor((value - start) / width + 1e-9) for value in values)
    bins, highest = max(counts) + 1 if low < high else max(10, max(counts) + 1), max(counts.values())
    alone = whole and width == 1  # a bar is one number, which is written below its middle
    edges = labels([start + width * number for number in range(bins + 1)], width)
    top, y_step = y_scale(highest)
    bars = [
        {
            "x": WIDTH * number / bins,
            "y": HEIGHT * (1 - count / top),
            "width": WIDTH / bins,
            "height": HEIGHT * count / top,
            "text": f"{edges[number] if alone else f'{edges[number]} to {edges[number + 1]}'}: "
            f"{count:,} {'image' if count == 1 else 'images'}",
        }
        for number, count in sorted(counts.items())
    ]
    end = start + width * bins
    step = nice_step((end - start) / 6, whole=whole)
    first = math.ceil(start / step - 1e-9)
    named = [step * number for number in range(first, math.floor((end - width * alone) / step + 1e-9) + 1)]
    median, mean = sorted(values)[len(values) // 2], sum(values) / len(values)
    return {
        "title": title,
        "text": f"mean {mean:.2f}, median {_short(median)}, range {_short(low)} to {_short(high)}",
        "x_name": x_name,
        "y_name": y_name,
        "bars": bars,
        "x_ticks": [
            {"x": WIDTH * (value - start + 0.5 * alone) / (end - start), "text": text}
            for value, text in zip(named, labels(named, step), strict=True)
        ],
        "y_ticks": [
            {"y": HEIGHT * (1 - value / top), "text": f"{value:,}"} for value in range(0, top + 1, y_step)
        ],
        "zero": WIDTH * -start / (width * bins) if low < 0 < high else None,
        "most": highest,
    }  # fmt: skip


def line_charts(panels: list[dict]) -> list[dict]:
    """The panels of reports.plots.training_panels as the template draws them: all over one range of steps."""
    steps = [step for panel in panels for line in panel["lines"] for step, _ in line["points"]]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    x_step = nice_step((last - first) / 5, whole=True)
    x_values = range(math.ceil(first / x_step) * x_step, last + 1, x_step)
    made = []
    for panel in panels:
        values = [value for line in panel["lines"] for _, value in line["points"]]
        low, high = min(values), max(values)
        y_step = nice_step((high - low) / 4) if high > low else nice_step(abs(high) or 1)
        bottom, top = math.floor(low / y_step + 1e-9), math.ceil(high / y_step - 1e-9)
        if bottom == top:  # a score or a loss has no negative values to make room for
            bottom, top = bottom - 1 if low < 0 else max(0, bottom - 1), top + 1
        y_values = [y_step * number for number in range(bottom, top + 1)]

        def x(step):
            return WIDTH * (step - first) / (last - first)

        def y(value, low=y_values[0], high=y_values[-1]):
            return HEIGHT * (1 - (value - low) / (high - low))

        lines = []
        for line in panel["lines"]:
            points = [
                {"x": x(step), "y": y(value), "text": f"step {step:,}: {value:.4g}"} for step, value in line["points"]
            ]
            lines.append({"label": line["label"], "points": points, "marked": len(points) <= 30})
        best = panel["best_step"]
        made.append({
            "title": panel["title"],
            "text": "; ".join(_line_text(line) for line in panel["lines"]),
            "x_name": "step",
            "y_name": "",
            "lines": lines,
            "x_ticks": [{"x": x(value), "text": f"{value:,}"} for value in x_values],
            "y_ticks": [{"y": y(v), "text": text} for v, text in zip(y_values, labels(y_values, y_step), strict=True)],
            "best": None if best is None else {"x": x(best), "text": f"step {best:,}"},
        })  # fmt: skip
    return made


def nice_step(at_least: float, whole: bool = False) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `at_least`."""
    if whole and at_least <= 1:
        return 1
    magnitude = 10.0 ** math.floor(math.log10(at_least))
    step = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= at_least * 0.999)
    return round(step) if whole else step


def y_scale(most: int) -> tuple[int, int]:
    """(end of the axis, distance of its ticks) for counts of up to `most`."""
    step = nice_step(most / 3, whole=True)
    return math.ceil(most / step) * step, step


def labels(values: list[float], step: float) -> list[str]:
    """Ticks `step` apart as text, with as many decimals as distinguish neighbours."""
    if step < 0.0005:
        return [f"{value:.{max(0, _exponent(value) - _exponent(step))}e}" if value else "0" for value in values]
    decimals = max(0, -_exponent(step))
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "−") for value in (round(value, decimals) for value in values)]


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"


def _line_text(line: dict) -> str:
    (first, start), (last, end) = line["points"][0], line["points"][-1]
    name = f"{line['label']}: " if line["label"] else ""
    return f"{name}{start:.4g} at step {first:,}" + (f", {end:.4g} at step {last:,}" if last != first else "")

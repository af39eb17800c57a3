"""Plots of a run: training_curves and, of a sweep, its heat map, as .svg and .png."""

import itertools
import os
from pathlib import Path

from common.files import whole
from metrics.names import SCORES, score_named

# Of Okabe and Ito: distinct for colour-blind readers, and darkened until they can be read on white.
COLOURS = ("#0072b2", "#c8500a", "#00795a", "#a4487f")
DASHES = ("-", "--", ":", "-.")  # for readers who see no colour
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelcolor": "#575c65", "axes.edgecolor": "#a9adb5", "xtick.color": "#575c65",
    "ytick.color": "#575c65", "font.size": 10, "grid.color": "#dcdee3",
}  # fmt: skip


def training_panels(state) -> list[dict]:
    """What can be drawn of the run with this TrainerState, if it was logged: loss, learning rate, reward and
    validation scores, `[{"title", "best_step", "lines": [{"label", "points": [(step, value), ...]}]}]`. `best_step` is
    that of the checkpoint that was kept; None where none was chosen by its score."""
    panels_of = {
        "Loss": [("loss", "training"), ("eval_loss", "validation")],
        "Learning rate": [("learning_rate", None)],
        "Reward": [("reward", None)],
    } | {f"{score.label}, validation": [(f"eval_{score.name}", None)] for score in SCORES.values() if score.curve}
    panels = []
    for title, keys in panels_of.items():
        lines = [
            {"label": label, "points": [(row["step"], float(row[key])) for row in state.log_history if key in row]}
            for key, label in keys
        ]
        if lines := [line for line in lines if line["points"]]:
            panels.append({"title": title, "best_step": state.best_global_step, "lines": lines})
    return panels


def plot_curves(panels: list[dict], folder: Path) -> None:
    """training_curves.svg and .png of `training_panels`: all over the same range of steps."""
    if not panels:
        return
    pyplot = _pyplot()
    with pyplot.rc_context(STYLE | {"svg.hashsalt": "curves"}):
        rows = -(-len(panels) // 2)
        figure, axes = pyplot.subplots(rows, 2, figsize=(9, 3 * rows), layout="constrained", sharex=True, squeeze=False)
        for axis, panel in itertools.zip_longest(axes.flat, panels):
            if panel is None:
                axis.set_axis_off()
                continue
            for line, colour, dash in zip(panel["lines"], COLOURS, DASHES, strict=False):
                marker = (
                    {"marker": "o", "ms": 4 if len(line["points"]) <= 10 else 2} if len(line["points"]) <= 60 else {}
                )
                axis.plot(
                    *zip(*line["points"], strict=True), dash, color=colour, label=line["label"], clip_on=False, **marker
                )
            if panel["best_step"] is not None:
                axis.axvline(panel["best_step"], color="#1b1d21", lw=1, ls=(0, (2, 2)), label="checkpoint kept")
            axis.set(title=panel["title"], xlabel="step")
            axis.yaxis.set_major_formatter(
                "{x:g}"
            )  # matplotlib writes a factor of 1e-5 above the axis, in place of the title
            if all(value >= 0 for line in panel["lines"] for _, value in line["points"]):
                axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))
            axis.xaxis.set_tick_params(labelbottom=True)
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axis.grid(lw=0.6)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=9)
        _save(figure, folder, "training_curves")


def plot_sweep(sweep: dict, folder: Path) -> None:
    """sweep.svg and .png: the score against one key's values, or a heat map of two keys; of more keys, a heat map of the
    first two for each combination of the others."""
    pyplot = _pyplot()
    rows, metric = sweep["settings"], sweep["metric"]
    values = {key: list(dict.fromkeys(row["settings"][key] for row in rows)) for key in rows[0]["settings"]}
    score_of = {tuple(row["settings"].values()): row["scores"][metric] for row in rows}
    first, *others = values
    with pyplot.rc_context(STYLE | {"svg.hashsalt": "sweep"}):
        if not others:
            figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
            places = range(len(values[first]))
            axis.plot(places, [score_of[value,] for value in values[first]], marker="o", color=COLOURS[0])
            axis.set(xlabel=first, ylabel=score_named(metric).label, xticks=places, xticklabels=map(str, values[first]))
            axis.grid(lw=0.6)
        else:
            second, *facets = others
            panels = list(itertools.product(*(values[key] for key in facets)))
            size = 1.6 + 1.1 * len(values[second]), 1.2 + 0.7 * len(values[first])
            figure, axes = pyplot.subplots(
                len(panels), 1, figsize=(max(5, size[0]), size[1] * len(panels)), layout="constrained", squeeze=False
            )
            low, high = min(score_of.values()), max(score_of.values())
            for axis, panel in zip(axes.flat, panels, strict=True):
                table = [[score_of[(a, b, *panel)] for b in values[second]] for a in values[first]]
                image = axis.imshow(table, vmin=low, vmax=high, aspect="auto", cmap="cividis")
                for y, x in itertools.product(range(len(table)), range(len(table[0]))):
                    dark = table[y][x] < (low + high) / 2
                    axis.text(x, y, f"{table[y][x]:.3f}", ha="center", va="center", color="white" if dark else "black")
                axis.set_xticks(range(len(values[second])), map(str, values[second]))
                axis.set_yticks(range(len(values[first])), map(str, values[first]))
                title = ", ".join(f"{key} {value}" for key, value in zip(facets, panel, strict=True))
                axis.set(xlabel=second, ylabel=first, title=title)
            figure.colorbar(image, ax=axes, label=score_named(metric).label)
        _save(figure, folder, "sweep")


def _pyplot():
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here, is refused by the import
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, folder: Path, name: str) -> None:
    for suffix in ("svg", "png"):
        with whole(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    _pyplot().close(figure)

"""Plots of a run: training_curves and, of a sweep, its heat map, as .svg and .png."""

import itertools
from pathlib import Path


def plot_curves(log_history: list[dict], folder: Path) -> None:
    """Loss, learning rate, sacreBLEU and CIDEr against the step."""
    pyplot = _pyplot()
    panels = {
        "loss": [("loss", "training"), ("eval_loss", "validation")],
        "learning rate": [("learning_rate", None)],
        "sacreBLEU": [("eval_sacrebleu", None)],
        "CIDEr": [("eval_CIDEr", None)],
    }
    with pyplot.rc_context({"svg.hashsalt": "curves", "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
            for key, label in lines:
                points = [(row["step"], row[key]) for row in log_history if key in row]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, ms=3, label=label)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if any(label for _, label in lines):
                axis.legend(frameon=False)
        _save(figure, folder, "training_curves")


def plot_sweep(sweep: dict, folder: Path) -> None:
    """sweep.svg and .png: the score against one key's values, or a heat map of two keys; of more keys, a heat map of the
    first two for each combination of the others."""
    pyplot = _pyplot()
    rows, metric = sweep["settings"], sweep["metric"]
    values = {key: list(dict.fromkeys(row["settings"][key] for row in rows)) for key in rows[0]["settings"]}
    score_of = {tuple(row["settings"].values()): row["scores"][metric] for row in rows}
    first, *others = values
    with pyplot.rc_context({"svg.hashsalt": "sweep"}):
        if not others:
            figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
            places = range(len(values[first]))
            axis.plot(places, [score_of[value,] for value in values[first]], marker="o")
            axis.set(xlabel=first, ylabel=metric, xticks=places, xticklabels=map(str, values[first]))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3)
        else:
            second, *rest = others
            panels = list(itertools.product(*(values[key] for key in rest)))
            size = 1.6 + 1.1 * len(values[second]), 1.2 + 0.7 * len(values[first])
            figure, axes = pyplot.subplots(
                len(panels), 1, figsize=(max(5, size[0]), size[1] * len(panels)), layout="constrained", squeeze=False
            )
            low, high = min(score_of.values()), max(score_of.values())
            for axis, panel in zip(axes.flat, panels, strict=True):
                table = [[score_of[(a, b, *panel)] for b in values[second]] for a in values[first]]
                image = axis.imshow(table, vmin=low, vmax=high, aspect="auto", cmap="viridis")
                for y, x in itertools.product(range(len(table)), range(len(table[0]))):
                    dark = table[y][x] < (low + high) / 2
                    axis.text(x, y, f"{table[y][x]:.3f}", ha="center", va="center", color="white" if dark else "black")
                axis.set_xticks(range(len(values[second])), map(str, values[second]))
                axis.set_yticks(range(len(values[first])), map(str, values[first]))
                title = ", ".join(f"{key} {value}" for key, value in zip(rest, panel, strict=True))
                axis.set(xlabel=second, ylabel=first, title=title)
            figure.colorbar(image, ax=axes, label=metric)
        _save(figure, folder, "sweep")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, folder: Path, name: str) -> None:
    for suffix in ("svg", "png"):
        temporary = folder / f".{name}.{suffix}"
        figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        temporary.replace(folder / f"{name}.{suffix}")
    _pyplot().close(figure)

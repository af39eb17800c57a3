"""training_curves.svg and .png, drawn from the Trainer's log."""

from pathlib import Path


def plot_curves(log_history: list[dict], folder: Path) -> None:
    """Loss, learning rate, sacreBLEU and CIDEr against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "loss": [("loss", "training"), ("eval_loss", "validation")],
        "learning rate": [("learning_rate", None)],
        "sacreBLEU": [("eval_sacrebleu", None)],
        "CIDEr": [("eval_CIDEr", None)],
    }
    with matplotlib.rc_context({"svg.hashsalt": "curves", "axes.spines.top": False, "axes.spines.right": False}):
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
        for suffix in ("svg", "png"):
            temporary = folder / f".training_curves.{suffix}"
            figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            temporary.replace(folder / f"training_curves.{suffix}")
        pyplot.close(figure)

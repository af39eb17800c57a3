"""docs/overview.png: a drawn scene, its caption, where the model looks for each word, and the scores of results/quickstart.json.
The scene is the first of the test split whose caption is entirely true and complete.

python -m benchmarks.quality.picture runs/quickstart        (an output folder of train.py)
"""

import argparse
import json
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness import RESULTS, ROOT
from captioner import Captioner
from data import open_image
from drawn_scenes import drawing as scenes
from drawn_scenes.facts import scene_facts
from metrics.names import score_named
from reports.attention_maps import attention_maps, overlay

NAMES = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "sacrebleu")
COLUMNS, PIXELS = 8, 288  # maps per row, and the size of the image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a training run")
    args = parser.parse_args()

    captioner = Captioner.from_pretrained(args.model)
    for row in scenes.load(train=0, validation=0, test=100)["test"]:
        value, (caption,) = row["image"], captioner([row["image"]])
        true, facts = scene_facts(caption, json.loads(row["facts"]))
        if true.total() == facts.total():
            break
    words, maps = attention_maps(captioner, value, caption)
    picture = open_image(value).resize((PIXELS, PIXELS))
    metrics = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))["test"]

    rows = -(-len(words) // COLUMNS)
    figure = Figure(figsize=(11, 3.1 + 1.45 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.1, 1.45 * rows))
    left, right = top.subplots(1, 2, width_ratios=(1, 2.4))
    left.imshow(picture)
    right.text(0, 0.97, caption[0].upper() + caption[1:], fontsize=17, va="top", wrap=True)
    table = [[score_named(name).label, f"{metrics[name]:.3f}", "{:.3f} to {:.3f}".format(*metrics["intervals"][name])] for name in NAMES
             if metrics.get(name) is not None]  # fmt: skip
    table += [[score_named("scene_facts").label, f"{metrics['scene_facts']['scene_facts']:.3f}", ""]]
    cells = right.table(table, colLabels=["score", f"{metrics['counts']['images']} images", "95 % interval"],
                        loc="lower left", cellLoc="left", colLoc="left", edges="horizontal", bbox=(0, 0, 0.85, 0.6))  # fmt: skip
    cells.auto_set_font_size(False)
    cells.set_fontsize(11)
    for cell in cells.get_celld().values():
        cell.set_edgecolor("lightgray")
    for axis, word, heat in zip(bottom.subplots(rows, COLUMNS, squeeze=False).flat, words, maps, strict=False):
        axis.imshow(overlay(picture, heat))
        axis.set_title(word, fontsize=11)
    for axis in (*top.axes, *bottom.axes):
        axis.set_axis_off()
    with tempfile.NamedTemporaryFile(dir=ROOT / "docs", suffix=".png", delete=False) as file:
        figure.savefig(file, dpi=100, facecolor="white")
    Image.open(file.name).convert("RGB").quantize(256).save(file.name, optimize=True)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(ROOT / "docs/overview.png")
    print(caption)


if __name__ == "__main__":
    main()

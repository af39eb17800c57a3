"""A sheet of the small photo model's captions and their errors: PNG with the photographs, Markdown without them.

    python -m benchmarks.quality.photos runs/photos --photos /path/to/flickr8k/Flicker8k_Dataset --output /tmp/sheet.png

`runs/photos` is the output of recipes/photos/small.yaml. The captions are spaced evenly by CIDEr rank, from worst to best.
What counts as wrong: a content word that no reference has, and a colour or a count that all of them contradict.
The photographs may not be redistributed, so the PNG is not part of the repo.
"""

import argparse
import json
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure

from data import open_image
from metrics.coco_caption.text_checks import contradictions, words
from reports.plots import COLOURS

# Words that say nothing about a photograph's content.
EMPTY = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "of",
        "in",
        "on",
        "at",
        "with",
        "and",
        "to",
        "by",
        "his",
        "her",
        "their",
        "its",
        "it",
        "while",
        "through",
        "near",
        "into",
        "over",
    ]
)


def wrong(caption: str, references: list[str]) -> list[str]:
    """What `caption` says and no reference does, each once, in order."""
    said = {word for reference in references for word in words(reference)}
    found = [word for word in words(caption) if word not in said and word not in EMPTY]
    found += [word for kind, _ in contradictions(caption, references).values() for word in kind]
    return list(dict.fromkeys(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--number", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("photos.png"))
    args = parser.parse_args()

    rows = [json.loads(line) for line in (args.run / "per_image.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = Counter(row["caption"] for row in rows)
    bad = sum(bool(wrong(row["caption"], row["references"])) for row in rows)
    print(
        f"{len(counts)} different captions for {len(rows)} images. For {bad} images they have a word that no reference has.\n"
    )
    for caption, images in counts.most_common(5):
        print(f"- {images} times: {caption}")
    rows.sort(key=lambda row: row["scores"]["CIDEr"])
    last, number = len(rows) - 1, min(args.number, len(rows))
    chosen = [rows[round(place * last / max(1, number - 1))] for place in range(number)]
    print("\n| image | CIDEr | caption | what no reference says | first reference |\n|---|---|---|---|---|")
    for row in chosen:
        said = ", ".join(wrong(row["caption"], row["references"])) or "nothing"
        cells = (row["image_id"], f"{row['scores']['CIDEr']:.2f}", row["caption"], said, row["references"][0])
        print("| " + " | ".join(cells) + " |")

    figure = Figure(figsize=(12, 3.6 * -(-number // 4)), layout="constrained")
    for axis, row in zip(figure.subplots(-(-number // 4), 4, squeeze=False).flat, chosen, strict=False):
        name = row["image_id"] if Path(row["image_id"]).suffix else row["image_id"] + ".jpg"
        picture = open_image(args.photos / name)
        room = min(1, 1.1 * picture.width / picture.height)  # a tall image is narrower on the sheet
        axis.imshow(picture)
        said = ", ".join(wrong(row["caption"], row["references"]))
        axis.set_title(textwrap.fill(row["caption"], round(30 * room)), fontsize=11, loc="left")
        axis.set_xlabel(
            textwrap.fill(f"no reference says: {said}" if said else "every word is in a reference", round(34 * room)),
            fontsize=10, loc="left", color=COLOURS[1] if said else COLOURS[2],
        )  # fmt: skip
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.output, dpi=90, facecolor="white")
    print(f"\nWritten to {args.output}")


if __name__ == "__main__":
    main()

"""A contact sheet of augmented images: the effect of each operation and of whole recipes, twice each.

python -m benchmarks.quality.augmentation                                    docs/augmentation.png, from three drawn scenes
python -m benchmarks.quality.augmentation PHOTO ... --output sheet.png
python -m benchmarks.quality.augmentation PHOTO --augment "rotation:30 jpeg:5" "flip"       one column each
"""

import argparse
import os
from pathlib import Path

from PIL import Image, ImageDraw

import data
from benchmarks.harness import ROOT
from drawn_scenes import drawing as scenes

TILE, LINE, GAP = 136, 13, 4  # pixels
COLUMNS = (
    "random_resized_crop:0.5:1.0",
    "flip",
    "rotation:10",
    "color_jitter:0.2:0.2:0.2",
    "grayscale:0.5",
    "randaugment:2:5",
    "gaussian_noise:25",
    "blur:2",
    "jpeg:10",
    "random_resized_crop:0.5:1.0 flip randaugment:2:5",  # BLIP's
    "random_resized_crop:0.8:1.0 flip rotation:10 color_jitter:0.2:0.2:0.2 grayscale:0.1",  # the progressive system's
)


def sheet(images: list[Image.Image], columns: list[str]) -> Image.Image:
    """Two rows per image, for two epochs, as a model with TILE x TILE pixel input would see them; the first column is
    the original image."""
    step, top = TILE + GAP, LINE * max(len(spec.split()) for spec in columns) + 2 * GAP
    result = Image.new("RGB", (step * (len(columns) + 1) + GAP, top + 2 * step * len(images)), "white")
    draw = ImageDraw.Draw(result)
    for column, spec in enumerate(["", *columns]):
        left = GAP + column * step
        draw.text((left, GAP), "\n".join(spec.split()) or "the picture", fill="black", font_size=9.5)
        augmentation = data.Augmentation(spec.split(), (TILE, TILE))
        for row in range(2 * len(images)):
            picture = augmentation(images[row // 2], row % 2, f"image{row // 2}")
            result.paste(picture, (left, top + row * step))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", help="image files; default: three of the quickstart's scenes")
    parser.add_argument(
        "--augment", nargs="+", default=COLUMNS, help="one column each: operations as in train.py's --augment"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "augmentation.png")
    arguments = parser.parse_args()
    drawn = [] if arguments.photos else scenes.load(train=0, validation=0, test=3)["test"]["image"]
    images = [data.open_image(photo) for photo in arguments.photos or drawn]
    temporary = arguments.output.with_name(f".{arguments.output.name}")
    colours = sheet(images, arguments.augment).quantize(64)  # a quarter of the bytes
    colours.save(temporary, "PNG", optimize=True)
    os.replace(temporary, arguments.output)
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()

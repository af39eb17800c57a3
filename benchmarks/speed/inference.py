"""infer.py end to end on 2,000 JPEG files, compared with a loop of transformers' processor and `generate`, same batch size.

    python -m benchmarks.speed.inference --data FOLDER        (the folder that CAPTION_TEST_DATA names)

Each runs as its own process, timed from start until the last caption is written, on the same model folder, files, batch
size, settings and precision of the weights; they take turns. The files are the Flickr8k photos at their published 500 pixels, mirrored and cropped
until there are enough. The captions of every turn must be the same, otherwise there is no result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps

import data
from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment
from models.loading import build_model

CONFIG = {
    "vision_config": {
        "image_size": 384, "patch_size": 24, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "initializer_range": 0.02,
    },
    "text_config": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.1,
    },
}  # fmt: skip


def write_images(photos: Path, folder: Path, count: int) -> None:
    """On each pass over the photos the crop is narrower, and every other pass is mirrored."""
    paths = sorted(photos.glob("*.jpg"))
    for number in range(count):
        turn, index = divmod(number, len(paths))
        image = data.open_image(paths[index])
        image = ImageOps.crop(ImageOps.mirror(image) if turn % 2 else image, border=3 * turn)
        scale = 500 / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:06}.jpg", quality=90)


def save_model(folder: Path, captions: list[str]) -> None:
    """A small captioner with random weights, spread enough that float32 rounding does not decide a caption."""
    config = folder / "shape.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    torch.manual_seed(0)
    model, processor = build_model(str(config), None, captions)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def peer(
    model_folder: str, images: str, output: str, dtype: str, batch_size: int, num_beams: int, max_new_tokens: int
) -> None:
    """The loop of transformers' own documentation, in batches."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model_folder)
    model = BlipForConditionalGeneration.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    paths = sorted(Path(images).iterdir())
    with open(output, "w", encoding="utf-8") as file, torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            pictures = [Image.open(path).convert("RGB") for path in batch]
            pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.dtype)
            tokens = model.generate(
                pixel_values=pixel_values, num_beams=num_beams, max_new_tokens=max_new_tokens, early_stopping=True
            )
            for path, caption in zip(batch, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                file.write(json.dumps({"image": str(path), "caption": " ".join(caption.split())}) + "\n")


def turn(side: str, folder: Path, arguments) -> tuple[float, list[dict]]:
    """Seconds from start to end of one side's process, and its rows."""
    output = Path(tempfile.mkdtemp(dir=folder)) / f"{side}.jsonl"  # a fresh folder: infer.py resumes an existing output
    settings = [arguments.batch_size, arguments.num_beams, arguments.max_new_tokens]
    if side == "ours":
        names = ("--per_device_eval_batch_size", "--num_beams", "--max_new_tokens")
        command = [ROOT / "infer.py", folder / "images", "--model_name_or_path", folder / "model", "--output", output]
        command += [word for pair in zip(names, settings, strict=True) for word in pair]
        command += ["--device", "cpu", "--bf16", arguments.dtype == "bfloat16"]
    else:
        command = [
            "-m",
            __spec__.name,
            "--peer",
            folder / "model",
            folder / "images",
            output,
            arguments.dtype,
            *settings,
        ]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return elapsed, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("CAPTION_TEST_DATA"), help="folder that holds flickr8k")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides' weights")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--output", type=Path, default=RESULTS / "inference.json")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give the folder of test data: --data, or CAPTION_TEST_DATA")

    seconds = {"peer": [], "ours": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        (folder / "model").mkdir()
        write_images(Path(arguments.data) / "flickr8k/Flicker8k_Dataset", folder / "images", arguments.images)
        records = data.load(Path(arguments.data) / "flickr8k", splits=("train",))["train"]
        save_model(folder / "model", [caption for group in records["captions"] for caption in group])
        for repeat in range(arguments.repeats):
            rows = {}
            for side, values in seconds.items():
                elapsed, rows[side] = turn(side, folder, arguments)
                values.append(elapsed)
            differ = sum(a != b for a, b in zip(rows["peer"], rows["ours"], strict=True))
            if differ > arguments.images / 500:  # beams that tie up to float rounding may swap places
                raise SystemExit(f"{differ} of {arguments.images} captions differ. No result.")
            print(f"turn {repeat + 1}: peer {seconds['peer'][-1]:.1f} s, ours {seconds['ours'][-1]:.1f} s", flush=True)
    distinct = len({row["caption"] for row in rows["ours"]})
    result = {
        "measure": "seconds of the whole process",
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "data")},
        "model": CONFIG,
        **{
            side: {"median_s": statistics.median(v), "min_s": min(v), "max_s": max(v), "all_s": v}
            for side, v in seconds.items()
        },
        "ratio": statistics.median(seconds["peer"]) / statistics.median(seconds["ours"]),
        "distinct_captions": distinct,
        "captions_that_differ": differ,
        "load_average": os.getloadavg()[0],
        **environment(),
    }
    write_json(arguments.output, result)
    print(f"{result['ratio']:.2f} times; {distinct} distinct captions; written to {arguments.output}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:6], *map(int, sys.argv[6:9]))
    else:
        main()

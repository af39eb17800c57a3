"""Token ids of ONNX graphs beside those of the model that they were made from: photographs, families, greedy and beam search.

    python -m benchmarks.quality.onnx_photos /path/to/flickr8k/Flicker8k_Dataset [--number 100]

Tiny models of the real classes with random weights (tests/helpers/families.py), 20 tokens a caption, in batches of 1 and 8. Weights
are made larger so that captions differ from picture to picture: how many different ones there are is part of the result. The sizes of
folders, seconds to load and peak memory are those of BLIP-base's shape, each side in a process of its own.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, ROOT, blip_base, write_result
from captioner import Captioner
from models.blip_attention import use_fast_attention
from models.loading import ready
from models.onnx_export import write_graphs
from models.onnx_model import OnnxModel

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
import families  # noqa: E402

FAMILIES = ("blip", "git", "blip2-opt", "vit-gpt2")
LARGER = 5  # weights: with those of a fresh model most photographs get one caption
KINDS = ("torch", "ONNX, float32", "ONNX, int8")


def equality(name: str, photos: list[Path]) -> dict:
    """{"greedy": {"images", "equal", "different"}, "5 beams": ...}: images, those with equal ids in both batch sizes, different captions."""
    torch.manual_seed(0)
    model, processor = families.build(name)
    for parameter in model.parameters():
        parameter.data *= LARGER if parameter.dim() > 1 else 1
    model = ready(model.eval(), processor)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(model, Path(folder))
        graphs = OnnxModel(model.config, Path(folder))
    for search, beams in (("greedy", 1), ("5 beams", 5)):
        equal, texts = [], set()
        for size in (1, 8):
            theirs, ours = (Captioner(m, processor, num_beams=beams, max_new_tokens=20) for m in (model, graphs))
            for first in range(0, len(photos), size):
                batch = theirs.collator([{"image": str(p), "image_id": p.name} for p in photos[first : first + size]])
                expected, tokens = theirs.generate_tokens(dict(batch)), ours.generate_tokens(dict(batch))
                equal += [torch.equal(a, b) for a, b in zip(expected, tokens, strict=True)]
                texts |= {tuple(row) for row in tokens.tolist()}
        whole = len(photos)
        both = [a and b for a, b in zip(equal[:whole], equal[whole:], strict=True)]
        result[search] = {"images": whole, "equal": sum(both), "different": len(texts)}
    return result


def loaded(folder: str) -> None:
    """In a process of its own: seconds to load, and peak memory in MiB, of what `folder` holds, after one caption's encoding."""
    before, began = high_water(), time.perf_counter()
    if list(Path(folder).glob("*.onnx")):
        model = OnnxModel(blip_base().config, Path(folder))
        model.read(torch.zeros(1, 3, 384, 384))
    else:
        from transformers import BlipForConditionalGeneration

        model = BlipForConditionalGeneration.from_pretrained(folder).eval()
        with torch.inference_mode():
            model.vision_model(torch.zeros(1, 3, 384, 384))
    print(json.dumps({"seconds": time.perf_counter() - began, "MiB": (high_water() - before) / 1024}))


def high_water() -> int:
    """Peak memory of this process in KiB; getrusage counts that of the process which started it, too."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def sizes() -> dict:
    """{kind: {"folder_MB", "seconds" to load and encode one picture, "MiB" more at the peak}}."""
    result = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            model = use_fast_attention(blip_base().eval())
            model.save_pretrained(folder) if kind == "torch" else write_graphs(model, Path(folder), "int8" in kind)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            command = [sys.executable, "-m", "benchmarks.quality.onnx_photos", "--loaded", folder]
            answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            result[kind] = {"folder_MB": size / 1e6, **json.loads(answer.splitlines()[-1])}
        print(kind, result[kind], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?", help="folder of photographs")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--loaded", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "onnx_photos.json")
    arguments = parser.parse_args()
    if arguments.loaded:
        return loaded(arguments.loaded)
    photos = sorted(arguments.photos.glob("*.jpg"))[: arguments.number]
    result = {"families": {name: equality(name, photos) for name in FAMILIES}}
    print(result, flush=True)
    write_result(arguments.output, result | {"BLIP-base": sizes()})


if __name__ == "__main__":
    main()

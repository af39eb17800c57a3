"""Peak memory of fine-tuning BLIP-base at 384 px, with the README's settings: what fits on which GPU.

    python -m benchmarks.speed.memory                    # CPU, float32: about a GPU's need in float32, without its context
    python -m benchmarks.speed.memory --device cuda

Each setting runs two steps of benchmarks/speed/training_step.py in its own process, with captions padded to 40 tokens,
the longest that `max_txt_len` allows. "peer" is transformers' eager model with one caption per row.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.harness import RESULTS, write_result

SETTINGS = {
    "the defaults: 8 images, checkpointing": ("ours", 8, 1, True, False),
    "the same, plain": ("peer", 8, 1, True, False),
    "8 images of 5 captions, checkpointing": ("ours", 8, 5, True, False),
    "8 images, no checkpointing": ("ours", 8, 1, False, False),
    "2 images, checkpointing": ("ours", 2, 1, True, False),
    "8 images, vision encoder frozen": ("ours", 8, 1, False, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    found = {}
    for name, (side, images, captions, checkpointing, frozen) in SETTINGS.items():
        command = [sys.executable, "-m", "benchmarks.speed.training_step", "--memory_of", side, "--pad_to", 40]
        command += ["--images", images, "--captions_per_image", captions, "--device", arguments.device]
        command += ["--gradient_checkpointing"] * checkpointing + ["--frozen"] * frozen
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found[name]['peak_mib']:.0f} MiB", flush=True)
    write_result(RESULTS / f"memory_{arguments.device}.json", {"settings": found})


if __name__ == "__main__":
    main()

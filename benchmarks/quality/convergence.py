"""One caption per image in a batch compared with five: validation loss and CIDEr at equal numbers of pairs seen.

    python -m benchmarks.quality.convergence --data FOLDER      (the folder that CAPTION_TEST_DATA names)

Trains recipes/photos/model.json with and without `captions_per_image: 5`. A step has the same number of pairs in both
(batch 80 of 1, batch 16 of 5), and epochs, schedule and evaluations are the same: the only difference is that 80 pairs
show 80 images or 16. No augmentation, so that both see the same pixels. The curves go to docs/convergence.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

PAIRS = 80  # per step


def train(folder: Path, data: Path, captions_per_image: int, seed: int, arguments) -> dict:
    """The log of one run: epoch, validation loss and CIDEr at each evaluation; steps and seconds in all."""
    output = folder / f"{captions_per_image}-{seed}"
    flags = {
        "model_config": ROOT / "recipes/photos/model.json",
        "tokenizer_vocab": data / "bert-base-uncased/vocab.txt",
        "dataset_name": data / "flickr8k",
        "output_dir": output,
        "captions_per_image": captions_per_image,
        "per_device_train_batch_size": PAIRS // captions_per_image,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "weight_decay": 0.05,
        "max_txt_len": 30,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": "false",
        "num_beams": 1,
        "max_new_tokens": 20,
        "meteor": "false",
        "spice": "false",
        "bootstrap_samples": 0,
        "seed": seed,
    }
    if arguments.max_train_samples:
        flags["max_train_samples"] = arguments.max_train_samples
    command = [sys.executable, ROOT / "train.py", *(word for k, v in flags.items() for word in (f"--{k}", v))]
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rows = [row for row in history if "eval_loss" in row]
    last = max(row["step"] for row in rows)
    steps_an_epoch = last / arguments.epochs
    return {
        "epoch": [row["step"] / steps_an_epoch for row in rows],
        "eval_loss": [row["eval_loss"] for row in rows],
        "eval_CIDEr": [row["eval_CIDEr"] for row in rows],
        "steps": last,
        "seconds": time.perf_counter() - start,
    }


def plot(runs: dict[str, list[dict]], pairs_an_epoch: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    for axis, name in zip(axes, ("eval_loss", "eval_CIDEr"), strict=True):
        for (captions, of_seeds), colour in zip(runs.items(), ("#1f77b4", "#d62728"), strict=True):
            for number, run in enumerate(of_seeds):
                label = f"captions_per_image {captions}" if number == 0 else None
                axis.plot([e * pairs_an_epoch for e in run["epoch"]], run[name], color=colour, label=label, linewidth=1)
        axis.set(xlabel="pairs seen", ylabel=name.replace("eval_", "validation "))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("CAPTION_TEST_DATA"), help="folder with flickr8k and the vocab"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--max_train_samples", type=int, help="fewer images, for a quick look")
    parser.add_argument("--output", type=Path, default=RESULTS / "convergence.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/convergence.png")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give the folder of test data: --data, or CAPTION_TEST_DATA")
    runs = {"1": [], "5": []}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in arguments.seeds:
            for captions in runs:
                run = train(Path(temporary), Path(arguments.data), int(captions), seed, arguments)
                runs[captions].append(run)
                print(
                    f"seed {seed}, {captions} captions per image: {run['steps']} steps, {run['seconds']:.0f} s, "
                    f"validation loss {run['eval_loss'][-1]:.4f}, CIDEr {run['eval_CIDEr'][-1]:.4f}",
                    flush=True,
                )
    # With one caption per image, every step except an epoch's last has PAIRS pairs.
    pairs_an_epoch = round(runs["1"][0]["steps"] / arguments.epochs * PAIRS)
    plot(runs, pairs_an_epoch, arguments.plot)
    write_json(
        arguments.output,
        {
            "what": "validation loss and CIDEr at equal pairs seen, captions_per_image 1 and 5",
            "pairs_a_step": PAIRS,
            "pairs_an_epoch_at_most": pairs_an_epoch,
            "settings": {
                "epochs": arguments.epochs,
                "learning_rate": arguments.learning_rate,
                "seeds": arguments.seeds,
            },
            "captions_per_image": runs,
            **environment(),
        },
    )
    print(f"written to {arguments.output} and {arguments.plot}")


if __name__ == "__main__":
    main()

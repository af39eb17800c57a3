"""The cost of more images and more processes.

    python -m benchmarks.speed.scaling

1. infer.py and evaluate.py on 1,000, 10,000 and 100,000 small images with a tiny model: wall-clock time, and the peak
   memory of the largest process, which must not grow with the images. Plotted to docs/scaling.png.
2. train.py in two processes (torchrun) compared with one with the doubled batch, one thread per process: the same loss
   curve, and the parallel efficiency.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment
from models.loading import build_model

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "vision_config": {**SHAPE, "image_size": 32, "patch_size": 16, "initializer_range": 0.02},
    "text_config": {**SHAPE, "max_position_embeddings": 64},
}
WORDS = ["a", "the", "red", "green", "blue", "dog", "cat", "ball", "runs", "sits", "on", "near", "grass", "water", "."]


def save_model(folder: Path) -> Path:
    config, vocabulary = folder / "shape.json", folder / "vocab.txt"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    torch.manual_seed(0)
    model, processor = build_model(str(config), str(vocabulary), [])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def write_images(folder: Path, count: int, splits=("test",), captions: int = 1) -> Path:
    """A JSONL data set of 32-pixel JPEGs, all different."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as lines:
        for number in range(count):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            name = f"{number:06}.jpg"
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / name, quality=95)
            texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(captions)]
            split = splits[number % len(splits)]
            lines.write(json.dumps({"image": name, "captions": texts, "split": split}) + "\n")
    return folder


def measured(command: list, **environment_variables) -> dict:
    """Seconds of a command, and the peak resident memory of its largest process (MiB)."""
    command = [sys.executable, *map(str, command)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment_variables}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        peak = 0

        def watch():
            nonlocal peak
            while process.poll() is None:
                try:
                    for one in [family := psutil.Process(process.pid), *family.children(recursive=True)]:
                        peak = max(peak, one.memory_info().rss)
                except psutil.Error:
                    pass
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        watcher.join()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    return {"seconds": time.perf_counter() - start, "peak_mib": peak / 2**20}


def cost_of_images(folder: Path, counts: list[int]) -> dict:
    model = save_model(folder)
    settings = ["--model_name_or_path", model, "--num_beams", 1, "--max_new_tokens", 4]
    settings += ["--per_device_eval_batch_size", 64]
    results = {"infer.py": {}, "evaluate.py": {}}
    for count in counts:
        images = write_images(folder / f"images-{count}", count)
        output = folder / f"{count}.jsonl"
        results["infer.py"][count] = measured([ROOT / "infer.py", images, *settings, "--output", output])
        if len(output.read_text(encoding="utf-8").splitlines()) != count:
            raise SystemExit("infer.py lost images. No result.")
        where = folder / f"scores-{count}"
        flags = [
            "--dataset_name",
            images / "data.jsonl",
            "--output_dir",
            where,
            "--meteor",
            "false",
            "--spice",
            "false",
        ]
        cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
        results["evaluate.py"][count] = measured([ROOT / "evaluate.py", *settings, *flags], **cache)
        if json.loads((where / "coco_metrics.json").read_text(encoding="utf-8"))["counts"]["images"] != count:
            raise SystemExit("evaluate.py lost images. No result.")
        for name, row in results.items():
            print(
                f"{name}, {count} images: {row[count]['seconds']:.1f} s, {row[count]['peak_mib']:.0f} MiB", flush=True
            )
    for row in results.values():
        small, large = min(counts), max(counts)
        row["microseconds_an_image_more"] = (
            (row[large]["seconds"] - row[small]["seconds"]) / (large - small) * 1e6 if large > small else None
        )
        row["kib_an_image_more"] = (
            (row[large]["peak_mib"] - row[small]["peak_mib"]) / (large - small) * 1024 if large > small else None
        )
    return results


def cost_of_processes(folder: Path, images: int, repeats: int) -> dict:
    """train.py on 112-pixel images in one process (batch 32) and in two (batch 16 each), in turns."""
    data = write_images(folder / "training", images, ("train",) * 8 + ("validation", "test"), captions=5) / "data.jsonl"
    runs = {"one": [], "two": []}
    for repeat in range(repeats):
        for name, processes in (("one", 1), ("two", 2)):
            output = folder / f"{name}-{repeat}"
            flags = {
                "model_config": ROOT / "recipes/photos/model.json", "tokenizer_vocab": folder / "vocab.txt",
                "dataset_name": data, "output_dir": output, "captions_per_image": 5, "num_train_epochs": 1,
                "per_device_train_batch_size": 32 // processes, "gradient_accumulation_steps": 1,
                "gradient_checkpointing": "false", "logging_steps": 1, "learning_rate": 5e-4, "eval_strategy": "no",
                "save_strategy": "no", "max_test_samples": 1, "meteor": "false", "spice": "false",
                "bootstrap_samples": 0, "num_beams": 1, "max_eval_samples": 1,
            }  # fmt: skip
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
            command = [*launch, ROOT / "train.py", *(word for k, v in flags.items() for word in (f"--{k}", v))]
            measured(command, OMP_NUM_THREADS="1")
            log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            seconds = json.loads((output / "train_results.json").read_text(encoding="utf-8"))["train_runtime"]
            runs[name].append({"train_seconds": seconds, "losses": [row["loss"] for row in log if "loss" in row]})
    one, two = ([run["train_seconds"] for run in runs[name]] for name in ("one", "two"))
    difference = max(
        abs(a - b) / a
        for first, second in zip(runs["one"], runs["two"], strict=True)
        for a, b in zip(first["losses"], second["losses"], strict=True)
    )
    if difference > 1e-3:
        raise SystemExit(f"The losses of one and two processes differ by {difference:.1e} of their size. No result.")
    efficiency = float(np.median(one) / np.median(two) / 2)
    print(
        f"two processes: {efficiency:.2f} of twice one's speed; largest relative difference of losses {difference:.1e}"
    )
    return {
        "one_process_s": one,
        "two_processes_s": two,
        "efficiency": efficiency,
        "largest_relative_loss_difference": difference,
        "losses": {name: of[0]["losses"] for name, of in runs.items()},
    }


def plot(results: dict, counts: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    for name, row in results.items():
        axes[0].loglog(counts, [row[count]["seconds"] for count in counts], marker="o", label=name)
        axes[1].semilogx(counts, [row[count]["peak_mib"] for count in counts], marker="o", label=name)
    axes[0].set(xlabel="images", ylabel="seconds, start to end")
    axes[1].set(xlabel="images", ylabel="peak memory, MiB")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--training_images", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=3, help="turns of training in one and in two processes")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/scaling.png")
    arguments = parser.parse_args()
    if arguments.training_images % 40:
        # accelerate fills up an epoch's last batches with samples from its beginning, more of them with two processes.
        parser.error("--training_images must be a multiple of 40, so that the last batch of 32 is full")
    with tempfile.TemporaryDirectory() as temporary:
        results = cost_of_images(Path(temporary), arguments.images)
        processes = cost_of_processes(Path(temporary), arguments.training_images, arguments.repeats)
    plot(results, arguments.images, arguments.plot)
    load = {"load_average": os.getloadavg()[0]}
    write_json(arguments.output, {"images": results, "processes": processes, **load, **environment()})
    print(f"written to {arguments.output} and {arguments.plot}")


if __name__ == "__main__":
    main()

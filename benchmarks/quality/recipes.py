"""Run the recipes that need no GPU, and record their results.

    CAPTION_TEST_DATA=... python -m benchmarks.quality.recipes [quickstart] [shuffled] [photos]

quickstart   `make quickstart`, timed after the install
shuffled     the same recipe, each image with another image's captions: what a model scores without looking
photos       recipes/photos/small.yaml on the Flickr8k photographs of the test data, then evaluate.py and infer.py
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

SCORES = ("Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "sacrebleu", "scene_facts", "intervals", "corpus", "counts")


def run(*command) -> float:
    """Run a command; return its seconds. Its output goes to the terminal."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    return time.perf_counter() - start


def record(name: str, folder: Path, **more) -> None:
    """benchmarks/results/NAME.json: test scores, the validation curve, and `more`."""
    scores = json.loads((folder / "coco_metrics.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    keys = ("step", "eval_loss", "eval_sacrebleu", "eval_CIDEr")
    validation = [{key: row[key] for key in keys} for row in history if "eval_loss" in row]
    training = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    result = {
        "test": {key: scores[key] for key in SCORES if key in scores},
        "validation_during_training": validation,
        "training_seconds": training["train_runtime"],
        "peak_memory_gib": training["train_peak_host_memory_gib"],
        "captions": json.loads((folder / "run.json").read_text(encoding="utf-8"))["examples"],
        "dataset_fingerprint": scores["dataset_fingerprint"],
        **more,
        "run_command": scores["command"],
        **environment(),
    }
    write_json(RESULTS / f"{name}.json", result)
    print(name, json.dumps({"facts": scores.get("scene_facts"), "CIDEr": scores["CIDEr"], "seconds": more}, indent=2))


def quickstart(folder: Path) -> None:
    seconds = run("make", "quickstart", f"OUT={folder}")
    record("quickstart", folder, seconds_after_install=seconds)


def shuffled(folder: Path) -> None:
    recipe = ("recipes/quickstart/scenes.yaml", "--dataset_config_name", "shuffled", "--output_dir", folder)
    record("quickstart_shuffled", folder, seconds=run(sys.executable, "train.py", *recipe))


def photos(folder: Path) -> None:
    data = Path(os.environ["CAPTION_TEST_DATA"])
    vocabulary = data / "bert-base-uncased/vocab.txt"
    seconds = run(
        sys.executable, "train.py", "recipes/photos/small.yaml", "--dataset_name", data / "flickr8k",
        "--tokenizer_vocab", vocabulary, "--output_dir", folder,
    )  # fmt: skip
    again = ("--model_name_or_path", folder, "--dataset_name", data / "flickr8k", "--output_dir", folder / "again")
    run(sys.executable, "evaluate.py", *again)
    trained, rescored = (
        json.loads((f / "coco_metrics.json").read_text(encoding="utf-8")) for f in (folder, folder / "again")
    )
    assert trained["CIDEr"] == rescored["CIDEr"], "evaluate.py must give train.py's scores"
    captions = folder / "captions.jsonl"
    captions.unlink(missing_ok=True)
    run(
        sys.executable, "infer.py", data / "flickr8k/Flicker8k_Dataset", "--model_name_or_path", folder,
        "--output", captions,
    )  # fmt: skip
    record("photos", folder, seconds=seconds, inferred=len(captions.read_text(encoding="utf-8").splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"quickstart": quickstart, "shuffled": shuffled, "photos": photos}
    parser.add_argument("what", nargs="*", default=list(choices), help="default: all")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark", help="folder for the trained models")
    arguments = parser.parse_args()
    for name in arguments.what:
        shutil.rmtree(arguments.runs / name, ignore_errors=True)  # an existing run would be resumed
        choices[name](arguments.runs.resolve() / name)


if __name__ == "__main__":
    main()

"""The three stages of progressive training with small models, over several seeds: what each stage gains.

    python -m benchmarks.quality.progressive scenes                                # the quickstart's scenes; needs nothing else
    CAPTION_TEST_DATA=... python -m benchmarks.quality.progressive photos          # Flickr8k photographs of the test data

1 cross-entropy   recipes/quickstart/scenes.yaml, recipes/photos/small.yaml
1 continued       a control, on the scenes: as many extra steps of cross-entropy as stage 2 has, without augmentation
2 augmented       recipes/progressive/*_2_augment.yaml, from 1
3 scst            recipes/progressive/*_3_scst.yaml, from 2

For the photos, only the last stage is run with every seed, as the first takes most of the time. Each run calls train.py with
its own folder under --runs; finished runs are not repeated. Each run keeps its best model by validation CIDEr. The
result has every seed's scores, and means and standard deviations over seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

SCORES = ("CIDEr", "Bleu_4", "ROUGE_L", "sacrebleu")
LOGGED = (
    "step",
    "eval_loss",
    "eval_CIDEr",
    "reward",
    "advantage",
    "sample_length",
    "bad_endings",
    "entropy",
    "ce_loss",
)
CORPUS = ("mean_length", "distinct", "bad_endings", "repeated_words")


def stages(what: str) -> dict[str, tuple[str | None, list]]:
    """Stage -> (the stage whose model it starts from, flags of train.py)."""
    first = "recipes/quickstart/scenes.yaml"
    data = []
    if what == "photos":
        folder = Path(os.environ["CAPTION_TEST_DATA"])
        first, data = "recipes/photos/small.yaml", ["--dataset_name", folder / "flickr8k"]
    recipe = f"recipes/progressive/{what}"
    first = [first, *data, "--metric_for_best_model", "CIDEr"]
    more = {
        "model_config": "", "max_steps": 300, "learning_rate": 3e-4, "warmup_steps": 0, "eval_strategy": "steps",
        "save_strategy": "steps", "eval_steps": 100, "save_steps": 100,
    }  # fmt: skip
    more = first + [word for name, value in more.items() for word in (f"--{name}", value)]
    if what == "photos":
        first = [*first, "--tokenizer_vocab", folder / "bert-base-uncased/vocab.txt"]
    control = {"1 continued": ("1 cross-entropy", more)} if what == "scenes" else {}
    return {
        "1 cross-entropy": (None, first),
        **control,
        "2 augmented": ("1 cross-entropy", [f"{recipe}_2_augment.yaml", *data]),
        "3 scst": ("2 augmented", [f"{recipe}_3_scst.yaml", *data]),
    }


def scores_of(folder: Path) -> dict:
    """Validation and test scores of a finished run, its training log and its time."""
    found = {}
    for split, path in (("validation", folder / "validation"), ("test", folder)):
        scores = json.loads((path / "coco_metrics.json").read_text(encoding="utf-8"))
        found[split] = {name: scores[name] for name in SCORES} | {name: scores["corpus"][name] for name in CORPUS}
        if "scene_facts" in scores:
            found[split] |= {"scene_facts": scores["scene_facts"]["scene_facts"]}
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rows = [{name: row[name] for name in LOGGED if name in row} for row in history]
    found["log"] = [row for row in rows if len(row) > 1]
    found["commit"] = scores["commit"]
    found["training_seconds"] = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))["train_runtime"]
    return found


def summarize(seeds: dict[str, dict]) -> dict:
    """Mean and standard deviation over seeds of each score at each stage, and of each stage's gain over the first."""
    table = {}
    for stage in next(iter(seeds.values())):
        for split in ("validation", "test"):
            for name in next(iter(seeds.values()))[stage][split]:
                values = [runs[stage][split][name] for runs in seeds.values()]
                gains = [runs[stage][split][name] - runs["1 cross-entropy"][split][name] for runs in seeds.values()]
                table.setdefault(stage, {}).setdefault(split, {})[name] = {
                    "mean": statistics.mean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                    "gain": statistics.mean(gains),
                    "gain_sd": statistics.stdev(gains) if len(gains) > 1 else None,
                }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scenes", "photos"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "progressive", help="folder for the trained models"
    )
    arguments = parser.parse_args()

    seeds = {}
    for seed in arguments.seeds:
        folders = {}
        for stage, (start, flags) in stages(arguments.what).items():
            of = arguments.seeds[0] if arguments.what == "photos" and stage != "3 scst" else seed
            folders[stage] = (arguments.runs / f"{arguments.what}-{of}-{stage.replace(' ', '-')}").resolve()
            if not (folders[stage] / "coco_metrics.json").exists():
                command = [sys.executable, "train.py", *flags, "--seed", of, "--output_dir", folders[stage]]
                command += ["--model_name_or_path", folders[start]] if start else []
                command += ["--meteor", "false", "--spice", "false"]
                print("$", *command, flush=True)
                began = time.perf_counter()
                subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
                print(f"{time.perf_counter() - began:.0f} s", flush=True)
            scores = seeds.setdefault(str(seed), {})[stage] = scores_of(folders[stage])
            print(seed, stage, "CIDEr", scores["validation"]["CIDEr"], scores["test"]["CIDEr"], flush=True)
    table = summarize(seeds)
    commands = {stage: " ".join(map(str, flags)) for stage, (_, flags) in stages(arguments.what).items()}
    write_json(
        RESULTS / f"progressive_{arguments.what}.json",
        {"stages": commands, "table": table, "seeds": seeds, **environment()},
    )
    for stage, splits in table.items():
        row = splits["validation"]["CIDEr"]
        print(f"{stage:<16} validation CIDEr {row['mean']:.3f} (sd {row['sd'] or 0:.3f}), gain {row['gain']:+.3f}")


if __name__ == "__main__":
    main()

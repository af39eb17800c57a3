"""The same captions everywhere: families by places, plain and LoRA, for models that were trained with settings of their own.

    python -m benchmarks.quality.one_caption              (tiny models of every family whose libraries are installed)

Each is trained by train.py, whose predictions.json is compared with what evaluate.py, infer.py, the demo, the endpoint, an
exported folder and the card's code (run as it is printed) say of the same pictures: a cell is how many are equal byte for byte.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
import families  # noqa: E402
import places  # noqa: E402
import tiny  # noqa: E402
from small_run import CAPTIONS  # noqa: E402

HELD_OUT = list(CAPTIONS)[:8]
TRAINING = {
    "num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 2, "length_penalty": 0.5, "early_stopping": "false",
    "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "prompt": 'a "small"\n`dog` of', "keep_prompt": "true",
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false", "gradient_checkpointing": "false",
}  # fmt: skip
QUIET = {"meteor": "false", "spice": "false", "bootstrap_samples": 0, "report": "false"}


def words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def predictions(folder: Path) -> dict[str, str]:
    rows = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    return {row["image_id"]: row["caption"] for row in rows}


def equal_captions(name: str, lora: bool, dataset: Path, folder: Path) -> dict[str, int]:
    """{place: how many of the held-out pictures it captions as train.py did}."""
    model, processor = families.build(name)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    own = {
        "model_name_or_path": folder / "base",
        "dataset_name": dataset,
        "output_dir": folder / "run",
        "use_peft": lora,
    }
    places.script("train", *words(TRAINING | QUIET | own))
    evaluated = {"model_name_or_path": folder / "run", "dataset_name": dataset, "output_dir": folder / "evaluated"}
    places.script("evaluate", *words(QUIET | evaluated))
    expected = predictions(folder / "run")
    images = [dataset.parent / image for image in expected]
    (folder / "places").mkdir()
    said = {"evaluate": list(predictions(folder / "evaluated").values())}
    said |= places.captions(folder / "run", images, folder / "places")
    return {
        place: sum(one == other for one, other in zip(captions, expected.values(), strict=True))
        for place, captions in said.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="default: all whose libraries are installed")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_caption.json")
    arguments = parser.parse_args()
    installed = [entry for entry in families.NAMES if isinstance(entry, str) or not entry.marks[0].args[0]]
    names = arguments.families or [getattr(entry, "values", [entry])[0] for entry in installed]
    cells: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        splits = {name: "test" if name in HELD_OUT else "train" for name in CAPTIONS}
        dataset = tiny.write_photos(Path(temporary, "photos"), CAPTIONS, splits)
        for name in names:
            for lora in (False, True):
                row = f"{name}, LoRA" if lora else name
                folder = Path(temporary, row.replace(", ", "-"))
                folder.mkdir()
                cells[row] = equal_captions(name, lora, dataset, folder)
                print(f"{row:<28} {cells[row]}", flush=True)
    unequal = sum(count < len(HELD_OUT) for row in cells.values() for count in row.values())
    summary = {"pictures": len(HELD_OUT), "cells": sum(map(len, cells.values())), "unequal_cells": unequal}
    absent = [name for name in families.ALL if name not in names]
    write_json(arguments.output, {**summary, "not_run": absent, "equal": cells, "training": TRAINING, **environment()})
    print(f"{unequal} of {summary['cells']} cells differ; written to {arguments.output}")


if __name__ == "__main__":
    main()

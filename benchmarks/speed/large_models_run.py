"""One process of benchmarks.speed.large_models: train.py, recording its memory."""

import json
import os
import sys
from pathlib import Path

import train
from common.cli import run
from training import building
from training.trainer import CaptionTrainer

GIB = 2**30


def memory(name: str) -> float:
    """Bytes: VmRSS, the current memory, or VmHWM, the peak since the last reset."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )
    return 1024 * int(line.split()[1])


def set_back() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main():
    found = {}
    load, plan, train_steps = train.load_captioner, building.plan, CaptionTrainer.train

    def loading(*arguments):
        set_back()
        found["before"] = memory("VmRSS")
        return load(*arguments)

    def training(self, *arguments, **options):
        found["loading"] = (memory("VmHWM") - found["before"]) / GIB
        set_back()
        outcome = train_steps(self, *arguments, **options)
        found["training"] = (memory("VmHWM") - found["before"]) / GIB
        return outcome

    train.load_captioner, CaptionTrainer.train = loading, training
    building.plan = lambda *arguments: found.setdefault("plan", plan(*arguments))
    train.main()
    sys.argv.append("--dry_run")
    train.main()
    estimate = found.pop("plan")
    found["estimated"] = estimate.training / GIB
    counts = ("parameters", "trained")
    found["parts"] = {name: round(size / GIB, 4) for name, size in vars(estimate).items() if name not in counts}
    found |= {name: getattr(estimate, name) for name in counts}
    Path(f"{os.environ['MEASURED']}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    run(main)

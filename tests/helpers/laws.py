"""What a run of train.py has seen, step by step, in any number of processes, killed and resumed or not."""

import json
import os
from pathlib import Path

import pytest
import small_run
import tiny
from ranks import ROOT, Ranks

NEEDS_FORKS = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="runs are forks of one process, to spare their imports"
)
DDP = ROOT / "recipes/accelerate/ddp.yaml"

# One to three captions per image, 25 of them trained on: the last step has a single one.
CAPTIONS = {
    name: [*texts, f"a photo of a {texts[0][2:]}"][: 1 + number % 3]
    for number, (name, texts) in enumerate(small_run.CAPTIONS.items())
}
SPLITS = {
    name: "validation" if number in (4, 10) else "test" if number == 1 else "train"
    for number, name in enumerate(CAPTIONS)
}
FROM_A_MODEL = {"model_config": None, "tokenizer_vocab": None}
OFTEN = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_total_limit": 20}
AUGMENTED = {"augment": ["random_resized_crop:0.5:1.0", "flip"], "augment_text": ["synonym:0.5"]}


def training_pairs() -> list[str]:
    """The image of each training pair."""
    return [f"{name}.png" for name, texts in CAPTIONS.items() for _ in texts if SPLITS[name] == "train"]


class Runs:
    """Recorded runs of train.py in forks, each into a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.dataset = folder, tiny.write_photos(folder / "photos", CAPTIONS, SPLITS)
        self.ranks = Ranks(folder)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.ranks.close()

    def run(self, name: str, *, config=None, processes=1, moment="", signal="SIGKILL", code=0, **changed):
        """Starts or resumes the run `name`; returns (its Run, each process's log)."""
        run = Run(self.folder / name)
        record = run.record / str(len(list(run.record.glob("*"))))
        record.mkdir(parents=True)
        values = {"per_device_train_batch_size": 4 // processes, "report": "false", "report_to": "none"}
        words = small_run.flags(self.folder, self.dataset, run.output, **(values | {"bootstrap_samples": 0} | changed))
        pairs = [(flag, value) for flag, value in zip(words[::2], words[1::2], strict=True) if value is not None]
        words = [word for flag, value in pairs for word in (flag, *(value if isinstance(value, list) else [value]))]
        asked = {"RECORD": str(record), **({"MOMENT": moment, "SIGNAL": signal} if moment else {})}
        config = config or (DDP if processes > 1 else None)
        options = {"processes": processes, "config": config, "code": code, "script": "tests/helpers/recorded_train"}
        return run, self.ranks.run(*words, **options, **asked)


def recorded(folder: Path) -> list[dict]:
    """What the processes of one start wrote, one after the other."""
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.open(encoding="utf-8")]


def refusal(logs: list[str]) -> str:
    """The one line that every process ended with."""
    lines = [[line for line in log.splitlines() if line.startswith("train.py: ")] for log in logs]
    assert [len(of_one) for of_one in lines] == [1] * len(logs), logs
    assert "Traceback" not in "".join(logs), logs
    return lines[0][0].removeprefix("train.py: ")


class Run:
    def __init__(self, output: Path):
        self.output, self.record = output, output.with_name(f"{output.name}.record")

    def steps(self) -> dict[int, dict]:
        """{step: {"learning_rate", "samples" of all processes, sorted}}. A step that a killed process began and
        the next one did again is there once; both must have seen the same."""
        steps: dict[int, dict] = {}
        for start in sorted(self.record.iterdir()):
            again = {}
            for line in recorded(start):
                line.pop("noise")
                step = again.setdefault(line.pop("step"), line | {"samples": []})
                assert line == {**step, "samples": line["samples"]}
                step["samples"] += line["samples"]
            for number, step in again.items():
                step["samples"].sort(key=json.dumps)
                before = steps.get(number, {"samples": []})["samples"]
                assert all(sample in step["samples"] for sample in before), f"step {number} was done again otherwise"
            steps |= again
        return steps

    def samples(self, epoch: int) -> list[dict]:
        return [row for step in self.steps().values() for row in step["samples"] if row["epoch"] == epoch]

    def images(self, epoch: int) -> list[str]:
        return sorted(row["image"] for row in self.samples(epoch))

    def noise(self) -> dict[int, list[str]]:
        """{step: the random state of each process at each of its batches}."""
        noise: dict[int, list[str]] = {}
        for line in recorded(min(self.record.iterdir())):
            noise.setdefault(line["step"], []).append(line["noise"])
        return noise

    def weights(self) -> dict[str, bytes]:
        """{file: its bytes} of the weights that the run ended with."""
        return {file.name: file.read_bytes() for file in self.output.glob("*.safetensors")}

    def logged(self, name: str) -> dict[int, float]:
        """{step: value} of a number in the Trainer's log."""
        history = json.loads((self.output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return {row["step"]: row[name] for row in history if name in row}

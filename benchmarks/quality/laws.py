"""Whether a run learns from the same in every way of running it, with every option that could interfere.

    python -m benchmarks.quality.laws [--options plain patience] [--kills 20] [--folder FOLDER]

With --options the rows of the others stay as they are in the results file.

Runs of train.py on tiny pictures and models write down all that they learn from (tests/helpers/recorded_train.py): of each step
the epoch, learning rate, images, captions and pixels after augmentation. Each way is compared with one process that is left
alone. A killed or stopped run is started again, and its losses and weights must be the same in bits; those of other numbers of
processes differ by rounding, and where noise is drawn (dropout, sampled captions) by each process's own.

Writes benchmarks/results/laws.json, and prints the table of docs/training.md.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]

import laws  # noqa: E402

REWARDED = laws.FROM_A_MODEL | {"reward": "cider:1.0", "num_train_epochs": 6, "metric_for_best_model": "CIDEr"}
OPTIONS = {
    "plain": {},
    "augmentation": laws.AUGMENTED,
    "LoRA": laws.FROM_A_MODEL | {"use_peft": "true", "lora_r": 4, "lora_dropout": 0.1, "feature_cache": "off"},
    "SCST": REWARDED | {"objective": "scst", "scst_samples": 2},
    "DiCO": REWARDED | {"objective": "dico", "dico_candidates": 2},
    "GRPO": REWARDED | {"objective": "grpo", "num_generations": 2, "num_iterations": 2, "beta": 0.1},
    "captions_per_image 2": {"captions_per_image": 2},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "patience": {"patience": 2, "metric_for_best_model": "loss", "greater_is_better": "true", "learning_rate": 1e-4},
    "feature cache": {"freeze_vision": "true", "feature_cache": "memory"},
    "warm-up": {"warmup_steps": 5, "lr_scheduler_type": "cosine"},
    "stream": {"streaming": "true", "max_steps": 12},
}
NOISY = ("LoRA", "SCST", "GRPO")  # each process draws its own
TWO = {"processes": 2}
WAYS = {
    "2 workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": "true"},
    "half the batch, twice accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "2 processes": TWO,
    "2 processes, FSDP2": TWO | {"config": ROOT / "recipes/accelerate/fsdp2.yaml"},
}
MOMENTS = {
    "in a step": "step 5",
    "at an epoch's end": "epoch 2",
    "in an evaluation": "evaluation 2",
    "in a save": "save 2",
}
# Name: (signal, exit code, moment, how it is launched).
ENDS = {
    f"{signal} {name}, resumed": (signal, code, moment, {})
    for signal, code in (("SIGKILL", -9), ("SIGTERM", 143), ("SIGUSR1", 138))
    for name, moment in MOMENTS.items()
}
ENDS |= {
    f"2 processes, {signal} {name}, resumed": (signal, code, moment, TWO)
    for signal, code, names in (
        ("SIGKILL", -9, ["in a step", "in a save"]),
        ("SIGTERM", 143, ["in a step", "in an evaluation"]),
    )
    for name, moment in MOMENTS.items()
    if name in names
}


class Refused(Exception):
    pass


class Laws:
    def __init__(self, folder: Path):
        self.runs, self.count = laws.Runs(folder), 0
        self.base = self.runs.run("base")[0].output

    def run(self, option: str, name: str | None = None, **launch) -> tuple:
        """(Run, its name); Refused with the one line that it ended with."""
        flags = laws.OFTEN | OPTIONS[option] | {"code": ()} | launch
        flags |= {"model_name_or_path": self.base} if "model_config" in OPTIONS[option] else {}
        self.count += not name
        name = name or f"{self.count}"
        flags["code"] = (*(flags["code"] or (0,)), 2)
        run, logs = self.runs.run(name, **flags)
        if any(line.startswith("train.py: ") and "stopped." not in line for line in logs[0].splitlines()):
            raise Refused(laws.refusal(logs).replace(str(self.runs.folder), "..."))
        return run, name

    def compare(self, option: str, way: str, whole, other, same_processes: bool) -> str:
        if other.steps() != whole.steps():
            return "DIFFERENT samples or learning rates"
        if not same_processes:
            pairs = [(value, other.logged("loss")[step]) for step, value in whole.logged("loss").items()]
            off = max(abs(one - two) for one, two in pairs)
            return "same sequence" if option in NOISY or off < 1e-4 else f"DIFFERENT losses, by {off:.1e}"
        if other.logged("loss") != whole.logged("loss") or other.weights() != whole.weights():
            return "DIFFERENT losses or weights"
        return "same sequence, same bits"

    def row(self, option: str):
        """Yields (way, verdict)."""
        whole, _ = self.run(option)
        of_two = None
        for way, launch in WAYS.items():
            try:
                other, _ = self.run(option, **launch)
                of_two = other if launch is TWO else of_two
                yield way, self.compare(option, way, whole, other, way == "2 workers")
            except Refused as line:
                yield way, f"refused: {line}"
        for way, (signal, code, moment, launch) in ENDS.items():
            if launch is TWO and of_two is None:
                continue  # refused above
            try:
                _, name = self.run(option, **launch, signal=signal, moment=moment, code=(code,))
                other, _ = self.run(option, name, **launch)
                yield way, self.compare(option, way, of_two if launch is TWO else whole, other, same_processes=True)
            except Refused as line:
                yield way, f"refused: {line}"
        if of_two is not None:
            yield from self.fewer(option, whole)

    def fewer(self, option: str, whole):
        """One process goes on with what two began."""
        way = "2 processes, SIGKILL in a step, resumed by 1"
        try:
            _, name = self.run(option, **TWO, moment="step 5", code=(-9,))
            try:
                self.run(option, name, per_device_train_batch_size=2)
                yield way, "DIFFERENT, without a word"
            except Refused as line:
                yield way, f"refused: {line}"
            other, _ = self.run(option, name, allow_other_processes="true")
            yield f"{way}, --allow_other_processes", self.compare(option, way, whole, other, same_processes=False)
        except Refused as line:
            yield way, f"refused: {line}"

    def kills(self, count: int) -> dict:
        """Kills at random moments of a run with augmentation and patience, from its start to its end."""
        OPTIONS["kills"] = OPTIONS["augmentation"] | OPTIONS["patience"] | {"num_train_epochs": 6, "patience": 4}
        start = time.perf_counter()
        whole, _ = self.run("kills")
        seconds, equal, moments = time.perf_counter() - start, 0, []
        draws = random.Random(0)
        for _ in range(count):
            moments.append(round(draws.uniform(0.05, 0.95) * seconds, 2))
            _, name = self.run("kills", moment=f"seconds {moments[-1]}", code=(-9, 0))
            other, _ = self.run("kills", name)
            equal += other.weights() == whole.weights() and other.steps() == whole.steps()
        return {
            "kills": count,
            "after_seconds": moments,
            "of_seconds": round(seconds, 2),
            "same_sequence_and_bits": equal,
        }


def table(found: dict[str, dict[str, str]]) -> str:
    """The table of docs/training.md: ways down, options across. A cell's number is that of the line below the table."""
    ways = list(dict.fromkeys(way for of_option in found.values() for way in of_option))
    refusals: list[str] = []

    def cell(verdict: str) -> str:
        verdict = re.sub(r"\S+/(checkpoint-)", r"\1", verdict)
        if verdict.startswith("refused: "):
            refusals.extend({verdict} - {*refusals})
            return f"refused [{refusals.index(verdict) + 1}]"
        return {"same sequence": "same", "same sequence, same bits": "bits", "": "-"}.get(verdict, verdict)

    rows = [f"| {way} | " + " | ".join(cell(of.get(way, "")) for of in found.values()) + " |" for way in ways]
    head = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    return "\n".join([*head, *rows, "", *(f"[{n}] {line}  " for n, line in enumerate(refusals, 1))]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    args = parser.parse_args()
    results = RESULTS / "laws.json"
    record = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"table": {}}
    with tempfile.TemporaryDirectory() as folder:
        judge = Laws(args.folder or Path(folder))
        for option in args.options:
            record["table"][option] = {}
            for way, verdict in judge.row(option):
                record["table"][option][way] = verdict
                print(f"{option:<22} {way:<50} {verdict}", flush=True)
            write_json(results, record | environment())
        if args.kills:
            record["random_kills"] = judge.kills(args.kills)
            print(json.dumps(record["random_kills"]))
            write_json(results, record | environment())
        judge.runs.ranks.close()
    print(table({option: record["table"][option] for option in OPTIONS if option in record["table"]}))


if __name__ == "__main__":
    main()

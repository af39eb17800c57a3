"""Memory and time of rewrite.py over the number of rows, with a backend that answers at once (must show 5).

    python -m benchmarks.rewriting.rewrite_scaling [--rows 1000 10000 100000 1000000]

Everything but the LLM is real: reading, prompts, checks, part files, merging, the report. Each size runs in a process of
its own, whose memory is read while it runs. Writes benchmarks/results/rewrite_scaling.json and docs/rewrite_scaling.png.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import psutil

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Instant:
    """Answers every prompt at once, with a text that passes."""

    def __init__(self):
        from rewriting.prompts import Tokens

        self.tokens = Tokens()

    def settings(self) -> dict:
        return {}

    def run(self, jobs, judge):
        from rewriting.backends import Outcome

        for job in jobs:
            text = f"In this offer, {job.inputs[0]} is beside {job.inputs[1]}."
            yield job, Outcome(text, judge(job, text, True), 1, len(job.ids), 20)


def worker(source: str, output: str) -> None:
    import rewrite
    from common import cli

    rewrite.open_backend = lambda *_: Instant()
    sys.argv = ["rewrite.py", "fuse", source, "--output", output, "--llm", "openai:instant"]
    cli.run(rewrite.main)


def measure(rows: int, folder: Path) -> dict:
    source, output = folder / f"{rows}.jsonl", folder / f"{rows}.out.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for n in range(rows):
            row = {
                "id": n,
                "raw": f"Shop {n % 997} Article {n} blue and green",
                "synthetic": f"a dog near {n % 89} chairs",
            }
            file.write(json.dumps(row) + "\n")
    start, curve = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "--worker", source, output], stderr=subprocess.DEVNULL
    )
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            curve.append((time.perf_counter() - start, watched.memory_info().rss / 2**20))
        except psutil.NoSuchProcess:
            break
        time.sleep(max(0.05, min(1, rows / 1e6)))
    assert process.wait() == 0
    seconds = time.perf_counter() - start
    with open(output, encoding="utf-8") as file:
        assert sum(1 for _ in file) == rows
    for path in folder.glob(f"{rows}.*"):
        path.unlink()
    step = max(1, len(curve) // 200)
    return {"rows": rows, "seconds": seconds, "peak_mib": max(m for _, m in curve), "curve": curve[::step]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--worker", nargs=2, help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    folder = ROOT / "runs/benchmark/scaling"
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for rows in arguments.rows:
        runs.append(measure(rows, folder))
        print(f"{rows} rows: {runs[-1]['seconds']:.1f} s, {runs[-1]['peak_mib']:.0f} MiB", flush=True)
    first, last = runs[-2], runs[-1]
    result = {
        "runs": runs,
        "microseconds_a_row": (last["seconds"] - first["seconds"]) / (last["rows"] - first["rows"]) * 1e6,
        "bytes_of_memory_a_row": (last["peak_mib"] - first["peak_mib"]) * 2**20 / (last["rows"] - first["rows"]),
        **environment(),
    }
    write_json(RESULTS / "rewrite_scaling.json", result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run in runs:
        left.plot(
            [t / run["seconds"] for t, _ in run["curve"]], [m for _, m in run["curve"]], label=f"{run['rows']:,} rows"
        )
    left.set(xlabel="share of the run", ylabel="resident memory (MiB)", ylim=(0, None))
    left.legend()
    right.loglog([run["rows"] for run in runs], [run["seconds"] for run in runs], marker="o")
    right.set(xlabel="rows", ylabel="seconds, start included")
    figure.savefig(ROOT / "docs/rewrite_scaling.png", dpi=110)


if __name__ == "__main__":
    main()

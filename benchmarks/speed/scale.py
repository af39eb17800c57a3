"""Cost of infer.py and rewrite.py by the number of images and rows: CPU, memory, time.

    python -m benchmarks.speed.scale [--images 1000 10000 100000] [--rows 1000 ... 1000000] [--baseline COMMIT]

Images are 32 x 32 JPEGs in tars of 1,000, captioned by a BLIP of 2 layers, so that nearly all of the cost is overhead
around the model. Three ways: infer.py of the commit before shards (--baseline), --engine local, and --engine ray with one
worker. Rows are fused with a backend that answers instantly. Each run is a separate process; CPU seconds and peak memory
cover all processes that it starts, including Ray's daemons. The cost per image is the difference between two sizes, so
that startup is left out. Writes benchmarks/results/scale.json and docs/scale.png.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import psutil
from PIL import Image

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "ff2f287"  # the last commit whose infer.py wrote part files and merged them
PER_TAR = 1000


class Instant:
    """Answers every prompt instantly, with a text that passes the checks."""

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


def watch(command: list, folder: Path, interval: float = 0.25, **environ) -> dict:
    """CPU seconds, peak memory and wall-clock time of a command and all processes that it starts."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0", **environ}
    began = time.perf_counter()
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = psutil.Popen([*map(str, command)], cwd=folder, env=variables, stdout=log, stderr=log)
    cpu: dict[int, float] = {}
    peak, curve = 0.0, []
    while process.poll() is None:
        memory = 0
        try:
            for each in (process, *process.children(recursive=True)):
                try:
                    times = each.cpu_times()
                    cpu[each.pid] = times.user + times.system
                    memory += each.memory_full_info().uss
                except psutil.Error:
                    continue
        except psutil.Error:
            break
        peak = max(peak, memory / 2**20)
        curve.append((time.perf_counter() - began, memory / 2**20))
        time.sleep(interval)
    if process.wait():
        raise SystemExit(
            f"{command}: exit {process.returncode}\n{(folder / 'log').read_text(encoding='utf-8')[-3000:]}"
        )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu_seconds": sum(cpu.values()),
        "peak_mib": peak,
        "curve": curve[:: len(curve) // 200 + 1],
    }


def write_tars(folder: Path, images: int) -> None:
    """Write the tars of PER_TAR small images that do not exist yet."""
    contents = []
    for number in range(50):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(content, "JPEG")
        contents.append(content.getvalue())
    folder.mkdir(exist_ok=True)
    for shard in range(images // PER_TAR):
        if not (folder / f"{shard:05d}.tar").exists():
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                for number in range(PER_TAR):
                    member = tarfile.TarInfo(f"{number:06d}.jpg")
                    member.size = len(content := contents[(shard + number) % 50])
                    tar.addfile(member, io.BytesIO(content))


def build_model(folder: Path) -> Path:
    command = (
        "import sys; sys.path[:0] = ['tests', 'tests/helpers']; import tiny; from pathlib import Path; "
        f"tiny.build_folder(Path({str(folder)!r}))"
    )
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
    return folder / "model"


def caption(how: str, images: int, place: Path, model: Path, baseline: Path) -> dict:
    tars = [place / "tars" / f"{shard:05d}.tar" for shard in range(images // PER_TAR)]
    output = place / f"out-{how}"
    script = (baseline if how == "before" else ROOT) / "infer.py"
    more = ["--engine", "ray", "--workers", 1] if how == "ray" else []
    found = watch(
        [sys.executable, script, *tars, "--model_name_or_path", model, "--num_beams", 1, "--max_new_tokens", 4,
         "--per_device_eval_batch_size", 64, "--output", output, *more],
        place,
    )  # fmt: skip
    import pyarrow.dataset

    assert pyarrow.dataset.dataset(output).count_rows() == images
    shutil.rmtree(output)
    for left in place.glob("out-*"):
        left.unlink() if left.is_file() else shutil.rmtree(left)
    return {"engine": how, "images": images, **found}


def rewrite(rows: int, place: Path) -> dict:
    source, output = place / "in.jsonl", place / "out.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for n in range(rows):
            file.write(
                f'{{"id": {n}, "raw": "Shop {n % 997} Article {n} blue", "synthetic": "a dog near {n % 89} chairs"}}\n'
            )
    command = [sys.executable, "-m", __spec__.name, "--worker", source, output]
    found = watch(command, place, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    with open(output, encoding="utf-8") as file:
        assert sum(1 for _ in file) == rows
    source.unlink(), output.unlink()
    shutil.rmtree(f"{output}.shards")
    return {"rows": rows, **found}


def marginal(runs: list[dict], unit: str) -> float | None:
    """CPU milliseconds per image or row between the smallest and the largest run."""
    first, last = runs[0], runs[-1]
    if last is first:
        return None
    return (last["cpu_seconds"] - first["cpu_seconds"]) / (last[unit] - first[unit]) * 1000


def plot(result: dict) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    series = {f"infer.py, {how}": (runs, "images") for how, runs in result["images"].items()}
    series |= {"rewrite.py, local": (result["rows"], "rows")}
    for name, (runs, unit) in series.items():
        numbers = [run[unit] for run in runs]
        axes[0].loglog(numbers, [1000 * run["cpu_seconds"] / run[unit] for run in runs], marker="o", label=name)
        axes[1].semilogx(numbers, [run["peak_mib"] for run in runs], marker="o", label=name)
        axes[2].loglog(numbers, [run["seconds"] for run in runs], marker="o", label=name)
    axes[0].set(xlabel="images or rows", ylabel="CPU ms per image or row, startup included")
    axes[1].set(xlabel="images or rows", ylabel="peak memory, all processes (MiB)", ylim=(0, None))
    axes[2].set(xlabel="images or rows", ylabel="seconds (on a shared machine)")
    axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs/scale.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--engines", nargs="*", default=["before", "local", "ray"])
    parser.add_argument("--largest", type=int, default=10_000, help="most images for engines other than local")
    parser.add_argument("--baseline", default=BASELINE)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--worker", nargs=2, help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    before = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    images: dict[str, list] = {how: [] for how in arguments.engines} if arguments.images else before.get("images", {})
    rows: list[dict] = [] if arguments.rows else before.get("rows", [])  # earlier results stay unless measured again

    def keep() -> None:
        per_image = {how: marginal(runs, "images") for how, runs in images.items() if len(runs) > 1}
        write_json(arguments.output, {
            "images": images, "rows": rows, "cpu_ms_per_image": per_image,
            "cpu_ms_per_row": marginal(rows, "rows") if len(rows) > 1 else None,
            "load_average_at_the_end": os.getloadavg(), **environment(),
        })  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        place = Path(folder)
        (place / "before").mkdir()
        if "before" in arguments.engines:
            archive = subprocess.run(["git", "archive", arguments.baseline], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "xf", "-"], cwd=place / "before", check=True, input=archive.stdout)
        model = build_model(place)
        for number in arguments.images:
            write_tars(place / "tars", number)
            for how in arguments.engines:
                if how == "local" or number <= arguments.largest:
                    images[how].append(caption(how, number, place, model, place / "before"))
                    found = images[how][-1]
                    print(f"{how}, {number} images: {found['cpu_seconds']:.1f} CPU s, {found['peak_mib']:.0f} MiB, "
                          f"{found['seconds']:.0f} s", flush=True)  # fmt: skip
                    keep()
        shutil.rmtree(place / "tars", ignore_errors=True)
        for number in arguments.rows:
            rows.append(rewrite(number, place))
            print(f"{number} rows: {rows[-1]['cpu_seconds']:.1f} CPU s, {rows[-1]['peak_mib']:.0f} MiB", flush=True)
            keep()
    plot({"images": images, "rows": rows})


if __name__ == "__main__":
    main()

"""docs/speed.md's tables: of all runs of the speed benchmarks on CPUs, where the lowest over days and processors counts, and
of gpu.py's run.

    python -m benchmarks.speed.table                            # print them
    python -m benchmarks.speed.table --write docs/speed.md      # put them between the markers there

Runs are the folders that benchmarks/speed/all.sh makes in benchmarks/results/runs. The share of the limit is roofline.py's.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.harness import RESULTS
from common.files import write_text

BEGIN, BEGIN_GPU, END = (
    f"<!-- {words} -->" for words in ("made by benchmarks.speed.table", "of a GPU", "end of table")
)
RATE = lambda found: (found["peer"]["median"], found["ours"]["median"], found["ratio"])  # noqa: E731
SECONDS = lambda found: (found["peer"]["median_s"], found["ours"]["median_s"], found["ratio"])  # noqa: E731
SCORES = lambda found: (found["pycocoevalcap"]["median_s"], found["ours"]["median_s"], found["speedup"])  # noqa: E731
# (measure, peer, file, keys to the numbers, how to read them, roofline.py's name)
ROWS = [
    *(
        (f"captions per second, BLIP-base, 5 beams, batch {n}", "transformers' `generate`", "captioning",
         ["batches", str(n)], RATE, f"captions, batch {n}")
        for n in (8, 1)
    ),
    *(
        (f"captions per second, batch 1: {name.partition(', ')[2]}", "transformers' `generate`", "peers",
         ["batches", "1"], lambda found, name=name: (
             found["peer"]["median"], found[name]["median"], found[name]["median"] / found["peer"]["median"]), None)
        for name in ("ours, bfloat16 weights", "ours, int8 linear layers")
    ),
    *(
        (f"the same: {name}, in place of ours", "transformers' `generate`", "peers", ["batches", "1"],
         lambda found, name=name: (
             found["peer"]["median"], found[name]["median"], found[name]["median"] / found["peer"]["median"]), None)
        for name in ("transformers, torch.compile", "transformers, bfloat16 weights")
    ),
    ("training pairs per second, 5 captions per image", "one caption per row, eager", "training_step", ["all trained"],
     RATE, "training, all trained"),
    ("its peak memory, MiB", "the same", "training_step", ["all trained", "memory"],
     lambda found: (found["peer"]["peak_mib"], found["ours"]["peak_mib"], found["ratio"]), None),
    ("the same with a frozen encoder, from the second epoch on", "the same, `requires_grad=False`", "training_step",
     ["vision frozen, features kept"], RATE, "training, vision frozen, features kept"),
    *(
        (f"SCST steps per second, {name}", "the published loop's shape", "scst_step", [name, "wall"], RATE, f"SCST, {name}")
        for name in ("one sample, greedy baseline", "one sample, greedy baseline, vision frozen",
                     "five samples, leave one out")
    ),
    ("seconds of an SCST step of a chat family", "images encoded once per caption", "family_scst_step", ["median"],
     lambda found: (found["again"], found["once"], found["again"] / found["once"]), None),
    ("seconds for all scores but SPICE, 5,000 images", "pycocoevalcap", "scores", ["coco_karpathy_test_scores"],
     SCORES, None),
    ("seconds for the CIDEr-D reward, 64 images x 5", "pycocoevalcap", "scores", ["cider_d_reward"], SCORES, None),
    ("seconds for `infer.py` on 2,000 JPEGs, a small model", "processor and `generate` in a loop", "inference", [],
     SECONDS, None),
]  # fmt: skip


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def numbers(folder: Path, name: str, keys: list[str], how) -> tuple | None:
    """(peer's median, ours, ratio) of a run; None if it does not have this measure."""
    found = read(folder / f"{name}.json")
    try:
        for key in keys:
            found = found[key]
        return how(found)
    except (KeyError, TypeError):
        return None


def row(runs: list[Path], measure: str, peer: str, name: str, keys: list[str], how, limit: str | None) -> str | None:
    """A line of the table: the run with the lowest ratio, and the range over all."""
    found = {folder: of_run for folder in runs if (of_run := numbers(folder, name, keys, how))}
    if not found:
        return None
    less_is_better = "MiB" in measure
    chosen = (max if less_is_better else min)(found, key=lambda folder: found[folder][2])
    theirs, ours, times = found[chosen]
    ratios = [ratio for _, _, ratio in found.values()]
    several = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} runs"
    over_runs = several if len(ratios) > 1 else "one run"
    shares = (read(chosen / "roofline.json") or {}).get("float32", {}).get(limit, {}).get("share")
    share = f"{shares['peer']:.0%}, {shares['ours']:.0%}" if shares else ""
    file = f"[file](../benchmarks/results/runs/{chosen.name}/{name}.json)"
    return (
        f"| {measure} | {peer} | {_short(theirs)} | {_short(ours)} | **{times:.2f}** | {over_runs} | {share} | {file} |"
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def table(results: Path) -> str:
    runs = sorted(folder for folder in (results / "runs").glob("*") if folder.is_dir())
    head = "| measure | peer | peer's median | here | times, lowest run | median over runs (range) | share of the "
    lines = [head + "limit: peer, here | file |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *filter(None, (row(runs, *of_row) for of_row in ROWS))]) + "\n"


def gpu_table(results: Path) -> str:
    """The medians of gpu.py: items per second, share of the limit and peak memory of both sides."""
    lines = [
        "| per second | peer | here | times | share of the limit: peer, here | GPU memory, GiB: peer, here |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in read(results / "gpu.json")["measures"].items():
        if "ratio" in found:
            rates = [_short(found[side]["median"]) for side in ("peer", "ours")]
            share = ", ".join(f"{part:.1%}" for part in found.get("share_of_limit", {}).values())
            memory = ", ".join(f"{size / 2**10:.1f}" for size in found.get("memory_mib", {}).values())
            lines.append(f"| {name} | {rates[0]} | {rates[1]} | **{found['ratio']:.2f}** | {share} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="page with the two markers to put the table between")
    arguments = parser.parse_args()
    tables = {BEGIN: table(RESULTS), BEGIN_GPU: gpu_table(RESULTS)}
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        for begin, found in tables.items():
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{found}{END}{rest.split(END, 1)[1]}"
        write_text(arguments.write, text)
    print(*tables.values(), sep="\n")


if __name__ == "__main__":
    main()

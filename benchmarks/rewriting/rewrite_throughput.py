"""The hf: backend compared with a loop like the published script's, and 2,000 rows under torchrun, killed once.

    CAPTION_TEST_DATA=... python -m benchmarks.rewriting.rewrite_throughput [--llm FOLDER] [--timed_rows 400]

The published loop: every prompt padded to 256 tokens, batches of 4 in file order. Both use the same model, 3 beams, at
most 80 new tokens and 2 processes; loading is not timed. Then rewrite.py processes the whole file, killed once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment
from rewriting.prompts import fit, load_prompt

BEAMS, NEW_TOKENS, PADDED = 3, 80, 256


def worker(how: str, llm: Path, rows: list[dict], out: Path) -> None:
    """One of two processes: rewrite every second row with the published loop or our backend; write texts and seconds."""
    import torch

    from benchmarks.rewriting.rewrite_server import captions
    from rewriting.backends import HFBackend, Job

    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batch_size = {"loop": 4, "ours at 4": 4, "ours": 8}[how]
    args = SimpleNamespace(
        quantization=None, bf16=False, chat=False, max_prompt_tokens=PADDED, max_new_tokens=NEW_TOKENS, num_beams=BEAMS,
        per_device_batch_size=batch_size, max_attempts=1, temperature=None, seed=42,
    )  # fmt: skip
    backend, prompt = HFBackend(str(llm), args, device="cpu"), load_prompt("fuse")
    texts = {}
    numbers = range(rank, len(rows), processes)
    prompts = {n: fit(prompt, captions(rows[n]), backend.tokens, PADDED) for n in numbers}
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    start = time.perf_counter()
    if how == "loop":
        tokenizer = backend.tokens.tokenizer
        for first in range(0, len(numbers), batch_size):
            some = numbers[first : first + batch_size]
            batch = tokenizer(
                [prompts[n][0] for n in some],
                padding="max_length",
                max_length=PADDED,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                new = backend.model.generate(**batch, num_beams=BEAMS, max_new_tokens=NEW_TOKENS)[:, PADDED:]
            decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
            texts |= {n: " ".join(text.split()) for n, text in zip(some, decoded, strict=True)}
    else:
        jobs = (Job(n, "", [], *prompts[n]) for n in numbers)
        texts = {job.row: outcome.text for job, outcome in backend.run(jobs, lambda *_: None)}
    seconds = time.perf_counter() - start
    (out / f"{how}-{rank}.json").write_text(json.dumps({"seconds": seconds, "texts": texts}), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def torchrun(*words) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, default=ROOT / "runs/benchmark/fuse-llm")
    parser.add_argument("--timed_rows", type=int, default=400)
    parser.add_argument("--worker", help="used by the script itself")
    arguments = parser.parse_args()
    source = Path(os.environ["CAPTION_TEST_DATA"]) / "capsfusion/example_data.json"
    rows, out = json.loads(source.read_text(encoding="utf-8")), ROOT / "runs/benchmark/throughput"
    if arguments.worker:
        return worker(arguments.worker, arguments.llm, rows[: arguments.timed_rows], out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    if not arguments.llm.exists():
        from benchmarks.rewriting.rewrite_server import train_fuse_llm

        train_fuse_llm(rows, arguments.llm)

    environ, measured = {**os.environ, "OMP_NUM_THREADS": "1"}, {}
    for how in ("loop", "ours at 4", "ours"):
        words = ("-m", __spec__.name, "--worker", how, "--llm", arguments.llm, "--timed_rows", arguments.timed_rows)
        subprocess.run(torchrun(*words), env=environ, check=True)
        halves = [json.loads((out / f"{how}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
        measured[how] = {
            "rows_per_second": arguments.timed_rows / max(half["seconds"] for half in halves),
            "texts": {**halves[0]["texts"], **halves[1]["texts"]},
        }
    reference = measured["loop"]["texts"]
    speed = {how: value["rows_per_second"] for how, value in measured.items()}
    same = {how: sum(value["texts"][n] == reference[n] for n in reference) for how, value in measured.items()}

    output = out / "fused.jsonl"
    command = torchrun(
        ROOT / "rewrite.py", "fuse", source, "--output", output, "--llm", f"hf:{arguments.llm}", "--chat", "false",
        "--per_device_batch_size", 8, "--max_attempts", 1,
    )  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environ)
    answers = output.with_name(f"{output.name}.shards") / "_answers"
    while sum(part.read_text(encoding="utf-8").count("\n") for part in answers.glob("*.jsonl")) < 600:
        assert process.poll() is None
        time.sleep(0.1)
    for running in (*psutil.Process(process.pid).children(recursive=True), process):  # each worker has its own session
        running.kill()
    process.wait()
    killed_at = sum(part.read_text(encoding="utf-8").count("\n") for part in answers.glob("*.jsonl"))
    subprocess.run(command, env=environ, check=True)
    seconds = time.perf_counter() - start
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    report = json.loads((output.with_name(f"{output.name}.shards") / "_report.json").read_text(encoding="utf-8"))
    written = [row["rewrite"]["rejected"] if row["rewrite"]["reason"] else row["caption"] for row in found]
    result = {
        "processes": 2,
        "threads_each": 1,
        "cores_they_share": len(os.sched_getaffinity(0)),
        "timed_rows": arguments.timed_rows,
        "rows_per_second": speed,
        "faster_than_the_loop": {how: value / speed["loop"] for how, value in speed.items()},
        "texts_equal_to_the_loop_s": same,
        "whole_file": {
            "rows": len(found),
            "killed_at": killed_at,
            "seconds_with_kill_and_two_starts": seconds,
            "status": report["status"],
            "rejected": report["rejected"],
            "texts_equal_to_the_loop_s": sum(written[int(n)] == text for n, text in reference.items()),
        },
        "settings": {
            "num_beams": BEAMS,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 8,
            "loop": f"padded to {PADDED}, 4",
        },
        **environment(),
    }
    write_json(RESULTS / "rewrite_throughput.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

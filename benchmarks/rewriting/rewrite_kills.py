"""Two processes of rewrite.py, killed at random: are answered rows sent again? Counted by the server.

    python -m benchmarks.rewriting.rewrite_kills [--rows 600] [--kills 10]

The processes are killed individually with SIGKILL and restarted, as on a cluster. A row counts as answered when its answer
is in the journal at the moment of a kill. Answers that the server had sent but the process had not yet written when it died
are counted separately: at most --concurrency rows per kill. Writes benchmarks/results/rewrite_kills.json.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, write_result

sys.path.insert(0, str(ROOT / "tests/helpers"))
from llm_server import LLMServer, fused, write_rows

CONCURRENCY = 4


def number(text: str) -> int:
    return int(re.search(r"Shop (\d+)", text).group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)

    def answer(prompt, request):
        time.sleep(0.1)
        return fused(prompt)

    with tempfile.TemporaryDirectory() as folder, LLMServer(answer) as server:
        folder = Path(folder)
        source, output = write_rows(folder, arguments.rows), folder / "out.jsonl"
        command = [sys.executable, ROOT / "rewrite.py", "fuse", source, "--output", output, "--llm", "openai:small",
                   "--base_url", server.url, "--concurrency", str(CONCURRENCY), "--rows_per_file", "50"]  # fmt: skip

        def journal() -> set[int]:
            files = (folder / "out.jsonl.shards/_answers").glob("*.jsonl")
            lines = (line for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1])
            return {number(json.loads(line)["text"]) for line in lines}

        def start(rank: int) -> subprocess.Popen:
            environ = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
                "OPENAI_API_KEY": "x",
            }
            return subprocess.Popen(list(map(str, command)), env=environ, stderr=subprocess.DEVNULL)

        processes = [start(0), start(1)]
        answered_before: list[tuple[set, dict]] = []
        while len(answered_before) < arguments.kills:
            enough = len(journal()) + draw.randint(5, max(6, arguments.rows // (arguments.kills + 2)))
            while len(journal()) < min(enough, arguments.rows) and any(process.poll() is None for process in processes):
                time.sleep(0.02)
            running = [rank for rank, process in enumerate(processes) if process.poll() is None]
            if not running:
                break
            rank = draw.choice(running)
            processes[rank].kill()
            processes[rank].wait()
            answered_before.append((journal(), dict(server.paid)))
            processes[rank] = start(rank)
        assert [process.wait() for process in processes] == [0, 0]
        again = 0
        for kept, paid in answered_before:
            again += sum(server.paid[p] > n for p, n in paid.items() if number(p) in kept)
        found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [row["key"] for row in found] == list(range(arguments.rows))
        result = {
            "rows": arguments.rows,
            "kills": len(answered_before),
            "rows_in_the_output_once_and_in_order": len(found),
            "answers_sent_by_the_server": server.paid.total(),
            "answered_rows_asked_again": again,
            "sent_but_not_yet_written_down_at_a_kill": server.paid.total() - len(server.paid),
            "concurrency": CONCURRENCY,
        }
    print(json.dumps(result, indent=2))
    write_result(RESULTS / "rewrite_kills.json", result)


if __name__ == "__main__":
    main()

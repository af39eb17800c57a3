"""evaluate.py --judge clair against `transformers serve`, killed three times (SIGKILL): is each caption judged once?

    CAPTION_TEST_DATA=... python -m benchmarks.quality.judge_server [--serve_python PYTHON] [--captions 500] [--troubles]

PYTHON is an interpreter with transformers[serving] installed. The judge is a language model of a million parameters, trained here for
a minute to answer the prompt of recipes/judges/clair.txt with JSON: what it answers means nothing, that it is asked once does. A
proxy between the two counts requests, and with --troubles answers some of them with 429, 500 or not at all.

Writes benchmarks/results/judge_server.json: requests that the server answered, captions with a score, captions asked about again.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, write_result
from benchmarks.rewriting import small_llm
from benchmarks.rewriting.rewrite_server import Proxy, serve

SHARES = (0.2, 0.45, 0.7)


def flickr(captions: int) -> tuple[dict, dict]:
    """{image: a caption} and {image: the other captions} of Flickr8k's test images."""
    source = Path(os.environ["CAPTION_TEST_DATA"]) / "flickr8k_expert/references.json"
    texts: dict[str, list[str]] = {}
    for row in json.loads(source.read_text(encoding="utf-8")):
        texts.setdefault(row["image_id"], []).append(row["caption"])
    chosen = random.Random(0).sample(sorted(texts), captions)
    return {name: texts[name][0] for name in chosen}, {name: texts[name][1:] for name in chosen}


def train_judge(candidates: dict, references: dict, folder: Path) -> None:
    lines = (ROOT / "recipes/judges/clair.txt").read_text(encoding="utf-8").splitlines()
    prompt = "\n".join(line for line in lines if not line.startswith("#"))
    pairs = []
    for name, candidate in candidates.items():
        same = len({*candidate.split()} & {*" ".join(references[name]).split()})
        filled = prompt.replace("{candidate}", candidate).replace("{references}", "\n".join(references[name]))
        pairs.append((filled, json.dumps({"score": 10 * min(same, 10), "reason": f"{same} words are the same."})))
    small_llm.train(pairs, folder, steps=150, batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve_python", default=sys.executable)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--troubles", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "judge_server.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_result(arguments.output, measure(arguments, Path(name)))


def measure(arguments, folder: Path) -> dict:
    candidates, references = flickr(arguments.captions)
    rows = [{"image_id": name, "caption": text} for name, text in candidates.items()]
    (folder / "predictions.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "references.json").write_text(json.dumps(references), encoding="utf-8")
    train_judge(candidates, references, folder / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        server = serve(arguments.serve_python, folder / "judge", port, log)
    proxy = Proxy(f"http://127.0.0.1:{port}")
    if not arguments.troubles:
        proxy.rng = random.Random()
        proxy.rng.random = lambda: 1.0
    command = [
        sys.executable, ROOT / "evaluate.py", "--predictions", folder / "predictions.json", "--references",
        folder / "references.json", "--meteor", "false", "--spice", "false", "--bootstrap_samples", 100, "--report", "false",
        "--judge", "clair", "--llm", f"openai:{folder / 'judge'}", "--base_url", f"http://127.0.0.1:{proxy.server_port}/v1",
        "--concurrency", 4, "--timeout", 60, "--output_dir", folder / "scores",
    ]  # fmt: skip
    environment = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    started, events = time.perf_counter(), []
    for share in (*SHARES, None):
        with open(folder / "client.log", "a", encoding="utf-8") as log:
            client = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        while share and client.poll() is None and len(proxy.answered) < share * arguments.captions:
            time.sleep(0.05)
        if share:
            if client.poll() is not None:
                raise SystemExit((folder / "client.log").read_text(encoding="utf-8")[-3000:])
            client.send_signal(signal.SIGKILL)
            events.append(f"evaluate.py killed after {len(proxy.answered)} answers")
        client.wait()
    os.killpg(server.pid, signal.SIGTERM)
    if client.returncode:
        raise SystemExit((folder / "client.log").read_text(encoding="utf-8")[-3000:])
    scores = json.loads((folder / "scores/coco_metrics.json").read_text(encoding="utf-8"))
    lines = (folder / "scores/per_image.jsonl").read_text(encoding="utf-8").splitlines()
    asked = Counter(proxy.answered)
    return {
        "captions": arguments.captions,
        "captions_with_a_score": sum(json.loads(line)["scores"].get("CLAIR") is not None for line in lines),
        "answers_of_the_server": len(proxy.answered),
        "captions_answered_more_than_once": sum(times > 1 for times in asked.values()),
        "injected": dict(proxy.injected),
        "events": events,
        "judge": {key: value for key, value in scores.items() if "judge" in key.lower() or key == "CLAIR"},
        "seconds": round(time.perf_counter() - started, 1),
        "load_average": os.getloadavg()[0],
        "server": "transformers serve, a Llama of a million parameters",
    }


if __name__ == "__main__":
    main()

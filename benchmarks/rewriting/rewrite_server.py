"""rewrite.py against `transformers serve`, with everything going wrong that can.

    CAPTION_TEST_DATA=... python -m benchmarks.rewriting.rewrite_server --serve_python PYTHON [--llm FOLDER] [--rows 2000]

PYTHON is an interpreter with transformers[serving] installed. A proxy between client and server answers 429 and 500, and
lets requests hang. The client is killed three times (SIGKILL), the server once, midway. Afterwards every row must be there
once, in order, and no finished row may have been sent again.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.rewriting import small_llm
from common.files import write_json
from common.provenance import environment
from rewriting.prompts import fill, load_prompt


class Proxy(ThreadingHTTPServer):
    """Forwards chat requests to the server, except for those that it spoils."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), Forward)
        self.upstream, self.rng, self.injected, self.answered = upstream, random.Random(0), Counter(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        draw = self.server.rng.random()
        if draw < 0.05:
            self.server.injected["429"] += 1
            return self.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "1"})
        if draw < 0.10:
            self.server.injected["500"] += 1
            return self.send(500, b'{"error": {"message": "internal error"}}')
        if draw < 0.105:
            self.server.injected["hung"] += 1
            time.sleep(120)
            self.close_connection = True
            return
        request = urllib.request.Request(self.server.upstream + self.path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        except OSError:  # the server is down: so is its proxy's connection
            self.server.injected["server down"] += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if status == 200:
            self.server.answered.append(json.loads(body)["messages"][0]["content"])
        self.send(status, content)

    def send(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **dict(headers),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:  # the client was killed
            self.close_connection = True

    def log_message(self, *_):
        pass


def serve(python: str, llm: Path, port: int, log) -> subprocess.Popen:
    code = "from transformers.cli.transformers import main; main()"
    words = [python, "-c", code, "serve", str(llm), "--port", str(port), "--device", "cpu", "--log-level", "warning"]
    process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    deadline = time.time() + 300
    while time.time() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return process
        except OSError:
            assert process.poll() is None, "the server did not start: see its log"
            time.sleep(0.5)
    raise TimeoutError("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve_python", required=True)
    parser.add_argument("--llm", type=Path, default=ROOT / "runs/benchmark/fuse-llm")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    arguments = parser.parse_args()
    folder = ROOT / "runs/benchmark/server"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    source = Path(os.environ["CAPTION_TEST_DATA"]) / "capsfusion/example_data.json"
    rows, prompt = json.loads(source.read_text(encoding="utf-8"))[: arguments.rows], load_prompt("fuse")
    if not arguments.llm.exists():
        train_fuse_llm(rows, arguments.llm)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server_log, client_log = (
        open(folder / "server.log", "w", encoding="utf-8"),  # noqa: SIM115
        open(folder / "client.log", "w", encoding="utf-8"),  # noqa: SIM115
    )
    server = serve(arguments.serve_python, arguments.llm, port, server_log)
    proxy = Proxy(f"http://127.0.0.1:{port}")
    output = folder / "fused.jsonl"
    command = [
        sys.executable, ROOT / "rewrite.py", "fuse", source, "--output", output, "--llm", f"openai:{arguments.llm}",
        "--base_url", f"http://127.0.0.1:{proxy.server_port}/v1", "--max_samples", arguments.rows, "--max_attempts", 2,
        "--max_new_tokens", arguments.max_new_tokens, "--timeout", 20, "--concurrency", 8, "--max_prompt_tokens", 1000,
    ]  # fmt: skip

    def finished() -> set[int]:
        parts = output.parent.glob(f"{output.name}.shards/_answers/*.jsonl")
        return {json.loads(line)["row"] for part in parts for line in part.read_text(encoding="utf-8").split("\n")[:-1]}

    def client():
        return subprocess.Popen(list(map(str, command)), stdout=client_log, stderr=client_log)

    start, events, twice = time.perf_counter(), [], 0
    for share in (0.2, 0.4, 0.6, None):
        kept, answers_before = finished(), len(proxy.answered)
        process = client()
        while share is None or len(finished()) < share * arguments.rows:
            if share is None and len(finished()) > 0.8 * arguments.rows:
                break
            assert process.poll() is None, "the client ended early: see client.log"
            time.sleep(0.2)
        if share is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            events.append(f"client killed at {len(finished())} rows")
        else:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            events.append(f"server killed at {len(finished())} rows")
            time.sleep(5)
            server = serve(arguments.serve_python, arguments.llm, port, server_log)
            events.append("server restarted")
            assert process.wait(1500) == 0, "the client failed: see client.log"
        kept_prompts = {fill(prompt, captions(rows[number])) for number in kept}
        twice += sum(text in kept_prompts for text in proxy.answered[answers_before:])
    seconds = time.perf_counter() - start
    os.killpg(server.pid, signal.SIGTERM)

    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    ours = [{key: row[key] for key in rows[0]} for row in found]
    assert ours == rows, "rows are missing, doubled or out of order"
    report = json.loads((output.with_name(f"{output.name}.shards") / "_report.json").read_text(encoding="utf-8"))
    log = (folder / "client.log").read_text(encoding="utf-8")
    # Rows with the same captions as another share a prompt: it is correct to send it again.
    shared = len(rows) - len({fill(prompt, captions(row)) for row in rows})
    result = {
        "rows": len(found),
        "each_row_once_in_order": ours == rows,
        "finished_rows_asked_for_again": twice,
        "rows_that_share_a_prompt": shared,
        "seconds": seconds,
        "events": events,
        "injected": dict(proxy.injected),
        "answers_of_the_server": len(proxy.answered),
        "status": report["status"],
        "rejected": report["rejected"],
        "tokens": report["tokens"],
        "log_lines_of_troubles": [line for line in log.splitlines() if "server:" in line][:40],
        "last_log_lines": [line for line in log.splitlines() if line.strip()][-8:],
        "server": "transformers serve (plain generation), a Llama of 1 million parameters",
        "client_command": " ".join(map(str, command[1:])).replace(str(ROOT), "."),
        **environment(),
    }
    write_json(RESULTS / "rewrite_server.json", result)
    print(json.dumps(result, indent=2))


def captions(row: dict) -> dict:
    return {"raw": " ".join(row["laion_2b"].split()), "synthetic": " ".join(row["laion_coco"].split())}


def train_fuse_llm(rows: list[dict], folder: Path, steps: int = 240) -> dict:
    """A small LLM trained on the official fused captions with the published prompt."""
    prompt = load_prompt("fuse")
    pairs = [(fill(prompt, captions(row)), row["capsfuion_official"]) for row in rows]
    return small_llm.train(pairs, folder, steps=steps, batch_size=16)


if __name__ == "__main__":
    main()

"""infer.py and rewrite.py on a Ray cluster: what dies is replaced, each row is there once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from llm_server import LLMServer, fused, write_rows
from PIL import Image

pytest.importorskip("ray", reason="--engine ray needs Ray, of requirements-dev.txt")
QUIET = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
IMAGES, SHARD = 240, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(IMAGES):
        Image.new("RGB", (40, 30), (n * 7 % 256, n * 31 % 256, n * 57 % 256)).save(folder / f"{n:04}.jpg")
    return folder


@pytest.fixture(scope="module")
def expected(model, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("local") / "o.jsonl"
    tiny.run("infer.py", *command(model, photos, output))
    return rows(output)


def command(model, photos, output, *more):
    return [
        photos, "--model_name_or_path", model, "--num_beams", 4, "--max_new_tokens", 12, "--min_new_tokens", 12,
        "--per_device_eval_batch_size", 2, "--shard_size", SHARD, "--output", output, *more,
    ]  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(output) -> dict:
    found = Path(f"{output}.shards").glob("0*.parquet")
    return {path.name: path.stat().st_mtime_ns for path in found}


def wait_for(count: int, output, process) -> dict:
    deadline = time.time() + 400
    while len(files(output)) < count:
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.05)
    return files(output)


def actors(of: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if process.name().startswith("ray::Actor"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_killed_driver_resumes(model, photos, expected, tmp_path):
    output = tmp_path / "o.jsonl"
    process = tiny.start("infer.py", *command(model, photos, output, "--engine", "ray", "--workers", 2), **QUIET)
    wait_for(2, output, process)
    actors(process.pid)[0].kill()
    kept = wait_for(6, output, process)
    workers = actors(process.pid)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert "a worker has died, another takes its place" in err
    assert len(kept) < IMAGES // SHARD
    assert not psutil.wait_procs(workers, timeout=60)[1]  # they end a little after the driver, and may finish a shard
    kept = files(output)
    result = tiny.run("infer.py", *command(model, photos, output, "--engine", "ray", "--workers", 1), **QUIET)
    assert f"{IMAGES} images, {SHARD * len(kept)} of them done before" in result.stderr
    assert rows(output) == expected
    assert kept.items() <= files(output).items()


@pytest.fixture
def nodes(tmp_path):
    """(address, processes) of a head without CPUs for workers, and of two nodes with one each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
    ray += ["--object-store-memory", str(80 * 2**20)]
    head = ["--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"]
    started = []
    try:
        for number, words in enumerate((head, *[["--address", address, "--num-cpus", "1"]] * 2)):
            place = tmp_path / f"node{number}.log"
            with open(place, "w", encoding="utf-8") as log:
                started.append(
                    subprocess.Popen(
                        [*ray, *words], env={**os.environ, **QUIET}, stdout=log, stderr=log, start_new_session=True
                    )
                )
            deadline = time.time() + 200
            while "Ray runtime started" not in place.read_text():
                assert started[-1].poll() is None, place.read_text()
                assert time.time() < deadline
                time.sleep(0.1)
        yield address, started
    finally:
        for process in started:
            kill_node(process)


def kill_node(process) -> None:
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            try:
                child.kill()
            except psutil.Error:
                continue
    process.wait()


@pytest.mark.slow
def test_one_of_two_nodes_is_killed_and_nothing_is_lost(model, photos, expected, nodes, tmp_path):
    address, started = nodes
    output = tmp_path / "o.jsonl"
    where = {**QUIET, "RAY_ADDRESS": address}
    process = tiny.start("infer.py", *command(model, photos, output, "--engine", "ray", "--workers", 2), **where)
    wait_for(3, output, process)
    kill_node(started[2])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "a worker has died" in err
    assert rows(output) == expected


@pytest.mark.slow
def test_what_is_missing_is_said_before_anything_is_waited_for(model, photos, tmp_path):
    ray = ["--engine", "ray"]
    began = time.time()
    result = tiny.run(
        "infer.py", *command(model, photos, tmp_path / "a", *ray), fails=True, **QUIET, RAY_ADDRESS="127.0.0.1:9"
    )
    assert "RAY_ADDRESS=127.0.0.1:9: nothing answers there" in result.stderr
    result = tiny.run(
        "infer.py", *command(model, photos, tmp_path / "a", *ray, "--gpus_per_worker", 1), fails=True, **QUIET
    )
    assert "1 GPUs are wanted, and the cluster has 0" in result.stderr
    (tmp_path / "none").mkdir()  # so that it is a worker that finds no model
    result = tiny.run("infer.py", *command(tmp_path / "none", photos, tmp_path / "a", *ray), fails=True, **QUIET)
    assert str(tmp_path / "none") in result.stderr.splitlines()[-1]
    assert time.time() - began < 300
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_rewrite_py_asks_no_answered_row_again_when_workers_and_driver_are_killed(tmp_path):
    source, output = write_rows(tmp_path, 400), tmp_path / "out.jsonl"

    def answer(prompt, request):
        time.sleep(0.05)
        return fused(prompt)

    def answered() -> set[int]:
        lines = (
            line for file in tmp_path.glob("out.jsonl.shards/_answers/*") for line in file.read_text().split("\n")[:-1]
        )
        return {int(re.search(r"Shop (\d+)", json.loads(line)["text"]).group(1)) for line in lines}

    with LLMServer(answer) as server:
        words = [
            "fuse", source, "--output", output, "--llm", "openai:small", "--base_url", server.url, "--concurrency", 2,
            "--rows_per_file", 50, "--engine", "ray", "--workers", 2,
        ]  # fmt: skip
        process = tiny.start("rewrite.py", *words, **QUIET)
        deadline = time.time() + 300
        while len(answered()) < 40:
            assert process.poll() is None, process.communicate()
            assert time.time() < deadline
            time.sleep(0.05)
        actors(process.pid)[0].kill()
        while len(answered()) < 120:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
        time.sleep(3)  # the workers go with it
        kept, asked = answered(), dict(server.paid)
        tiny.run("rewrite.py", *words[:-1], 1, **QUIET)
        again = {int(re.search(r"Shop (\d+)", p).group(1)) for p, n in server.paid.items() if n > asked.get(p, 0)}
        assert not again & kept
        # What was under way when a process died: two rows of each of the three that did.
        assert server.paid.total() - len(server.paid) <= 3 * 2
    assert [row["key"] for row in rows(output)] == list(range(400))

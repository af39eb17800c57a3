"""A model archive behind the real inference toolkit and model server: latency, throughput, and hostile clients.

    python -m benchmarks.speed.serving [--malformed 10000]        (needs make sagemaker-envs; writes results/serving.json)

The model is the quickstart's, with random weights: this measures the server and its handlers around a small model. First
500 valid requests from 8 clients, then malformed ones with valid ones in between, whose answers are compared with
Captioner's own.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT

sys.path.insert(0, str(ROOT / "sagemaker"))

import psutil
import torch
from PIL import Image

import bundle
from captioner import Captioner
from common.files import write_json
from common.provenance import environment
from models.loading import build_model

# The image has an unreleased toolkit 2.7.0; PyPI's (2.6.0) needs a name that transformers 5 no longer has.
SHIM = "import transformers.file_utils as utils; utils.is_tf_available = lambda: False"
START = "from sagemaker_huggingface_inference_toolkit import serving; serving.main()"  # as the image's entry point


def free_port() -> int:
    """Below 32,768: the model server accepts no other."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """The image's server on a free loopback port, with `archive` unpacked as its model folder."""

    def __init__(self, python: str, archive: Path, folder: Path, **variables):
        self.port = free_port()
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "model", filter="data")
        settings = {
            **os.environ, "SAGEMAKER_BASE_DIR": str(folder), "SAGEMAKER_BIND_TO_PORT": str(self.port),
            "SAGEMAKER_MODEL_SERVER_WORKERS": "1", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "28",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TEMP": str(folder),
            "PATH": f"{Path(python).parent}:{os.environ['PATH']}", "LOG_LOCATION": str(folder), **variables,
        }  # fmt: skip
        (folder / "shim").mkdir()
        (folder / "shim/sitecustomize.py").write_text(SHIM, encoding="utf-8")
        settings["PYTHONPATH"] = str(folder / "shim")
        self.log = open(folder / "server.log", "w+", encoding="utf-8")  # noqa: SIM115 - open as long as the server
        self.process = subprocess.Popen(
            [python, "-c", START], cwd=folder, env=settings, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self, seconds: float = 180) -> None:
        """Wait until the worker has loaded its model: /ping answers before that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(b"", {"Content-Type": "application/json"})[0] == 400 and self.worker():
                    return
            time.sleep(0.5)
        self.log.seek(0)
        raise RuntimeError(f"the server did not start:\n{self.log.read()[-5000:]}")

    def ask(self, body: bytes, headers: dict, method="POST", path="/invocations", timeout=60) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def worker(self) -> psutil.Process | None:
        """The Python process with the model: a child of the process that the model server starts."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if all("model_service_worker" in " ".join(p.cmdline()) for p in (process, process.parent())):
                    return process
        return None

    def front(self) -> psutil.Process:
        """The model server, which is written in Java."""
        return next(process for process in self.processes() if process.name() == "java")

    def processes(self):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    yield process

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


# ---------------------------------------------------------------- requests


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def valid_requests(photos: list[bytes]) -> list[tuple[bytes, dict, list[int], str]]:
    """(body, headers, photos in it, kind) for every supported content type."""
    json_type, lines_type = {"Content-Type": "application/json"}, {"Content-Type": "application/jsonlines"}
    several = {"inputs": [as_base64(photo) for photo in photos[:3]]}
    lines = "\n".join(json.dumps({"inputs": as_base64(photo)}) for photo in photos[:2]).encode()
    return [
        *((photo, {"Content-Type": "image/jpeg"}, [i], "image") for i, photo in enumerate(photos[:3])),
        (photos[3], {"Content-Type": "application/x-image"}, [3], "image"),
        (photos[4], {"Content-Type": "application/octet-stream"}, [4], "image"),
        (json.dumps({"inputs": as_base64(photos[5])}).encode(), json_type, [5], "json"),
        (json.dumps({"inputs": f"data:image/jpeg;base64,{as_base64(photos[5])}"}).encode(), json_type, [5], "json"),
        (json.dumps(several).encode(), json_type, [0, 1, 2], "json, three images"),
        (json.dumps(several).encode(), {"Content-Type": "application/json; charset=utf-8"}, [0, 1, 2], "json, three images"),
        (lines, lines_type | {"Accept": "application/jsonlines"}, [0, 1], "jsonlines, two images"),
    ]  # fmt: skip


def only_errors(answer: bytes) -> bool:
    """Whether the answer to JSON lines has no caption."""
    with contextlib.suppress(ValueError):
        return all("error" in json.loads(line) for line in answer.decode().splitlines())
    return False


def captions_of(answer: bytes) -> list[str]:
    return [caption for line in answer.decode().splitlines() for caption in json.loads(line)["captions"]]


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG of that size with only `rows` rows of zeros (default: none), compressed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes((width + 1) * (rows or 0)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


IMAGE_TYPES = ("image/jpeg", "image/png", "application/x-image", "application/octet-stream", "image/webp", "image/gif")
TEXT_TYPES = ("application/json", "application/jsonlines", "application/json;charset=utf-8", "Application/JSON")
ODD_TYPES = ("text/csv", "application/x-npy", "text/plain", "x" * 300, "image", "/", "multipart/form-data; boundary=x")
NUMBERS = (-1, 0, 10**9, 10**400, 1e308, -1e308, float("nan"), float("inf"), True, "5", None, [], {}, 2.5, 1e-320)
WRONG = (None, 3, -1.5, True, "", "x", "=", "AAAA", [], [[]], {}, [None], ["AA", 3], {"b64": "AA"}, "\ud800", "é" * 99)
URLS = (
    "http://127.0.0.1:{port}/a.jpg", "http://localhost:{port}/", "http://169.254.169.254/latest/meta-data/",
    "https://[::1]:{port}/x", "http://2130706433:{port}/", "http://0x7f.1:{port}/", "file:///etc/passwd",
    "http://user:pw@127.0.0.1:{port}/", "ftp://127.0.0.1:{port}/x", "http://[", "http://\u2100.com/x", "gopher://x",
)  # fmt: skip


def malformed_requests(photos: list[bytes], seed: int, trap: int):
    """Endless (body, headers, whether it must be refused); URLs point at the port `trap`."""
    chance = random.Random(seed)
    bombs = [png(60000, 60000), png(30000, 29000), png(20000, 10000, 10000), b"GIF89a" + b"\xff" * 8 + b",",
             b"BM" + struct.pack("<IIIIiiHH", 54, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24) + bytes(24),
             b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\xff"]  # fmt: skip
    small = [as_base64(photo) for photo in photos]

    def noise():
        body = chance.randbytes(int(10 ** chance.uniform(0, 4)))
        return body, {"Content-Type": chance.choice(IMAGE_TYPES + TEXT_TYPES + ODD_TYPES)}, True

    def wrong_type():
        request = {"inputs": chance.choice(WRONG)}
        if chance.random() < 0.5:
            request = {chance.choice(("inputs", "input", "image", "", "parameters")): chance.choice(WRONG)}
        return json.dumps(request).encode(), {"Content-Type": "application/json"}, True

    def wrong_parameter():
        names = ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty", "prompt",
                 "no_repeat_ngram_size", "return_scores", "do_sample", "__class__", "model", "\ud800")  # fmt: skip
        parameters = {chance.choice(names): chance.choice((*NUMBERS, *WRONG)) for _ in range(chance.randint(1, 3))}
        whole = chance.choice((parameters, parameters, chance.choice([3, "x", [1]])))
        return json.dumps({"inputs": chance.choice(small), "parameters": whole}).encode(), {"Content-Type": "application/json"}, False  # fmt: skip

    def bomb():
        content = chance.choice(bombs)
        if chance.random() < 0.5:
            return content, {"Content-Type": chance.choice(IMAGE_TYPES)}, True
        return json.dumps({"inputs": [as_base64(content)]}).encode(), {"Content-Type": "application/json"}, True

    def truncated():
        content = chance.choice(photos)
        content = content[: chance.randrange(len(content) // 2)]
        return content, {"Content-Type": chance.choice(IMAGE_TYPES)}, True

    def damaged():
        content = bytearray(chance.choice(photos))
        for _ in range(chance.randint(1, 40)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content), {"Content-Type": chance.choice(IMAGE_TYPES)}, False  # a decoder may still read it

    def deep():
        opening, closing = chance.choice((("[", "]"), ('{"inputs":', "}"), ('{"inputs":[', "]}")))
        times = chance.choice((50, 5000, 100_000))
        body = opening * times + chance.choice(("", "0" + closing * times))
        return body.encode(), {"Content-Type": chance.choice(TEXT_TYPES[:2])}, True

    def not_text():
        body = chance.choice(
            (b'{"inputs": "\xff\xfe"}', b"\xef\xbb\xbf{}", b"\x00", b'{"inputs"', b"NaN", b"[" + b"9" * 9999 + b"]")
        )
        return body, {"Content-Type": chance.choice(("application/json", "application/json; charset=utf-16"))}, True

    def url():
        address = chance.choice(URLS).replace("{port}", str(trap))
        return json.dumps({"inputs": [address]}).encode(), {"Content-Type": "application/json"}, True

    def too_many():
        inputs = chance.choice(([small[0]] * 17, [], ["AAAA"] * 5000))
        return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}, True

    def odd_accept():
        accept = chance.choice(("text/html", "image/png", "x" * 500, "\xff\xfe", "application/xml;q=0.9"))
        return photos[0], {"Content-Type": chance.choice(IMAGE_TYPES), "Accept": accept}, True

    def odd_headers():
        """Printable and Latin-1 characters of any length; the Accept header may happen to be valid."""
        letters = [chr(code) for code in (*range(32, 127), *range(160, 256))]
        text = "".join(chance.choices(letters, k=int(10 ** chance.uniform(0, 2.8)))).strip()
        if chance.random() < 0.5:
            accept = chance.choice(
                ("application/json, {}", "*/*;{}", "application/json;{}", "{}, application/jsonlines")
            )
            headers = {"Content-Type": "image/jpeg", "Accept": accept.format(text)}
            return photos[0], headers | {"X-Amzn-SageMaker-Custom-Attributes": text}, False
        kind = chance.choice(("{}", "{}/json", "image{}", "application/json; charset={}", "application/{}"))
        return b"x", {"Content-Type": kind.format(text)}, True

    def form():
        """Form data as from a browser: the model server parses such bodies itself."""
        content = chance.choice((photos[0], b"", chance.randbytes(99)))
        part = chance.choice(
            (b'form-data; name="body"', b'form-data; name="image"; filename="a.jpg"', b"form-data", b"", b"x")
        )
        body = b"--x\r\nContent-Disposition: " + part + b"\r\n\r\n" + content + b"\r\n--x--\r\n"
        body = body[: chance.randrange(len(body))] if chance.random() < 0.5 else body
        kind = chance.choice(
            ("multipart/form-data; boundary=x", "multipart/form-data; boundary=y", "multipart/mixed; boundary=x")
        )
        if chance.random() < 0.3:
            body = chance.choice((b"inputs=AAAA", b"body=%zz", b"%", b"=&=&", b"a" * 9999, chance.randbytes(99)))
            kind = "application/x-www-form-urlencoded"
        return body, {"Content-Type": kind}, True

    def empty():
        return b"", {"Content-Type": chance.choice(IMAGE_TYPES + TEXT_TYPES)}, True

    kinds = (
        noise,
        wrong_type,
        wrong_parameter,
        bomb,
        truncated,
        damaged,
        deep,
        not_text,
        url,
        too_many,
        odd_accept,
        odd_headers,
        form,
        empty,
    )
    while True:
        yield chance.choice(kinds)()


# ---------------------------------------------------------------- traffic


def measure(server: Server, requests: list, clients: int, count: int, check) -> dict:
    """Latency and throughput of `count` requests from `requests`, sent by this many clients; every answer is checked."""

    def one(index):
        body, headers, members, _kind = requests[index % len(requests)]
        start = time.perf_counter()
        status, answer = server.ask(body, headers)
        seconds = time.perf_counter() - start
        check(status, answer, members)
        return seconds, len(members)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(one, range(count)))
    wall = time.perf_counter() - start
    seconds = sorted(duration for duration, _ in done)
    return {
        "clients": clients,
        "requests": count,
        "images": sum(images for _, images in done),
        "requests_per_second": round(count / wall, 2),
        "images_per_second": round(sum(images for _, images in done) / wall, 2),
        "p50_ms": round(1000 * statistics.median(seconds), 1),
        "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
    }


def attack(server: Server, photos: list[bytes], count: int, clients: int, check, seed: int = 0) -> dict:
    """Send `count` malformed requests, and after every 500 the valid ones, which are checked; return statuses, memory in
    MiB and wrong answers. The model server itself answers an invalid form with 500, before any handler: these are counted."""
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.setblocking(False)
        generator = malformed_requests(photos, seed, trap.getsockname()[1])
        worker, front = server.worker(), server.front()
        faults, statuses, memory, front_memory = [], collections.Counter(), [], []
        valid = valid_requests(photos)
        slowest = 0.0

        def one(request):
            body, headers, refused = request
            start = time.perf_counter()
            try:
                status, answer = server.ask(body, headers)
            except (OSError, http.client.HTTPException) as error:
                return repr(error), request, 0.0
            if status == 500 and b'"ErrorDataDecoderException"' in answer and "form" in headers["Content-Type"]:
                return "500 of a form", None, time.perf_counter() - start
            wrong = status >= 500 or (refused and not (400 <= status < 500 or only_errors(answer)))
            return status, (request[1], body[:200], answer[:300]) if wrong else None, time.perf_counter() - start

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            for begin in range(0, count, 500):
                batch = [next(generator) for _ in range(min(500, count - begin))]
                for status, fault, seconds in pool.map(one, batch):
                    statuses[str(status)] += 1
                    slowest = max(slowest, seconds)
                    if fault:
                        faults.append((status, fault))
                for body, headers, members, _ in valid:
                    check(*server.ask(body, headers), members)
                memory.append(round(worker.memory_info().rss / 2**20))
                front_memory.append(round(front.memory_info().rss / 2**20))
        with contextlib.suppress(BlockingIOError):
            trap.accept()
            faults.append(("a URL was fetched", None))
        same = server.worker()
        return {
            "requests": count,
            "statuses": dict(statuses),
            "faults": faults,
            "worker_restarted": same is None or same.pid != worker.pid,
            "memory_mib": memory,
            "front_memory_mib": front_memory,
            "slowest_seconds": round(slowest, 2),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--envs", default=os.environ.get("SAGEMAKER_ENVS", ROOT / ".venv-sagemaker"))
    args = parser.parse_args()
    python = str(Path(args.envs, "platform/bin/python"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        words = [f"{a} {b} near a {c}" for a in ("red", "blue") for b in ("circle", "star") for c in ("square", "road")]
        model, processor = build_model(str(ROOT / "recipes/quickstart/model.json"), None, words)
        make_sensitive(model)
        model.save_pretrained(folder / "trained")
        processor.save_pretrained(folder / "trained")
        captioner = Captioner.from_pretrained(str(folder / "trained"), device="cpu")
        photos = distinct_photos(captioner)
        expected = captioner(photos)
        bundle.pack_model(folder / "trained", folder / "model.tar.gz")
        server = Server(python, folder / "model.tar.gz", folder)
        try:
            server.wait()
            check = checker(expected)
            requests = valid_requests(photos)
            measure(server, requests, 1, 20, check)  # warm-up
            result = {"parameters": sum(p.numel() for p in model.parameters())}
            for kind in dict.fromkeys(request[3] for request in requests):
                some = [request for request in requests if request[3] == kind]
                result[f"one client, {kind}"] = measure(server, some, 1, 60, check)
            result["eight clients, all kinds"] = measure(server, requests, 8, 500, check)
            result["malformed"] = attack(server, photos, args.malformed, 8, check)
        finally:
            server.stop()
    result["malformed"]["faults"] = [repr(fault) for fault in result["malformed"]["faults"][:20]]
    write_json(RESULTS / "serving.json", result | environment())
    print(json.dumps(result, indent=2))


def make_sensitive(model) -> None:
    """Random weights hardly look at the image. Amplify it, so that mixed-up answers are noticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crossattention" in name and name.endswith(("value.weight", "dense.weight")):
                parameter.mul_(8)


def distinct_photos(captioner, count: int = 8) -> list[bytes]:
    """JPEG files of smooth noise, of several sizes, with at least three different captions by `captioner`."""
    distinct: dict[str, bytes] = {}
    others: list[bytes] = []
    for seed in range(60):
        pixels = random.Random(seed).randbytes(4 * 3 * 3)
        image = Image.frombytes("RGB", (4, 3), pixels).resize((200 + seed % 7 * 40, 150 + seed % 7 * 30))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        caption = captioner([file.getvalue()])[0]
        others += [file.getvalue()] if caption in distinct else []
        distinct.setdefault(caption, file.getvalue())
        if len(distinct) == count:
            break
    assert len(distinct) >= 3, "the model says the same for every image"
    return [*distinct.values(), *others][:count]


def checker(expected: list[str]):
    def check(status: int, answer: bytes, members: list[int]) -> None:
        assert status == 200, answer
        assert captions_of(answer) == [expected[index] for index in members], answer

    return check


if __name__ == "__main__":
    main()

"""What infer.py itself costs around a server that answers at once: CPU time and memory per image, and pictures prepared per second.

    python -m benchmarks.speed.server_overhead --photos FOLDER [--counts 1000 100000]

The server is another process, which reads a request and sends the same answer every time. The images are links to eight photographs
made 96 pixels wide, so that little of the time is that of decoding; `prepared` is what decoding costs: photographs of 12 megapixels,
made 384 pixels long and compressed, in as many threads as there are cores. CPU time is that of infer.py's process alone, user and
system, less that of a run over 8 images (`start`), and its peak memory that of all its pages.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, write_result
from common.limits import cpus

SERVER = """
import asyncio, json
body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason":
    "stop", "message": {"role": "assistant", "content": "a man rides a horse"}}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}}).encode()
answer = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body)
async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\\r")[0]))
            writer.write(answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
SMALL, LARGE, SIDE, PREPARED = 96, (4000, 3000), 384, 48


def small_photos(photos: list[Path], folder: Path) -> list[Path]:
    from PIL import Image

    folder.mkdir()
    small = []
    for photo in photos:
        with Image.open(photo) as image:
            image.thumbnail((SMALL, SMALL))
            small.append(folder / photo.name)
            image.save(small[-1], "JPEG", quality=90)
    return small


def links(small: list[Path], count: int, folder: Path) -> Path:
    """A folder of so many images, a thousand in each of its folders."""
    for number in range(count):
        place = folder / f"{number // 1000:03}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(small[number % len(small)], place / f"{number:06}.jpg")
    return folder


def cost_of_run(images: Path, output: Path, port: int) -> dict:
    """CPU seconds, wall seconds and peak MiB of infer.py."""
    words = [
        images,
        "--output",
        output,
        "--model_name_or_path",
        "openai:m",
        "--base_url",
        f"http://127.0.0.1:{port}/v1",
    ]
    command = [sys.executable, "infer.py", *map(str, words)]
    started, peak = time.perf_counter(), [0.0]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)

    def watch():
        status = Path(f"/proc/{process.pid}/status")
        while process.returncode is None:
            lines = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
            peak[0] = max(peak[0], *(int(line.split()[1]) / 2**10 for line in lines), 0)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    assert process.returncode == 0
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - started, "mib": peak[0]}


def prepared_per_second(photos: list[Path], folder: Path) -> dict:
    """Pictures per second of wall and of CPU time, with and without --fast_jpeg."""
    from PIL import Image

    from arguments import ImageServerArguments
    from captioning.server import ServerCaptioner

    folder.mkdir()
    large = [folder / photo.name for photo in photos]
    for photo, place in zip(photos, large, strict=True):
        with Image.open(photo) as image:
            image.resize(LARGE, Image.Resampling.BICUBIC).save(place, "JPEG", quality=90)
    rates = {}
    for fast in (False, True):
        captioner = ServerCaptioner(
            "m", ImageServerArguments(base_url="http://127.0.0.1:9/v1", max_side=SIDE), fast_jpeg=fast
        )
        samples = [{"image": str(large[n % len(large)]), "image_id": n} for n in range(PREPARED)]
        wall, cpu = time.perf_counter(), time.process_time()
        assert all(picture.error is None for picture in captioner._ahead(samples, cpus()))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rates["fast_jpeg" if fast else "plain"] = {
            "images_per_second": PREPARED / wall,
            "cpu_ms_per_image": 1000 * cpu / PREPARED,
        }
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs; the first 8 by name")
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 100_000])
    parser.add_argument("--output", type=Path, default=RESULTS / "server_overhead.json")
    arguments = parser.parse_args()
    photos = sorted(arguments.photos.rglob("*.jpg"))[:8]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = small_photos(photos, folder / "small")
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline())
            start = cost_of_run(links(small, 8, folder / "8"), folder / "8.jsonl", port)
            runs = {}
            for count in arguments.counts:
                run = cost_of_run(links(small, count, folder / str(count)), folder / f"{count}.jsonl", port)
                runs[count] = {
                    "cpu_ms_per_image": 1000 * (run["cpu"] - start["cpu"]) / count,
                    "peak_mib": run["mib"],
                    "mib_more_than_start": run["mib"] - start["mib"],
                }
                print(count, runs[count], flush=True)
        finally:
            server.terminate()
            server.wait()
        prepared = prepared_per_second(photos, folder / "large")
    write_result(arguments.output, {"start": start, "images": runs, "prepared": prepared, "cores": cpus()})


if __name__ == "__main__":
    main()

"""docs/bulk.md: each of its commands run to its end, with tiny models, a server of the tests' own, and two workers for eight."""

import json
import re
import shlex
import tarfile

import families
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import ROOT
from llm_server import LLMServer, coloured
from PIL import Image

pytest.importorskip("ray", reason="--engine ray needs Ray, of requirements-dev.txt")
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "docs/bulk.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
QUIET = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def write_sources(folder):
    """photos/, captions.csv of them, and shards/ of tars, eleven pictures each."""
    (folder / "photos").mkdir()
    (folder / "shards").mkdir()
    lines = ["image,caption,split"]
    for number in range(11):
        Image.new("RGB", (40, 30), (20 * number, 90, 30)).save(folder / f"photos/{number:02}.png")
        lines += [f"photos/{number:02}.png,a dog runs on the grass,test", f"photos/{number:02}.png,two men,test"]
        with tarfile.open(folder / f"shards/{number // 4}.tar", "a") as tar:
            tar.add(folder / f"photos/{number:02}.png", f"{number:02}.png")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def captions_in(place):
    if (place / "captions").is_dir():
        return pq.read_table(place / "captions").to_pylist()
    return [json.loads(line) for line in (place / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "blip").mkdir()
    blip = tiny.build_folder(tmp_path / "blip")
    for part in families.build("llava"):
        part.save_pretrained(tmp_path / "vlm")
    of_page = {"Qwen/Qwen2-VL-2B-Instruct": str(tmp_path / "vlm"), "8": "2"}
    (tmp_path / "runs").mkdir()
    with LLMServer(coloured) as server:
        of_page["http://localhost:8000/v1"] = server.url
        environment = QUIET | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-any"}
        for number, command in enumerate(COMMANDS):
            words = shlex.split(command)
            script = next(word for word in words if word.endswith(".py"))
            launcher, words = words[: words.index(script)], words[words.index(script) + 1 :]
            if "--model_name_or_path" not in words and "--compare" not in words:
                words += ["--model_name_or_path", str(blip)]
            place = tmp_path / (
                "1" if "--only" in words else str(number)
            )  # the second command's captions are asked again
            place.mkdir(exist_ok=True)
            for at, word in enumerate(words):
                if re.match(r"(photos|shards|captions|runs)[/.]", word):
                    words[at] = str((place if re.match(r"captions(/|\.jsonl)", word) else tmp_path) / word)
            paid = server.paid.total()
            words = [of_page.get(word, word) for word in words]
            done = tiny.run(script, *words, processes=2 if "torchrun" in launcher else 1, **environment)
            assert "Traceback" not in done.stderr, command
            if "--dry_run" in words:
                assert "at most about" in done.stdout
                assert server.paid.total() == paid
            elif script == "infer.py":
                rows = captions_in(place)
                assert len({row["image"] for row in rows}) == len(rows) == 11, command
                assert all(row["caption"] for row in rows), command
            if "--only" in words:
                assert "images are captioned again" in done.stderr

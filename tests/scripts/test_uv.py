"""infer.py as a uv script: its header names what it needs, in the versions of constraints.txt, and uv runs it without a network."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
HEADER = re.match(r"# /// script\n(.*?)# ///\n", (ROOT / "infer.py").read_text(encoding="utf-8"), re.DOTALL)[1]
SCRIPT = tomllib.loads(re.sub(r"(?m)^# ?", "", HEADER))


def test_the_header_has_the_versions_that_the_tests_run_with():
    pinned = {line.split(" ")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert set(SCRIPT["dependencies"]) <= pinned
    assert {"torch", "transformers"} < {name.partition("==")[0] for name in SCRIPT["dependencies"]}


def settings(folder) -> dict:
    """uv's variables for where pip looks, which uv does not read, and its environments in `folder`."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pip = dict(re.findall(r"(?m)^(?::env:|global)\.([\w-]+)='(.*)'$", listed))
    places = {"UV_INDEX": pip.get("extra-index-url"), "UV_FIND_LINKS": pip.get("find-links", "").replace(" ", ",")}
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {name: value for name, value in places.items() if value} | {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    return variables | {"UV_PYTHON": sys.executable, "UV_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_uv_runs_it_offline_in_an_environment_of_its_own(tmp_path):
    uv = shutil.which("uv")
    if not uv:
        pytest.skip("no uv on PATH (pip install uv)")
    variables = settings(tmp_path)
    if not {"UV_INDEX", "UV_FIND_LINKS"} & variables.keys():
        pytest.skip("pip has no index with builds of torch for the CPU: uv would fetch those for CUDA, some gigabytes")
    script = ROOT / "infer.py"
    filled = subprocess.run([uv, "sync", "--script", script], env=variables, capture_output=True, text=True)
    if filled.returncode:
        pytest.skip(f"uv's cache cannot be filled here: {filled.stderr[-200:]}")
    model = tiny.build_folder(tmp_path)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    words = ["photo.png", "--model_name_or_path", model]
    offline = [uv, "run", "--offline", "--script", script, *words]
    done = subprocess.run(offline, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == here.stdout
    assert done.stdout.startswith("photo.png\t")

"""The structure that README promises: who may import whom, how long a script's functions are, no symbolic links."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# A room may import itself and the rooms named for it. Nothing imports a script or sagemaker.
BELOW = ["common"]
FREE = {
    "common": [],
    "jobs": BELOW,
    "drawn_scenes": BELOW,
    "data": [*BELOW, "drawn_scenes"],
    "metrics": [*BELOW, "data"],  # a CLIP-based score looks at images
    "captioning": [*BELOW, "jobs", "data", "metrics"],
    "models": BELOW,
    "collator": ["common", "data", "models"],
    "captioner": ["common", "data", "models", "metrics", "collator"],
    "objectives": ["common", "data", "models", "metrics", "collator", "captioner"],
    "rewriting": [*BELOW, "jobs", "data", "models", "metrics", "captioner"],
    "reports": [
        *BELOW,
        "drawn_scenes",
        "data",
        "models",
        "metrics",
        "collator",
        "captioner",
        "objectives",
        "arguments",
    ],
    "training": ["common", "data", "models", "metrics", "collator", "captioner", "objectives", "arguments"],
}
SCRIPTS = ["train", "evaluate", "infer", "rewrite", "demo", "serve", "export"]
PAGE = 65
LONGEST_MAIN = {"train": 50, "evaluate": 60}
ROOMS = {*FREE, *SCRIPTS, "sagemaker", "benchmarks", "tests", "demo_page"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", FREE)
def test_a_room_imports_only_those_below_it(room):
    for path in sources(room):
        ours = imports(path) & (ROOMS | {"arguments"}) - {room}
        if path.parent.name == "coco_caption":
            ours -= {"evaluate"}  # the library, where this file runs as its module
        assert ours <= set(FREE[room]), f"{path.relative_to(ROOT)} imports {sorted(ours - set(FREE[room]))}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_table_of_contents(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = LONGEST_MAIN.get(script, 40) if node.name == "main" else 40
            assert length <= limit, f"{script}.py: {node.name} has {length} lines, {limit} are allowed"


@pytest.mark.parametrize("room", [*FREE, "demo_page"])
def test_no_function_is_longer_than_a_page(room):
    """Its body: flags and docstring may take their own."""
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                length = node.end_lineno - node.body[1 if documented else 0].lineno + 1
                assert length <= PAGE, f"{path.relative_to(ROOT)}: {node.name} has {length} lines, {PAGE} are allowed"


def test_there_is_no_symbolic_link():
    """Windows clones and ZIP downloads turn one into a text file."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


def test_an_endpoint_installs_what_requirements_txt_allows():
    """The bounds there are tested ones (make test-oldest)."""

    def bounds(file: str) -> dict[str, str]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        return {re.split(r"[<>=]", line)[0]: line for line in lines if line}

    ours, served = bounds("requirements.txt"), bounds("sagemaker/requirements-serving.txt")
    assert {name: ours.get(name) for name in served} == served

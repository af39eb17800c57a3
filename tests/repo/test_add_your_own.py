"""README's "Add your own", followed in a copy of the repo: a format, an augmentation, an objective, a score."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

FOLDERS = ("common", "drawn_scenes", "data", "models", "objectives", "metrics", "training", "reports")

FORMAT = '''"""Lines of FILE|CAPTION."""

from data.rows import Row

NAME, ABOUT = "pipes", "a .pipes file of FILE|CAPTION lines"


def matches(path):
    return path.suffix == ".pipes"


def read(part, options):
    for number, line in enumerate(open(part.place, encoding="utf-8"), 1):
        name, caption = line.rstrip().split("|")
        yield Row(f"{part.place}, line {number}", name, [caption], name=name)
'''
OBJECTIVE = """from objectives.cross_entropy import caption_loss


class Doubled:
    def __call__(self, model, batch, num_items_in_batch=None):
        loss = 2 * caption_loss(model, batch, num_items_in_batch=num_items_in_batch)
        return {"loss": loss, "half": loss.detach() / 2}
"""
PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from PIL import Image
import data
from arguments import BEST, MetricArguments
from objectives import build_objective
from reports.outputs import score_captions, summary

records = data.load(sys.argv[1], all_as="train")["train"]
print("captions", sorted(captions[0] for captions in records["captions"]))
print("pixel", data.Augmentation(["invert"])(Image.new("RGB", (4, 4), (255, 0, 0)), 0, "1").getpixel((0, 0)))
print("objective", type(build_objective(SimpleNamespace(objective="doubled"), None, None, None)).__name__, BEST["doubled"])
quiet = MetricArguments(meteor=False, spice=False, bootstrap_samples=0)
scores, rows = score_captions({"1": "a dog runs"}, {"1": ["a dog runs"]}, quiet, 0)
print("score", scores["words"], "  words " in summary(scores))
"""


def edit(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    repo = tmp_path_factory.mktemp("repo")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, repo)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, repo / folder, ignore=shutil.ignore_patterns("__pycache__"))

    (repo / "data/formats/pipes.py").write_text(FORMAT, encoding="utf-8")
    edit(repo / "data/formats/__init__.py", "parquet, saved, scenes,", "parquet, pipes, saved, scenes,")
    edit(repo / "data/formats/__init__.py", "FORMATS = (hub,", "FORMATS = (pipes, hub,")

    edit(repo / "data/augmentation.py", "FORMS = {  #", 'FORMS = {\n    "invert": ("", 0, lambda: True, ""),  #')
    edit(
        repo / "data/augmentation.py",
        "OPERATIONS = {  # function",
        'OPERATIONS = {\n    "invert": lambda image, rng: image.point(lambda value: 255 - value),  # function',
    )

    (repo / "objectives/doubled.py").write_text(OBJECTIVE, encoding="utf-8")
    edit(
        repo / "objectives/__init__.py",
        "from objectives.dico",
        "from objectives.doubled import Doubled\nfrom objectives.dico",
    )
    edit(
        repo / "objectives/__init__.py",
        '    if args.objective == "cross_entropy":\n        return CrossEntropy',
        '    if args.objective == "doubled":\n        return Doubled()\n'
        '    if args.objective == "cross_entropy":\n        return CrossEntropy',
    )
    edit(repo / "arguments.py", "BEST = {", 'BEST = {"doubled": "CIDEr", ')

    edit(repo / "metrics/names.py", 'Score("SPIDEr",', 'Score("words", "Words per caption"),\n        Score("SPIDEr",')
    edit(
        repo / "reports/outputs.py",
        "    if scorers:\n",
        '    metrics["words"] = sum(len(text.split()) for text in predictions.values()) / len(predictions)\n    if scorers:\n',
    )

    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(repo / f"{number}.png")
    (repo / "set.pipes").write_text("0.png|a red square\n1.png|a blue square\n", encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, str(repo / "set.pipes")]
    environment = {**os.environ, "HF_HOME": str(repo / "cache"), "PYTHONPATH": ""}
    run = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_format(printed):
    assert "captions ['a blue square', 'a red square']" in printed


def test_an_augmentation(printed):
    assert "pixel (0, 255, 255)" in printed


def test_an_objective(printed):
    assert "objective Doubled CIDEr" in printed


def test_a_score_is_in_the_summary(printed):
    assert "score 3.0 True" in printed

"""docs/add-your-own.md, applied as it stands to a copy of the repo, which then trains, scores and captions with what was added."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from PIL import Image

FOLDERS = (
    "common", "drawn_scenes", "data", "models", "objectives", "metrics", "training", "reports", "captioning", "jobs",
    "rewriting", "recipes",
)  # fmt: skip
TEN = [
    f"{size} {colour} {shape}"
    for size in ("big", "small")
    for colour in ("red", "blue")
    for shape in ("dot", "bar", "star")
]
# The scripts, in one process: each would take seconds to import the libraries anew.
PROGRAM = """
import json, runpy, sys
import data
from PIL import Image

print("pixel", data.Augmentation(["invert"])(Image.new("RGB", (4, 4), (255, 0, 0)), 0, "1").getpixel((0, 0)))
seen = []
augment = data.Augmentation.__call__
data.Augmentation.__call__ = lambda self, *args: seen.append(self.operations) or augment(self, *args)
for script, *words in json.loads(sys.argv[1]):
    for name in ("train", "evaluate", "infer", "rewrite"):
        sys.modules.pop(name, None)
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
print("augmented", len(seen) > 10)
"""


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, file, what is in it) of every block of code whose first line names a file."""
    return re.findall(r"^```(\w+)\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def edit(path, hunk: str) -> None:
    """Applies lines that begin with a blank, - or +, as in a diff."""
    lines = hunk.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = tmp_path_factory.mktemp("repo")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, repo)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, repo / folder, ignore=shutil.ignore_patterns("__pycache__"))
    added = blocks((ROOT / "docs/add-your-own.md").read_text(encoding="utf-8"))
    assert len(added) == 9
    for language, file, content in added:
        if language == "python":
            assert not (repo / file).exists()
            (repo / file).write_text(content, encoding="utf-8")
        else:
            for hunk in content.split("@@\n"):
                edit(repo / file, hunk)
    for number in range(len(TEN)):
        Image.effect_noise((32, 32), number + 1).convert("RGB").save(repo / f"{number}.png")
    lines = [f"{number}.png|a {caption}" for number, caption in enumerate(TEN)]
    (repo / "set.pipes").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return repo


@pytest.fixture(scope="module")
def printed(repo):
    quiet = [
        "--meteor",
        "false",
        "--spice",
        "false",
        "--bootstrap_samples",
        "0",
        "--num_beams",
        "1",
        "--max_new_tokens",
        "5",
    ]
    data = ["set.pipes", "--split_shares", "0.5,0.25,0.25", *quiet]
    trained = ["--objective", "focal", "--augment", "invert", "--metric_for_best_model", "WordPrecision"]
    model = ["--model_config", str(tiny.write_config(repo)), "--output_dir", "run", "--num_train_epochs", "2"]
    scripts = [
        ["train.py", *data, *trained, *model, "--logging_steps", "1", "--gradient_checkpointing", "false"],
        ["evaluate.py", *data, "--model_name_or_path", "run", "--output_dir", "scores", "--report", "false"],
        ["infer.py", "set.pipes", "--model_name_or_path", "run", *quiet[6:], "--output", "captions.jsonl"],
        ["rewrite.py", "paragraph", "set.pipes", "--llm", "openai:m", "--dry_run"],
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(scripts)]
    environment = {**os.environ, "HF_HOME": str(repo / "cache"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_a_format_is_read_by_every_script(repo, printed):
    out, err = printed
    assert f"set.pipes (pipes detected): {len(TEN)} images" in err
    rows = [json.loads(line) for line in (repo / "captions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{number}.png" for number in range(len(TEN))]
    assert all(row["caption"] is not None for row in rows)
    assert f"{len(TEN)} rows" in out  # rewrite.py's estimate


def test_an_augmentation_is_seen(printed):
    assert "pixel (0, 255, 255)\n" in printed[0]
    assert "augmented True\n" in printed[0]


def test_an_objective_is_trained_and_what_it_returns_is_logged(repo, printed):
    history = json.loads((repo / "run/trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(0 < row["confidence"] < 1 for row in history if "loss" in row)


def test_a_score_is_trained_with_and_shown(repo, printed):
    history = json.loads((repo / "run/trainer_state.json").read_text())["log_history"]
    assert all(0 <= row["eval_WordPrecision"] <= 1 for row in history if "eval_CIDEr" in row)
    assert "validation Word precision 0." in printed[1] or "validation Word precision 1." in printed[1]
    scores = [json.loads((repo / folder / "coco_metrics.json").read_text()) for folder in ("run", "scores")]
    assert scores[0]["WordPrecision"] == scores[1]["WordPrecision"]
    assert printed[1].count("  Word precision ") == 3  # of two splits, and of evaluate.py
    assert "Word precision, validation" in (repo / "run/training_curves.svg").read_text()
    assert "| Word precision |" in (repo / "run/README.md").read_text()
    assert "Word precision" in (repo / "run/report.html").read_text()

"""metrics/coco_caption, as people load it: in a process of their own that knows nothing of this repository."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

FOLDER = ROOT / "metrics/coco_caption"
SUBJECTS = ["a dog", "two dogs", "a man", "the woman", "a small cat", "three red stars", "a blue circle"]
ACTIONS = ["runs on grass", "sits near the road", "jumps in water", "with a ball", "under a tree"]
REFERENCES = [
    [f"{SUBJECTS[i % 7]} {ACTIONS[(i * j) % 5]}." for j in range(1, 3 + i % 3)] for i in range(60)
]  # 2 to 4 an image
PREDICTIONS = [f"{SUBJECTS[(i + i // 9) % 7]} {ACTIONS[i % 5]}" for i in range(60)]

LOAD = """
import json, sys, evaluate
path, data, rank, processes = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
metric = evaluate.load(path, process_id=rank, num_process=processes, experiment_id="test", cache_dir="cache")
begin, end = (len(data["predictions"]) * place // processes for place in (rank, rank + 1))
metric.add_batch(predictions=data["predictions"][begin:end], references=data["references"][begin:end])
json.dump(metric.compute(), open(f"scores-{rank}.json", "w"))
"""
EXAMPLE = (ROOT / "docs/reports.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What evaluate.py writes of the same captions."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "predictions.json").write_text(json.dumps({str(i): text for i, text in enumerate(PREDICTIONS)}))
    (folder / "references.json").write_text(json.dumps({str(i): texts for i, texts in enumerate(REFERENCES)}))
    files = ["--predictions", folder / "predictions.json", "--references", folder / "references.json"]
    tiny.run("evaluate.py", *files, "--output_dir", folder)
    return json.loads((folder / "coco_metrics.json").read_text())


@pytest.mark.slow
def test_a_wheel_of_it_alone_gives_the_same_scores_without_torch(expected, tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed, which builds the wheel")
    shutil.copytree(FOLDER, tmp_path / "source")  # setuptools writes beside its source
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, tmp_path / "source", "--target", tmp_path / "installed"], check=True)
    (tmp_path / "data.json").write_text(json.dumps([dict(enumerate(PREDICTIONS)), dict(enumerate(REFERENCES))]))
    code = (
        "import json, sys; from coco_caption.coco import score; scores, _ = score(*json.load(open('data.json')));"
        "assert 'torch' not in sys.modules; print(json.dumps(scores))"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True, stdout=subprocess.PIPE)
    scores = json.loads(done.stdout)
    assert {name: scores[name] for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "sacrebleu")} == {
        name: expected[name] for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "sacrebleu")
    }


def load_elsewhere(path, folder, processes: int = 1) -> list:
    """What each process gets that loads the metric in `folder`, with nothing of the repository on its path."""
    (folder / "data.json").write_text(json.dumps({"predictions": PREDICTIONS, "references": REFERENCES}))
    example = EXAMPLE.replace("path/to/metrics/coco_caption", str(path)) + "assert round(scores['Bleu_1'], 6) == 1\n"
    (folder / "load.py").write_text(LOAD + example * (processes == 1))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "load.py", str(path), "data.json", str(rank), str(processes)],
            cwd=folder,
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [json.loads((folder / f"scores-{rank}.json").read_text()) for rank in range(processes)]


def test_uploaded_it_gives_the_numbers_of_evaluate_py(expected, tmp_path):
    """As in a Space: alone in a folder, loaded from another one."""
    path = shutil.copytree(FOLDER, tmp_path / "coco_caption")
    assert not any(file.is_symlink() for file in path.iterdir())
    (scores,) = load_elsewhere(path, tmp_path)
    assert scores == {name: expected[name] for name in scores}
    assert set(names := ("Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE", "sacrebleu")) <= set(scores)
    assert all(scores[name] is not None or scores["unavailable"][name] for name in names)
    assert 0 < scores["CIDEr"] < 10


@pytest.mark.slow
def test_two_processes_with_a_shared_cache_give_the_same_numbers_once(expected, tmp_path):
    scores, nothing = load_elsewhere(FOLDER, tmp_path, processes=2)
    assert nothing is None
    assert scores == {name: expected[name] for name in scores}


def test_it_needs_nothing_beyond_its_listed_requirements():
    listed = {re.split("[><=]", line)[0] for line in (FOLDER / "requirements.txt").read_text().split()}
    beside = {path.stem for path in FOLDER.glob("*.py")}
    needed, copied = set(), set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in beside, f"{path.name} imports .{node.module}"
                copied |= {node.module} if path.stem == "coco_caption" else set()
            elif isinstance(node, ast.Import | ast.ImportFrom) and path.stem != "app":
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                needed |= {name.split(".")[0] for name in names}
    needed = {"JPype1" if name == "jpype" else name for name in needed - sys.stdlib_module_names}
    assert needed <= listed | {"jgo"}  # which only spice=True asks for, and names where it is missing
    assert copied == beside - {"coco_caption", "app"}  # evaluate copies only what coco_caption.py itself imports

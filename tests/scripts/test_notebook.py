"""notebooks/first_captioner.ipynb, executed as Jupyter does, with the cell of its parameters changed as Papermill does."""

import csv
import json
import re
import shlex

import pytest
import tiny
from conftest import ROOT

import arguments
from common import cli

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (requirements-dev.txt)")
NOTEBOOK = ROOT / "notebooks/first_captioner.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(folder, **parameters):
    """The notebook after its last cell, and what it printed; started in `folder`, which has no scripts, beside a clone."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (requirements-dev.txt)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (requirements-dev.txt)")
    notebook = read()
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in parameters.items():
        cell.source, replaced = re.subn(rf"(?m)^{name} = .*", lambda _: f"{name} = {value!r}", cell.source)  # noqa: B023
        assert replaced == 1
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    finally:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        printed = "".join(output.get("text", "") for output in outputs)
    return outputs, printed


def test_the_notebook_has_no_output_and_its_commands_start(tmp_path):
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    groups = {"train.py": (arguments.TRAIN_GROUPS, None), "infer.py": (arguments.INFER_GROUPS, "paths")}
    given = {"source": ROOT / "recipes/quickstart/scenes.yaml", "FLAGS": "--num_train_epochs 8", "NEW": ROOT / "docs"}
    started = []
    for line in re.findall(r'(?m)^ *!"\{sys.executable\}" (.*)', "\n".join(cell.source for cell in code)):
        name, *words = shlex.split(line.format(**given, RUN=tmp_path))
        if name in groups:
            cli.check(groups[name][0], words, positional=groups[name][1])
            started.append(name)
    assert started == ["train.py", "infer.py"]


@pytest.mark.slow
def test_own_pictures_are_trained_on_and_new_ones_captioned(tmp_path):
    place = tmp_path / "my drive"  # as Google's is called
    captions = {f"photo{n}": [f"a {c} dog.", f"the {c} ball"] for n, c in enumerate(["red", "green", "blue"] * 8)}
    tiny.write_photos(place, captions)
    with open(place / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *((f"{n}.png", t) for n, ts in captions.items() for t in ts)])
    (place / "new").mkdir()
    (place / "photo3.png").rename(place / "new/one.png")
    (place / "captions.csv").write_text(re.sub(r"(?m)^photo3\.png.*\n", "", (place / "captions.csv").read_text()))
    small = f"--model_config '{tiny.write_config(tmp_path)}' --max_steps 2 --gradient_checkpointing false --meteor false --spice false --report_to none"
    run = tmp_path / "a run"
    outputs, printed = execute(
        place, REPOSITORY=str(ROOT), PICTURES="captions.csv", NEW="new", RUN=str(run), FLAGS=small
    )
    with open(run / "captions.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["image"] == str(place / "new/one.png")
    assert printed.rstrip().endswith(row["caption"])
    scores = json.loads((run / "coco_metrics.json").read_text())
    assert f"CIDEr      {scores['CIDEr']:6.3f}" in printed
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2  # the curves, the picture


@pytest.mark.slow
def test_a_mistake_stops_the_notebook_at_its_cell(tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match=r"train\.py stopped"):
        execute(ROOT / "notebooks", RUN=str(tmp_path / "run"), FLAGS="--max_stepz 4")

"""train.py on streams: the same sequence in every way of running it, also where it is killed in each of its passes."""

import itertools
import json
import re

import datasets
import laws
import pytest

pytestmark = laws.NEEDS_FORKS

# 25 pairs a pass and 8 a step: passes end within the steps 4, 7 and 10, and the run in the fourth.
FLAGS = {"streaming": "true", "max_steps": 12, "report": "false"} | laws.AUGMENTED
OFTEN = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with laws.Runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


@pytest.fixture(scope="module")
def unbroken(runs):
    return runs.run("unbroken", **FLAGS, **OFTEN)[0]


def test_each_pass_has_each_pair_once_and_is_augmented_anew(unbroken):
    for number in range(3):
        assert unbroken.images(number) == sorted(laws.training_pairs())
    assert [row["epoch"] for row in unbroken.steps()[4]["samples"]].count(1) == 7
    pixels = [row["pixels"] for number in range(3) for row in unbroken.samples(number)]
    assert len(set(pixels)) > 0.95 * len(pixels)
    assert json.loads((unbroken.output / "run.json").read_text())["training"]["epochs"] == 12 * 8 / 25


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"dataloader_num_workers": 2},
        pytest.param({"processes": 2, "dataloader_num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_in_each_pass_sees_what_an_unbroken_one_does(way, runs, unbroken):
    whole = runs.run(f"whole {way}", **FLAGS, **OFTEN, **way)[0] if "processes" in way else unbroken
    name = f"killed {way}"
    for step in (4, 6, 9):
        runs.run(name, **FLAGS, **OFTEN, **way, moment=f"step {step}", code=-9)
    other, logs = runs.run(name, **FLAGS, **OFTEN, **way)
    assert "resuming from" in logs[0]
    assert len(list(other.record.iterdir())) == 4
    assert other.steps() == whole.steps() == unbroken.steps()
    assert other.logged("loss") == whole.logged("loss")
    assert other.logged("loss") == pytest.approx(unbroken.logged("loss"), abs=1e-5)
    assert other.weights() == whole.weights()


def test_another_number_of_workers_or_processes_goes_on_with_the_same_sequence(runs, unbroken):
    runs.run("others", **FLAGS, **OFTEN, processes=2, moment="step 6", code=-9)
    runs.run("others", **FLAGS, **OFTEN, allow_other_processes="true", moment="step 9", code=-9)
    other, _ = runs.run("others", **FLAGS, **OFTEN, allow_other_processes="true", dataloader_num_workers=2)
    assert other.steps() == unbroken.steps()


def test_evaluation_and_checkpoint_of_an_epoch_are_those_of_a_pass(runs, unbroken):
    whole, _ = runs.run("epochs", **FLAGS)
    assert list(whole.logged("eval_loss")) == [4, 7, 10, 12]
    assert {path.name for path in whole.output.glob("checkpoint-*")} <= {f"checkpoint-{n}" for n in (4, 7, 10, 12)}
    assert whole.steps() == unbroken.steps()
    runs.run("stopped at the end of pass 2", **FLAGS, moment="epoch 2", signal="SIGTERM", code=143)
    other, _ = runs.run("stopped at the end of pass 2", **FLAGS)
    assert other.logged("eval_loss") == whole.logged("eval_loss")
    assert other.steps() == whole.steps()
    assert other.weights() == whole.weights()


def test_checkpoints_that_are_not_of_passes_come_when_they_are_due(runs):
    flags = FLAGS | {
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "no",
        "load_best_model_at_end": "false",
    }
    whole, _ = runs.run("every 5 steps", **flags, save_total_limit=10)
    assert {path.name for path in whole.output.glob("checkpoint-*")} == {
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-12",
    }


def test_a_pass_may_end_with_a_step(runs):
    """13 images with up to 3 captions, all of an image in one sample."""
    flags = FLAGS | {"captions_per_image": 3, "per_device_train_batch_size": 13, "gradient_accumulation_steps": 1}
    run, _ = runs.run("a step is a pass", **flags | {"max_steps": 3})
    assert list(run.logged("eval_loss")) == [1, 2, 3]
    assert [len({row["image"] for row in step["samples"]}) for step in run.steps().values()] == [13, 13, 13]


def test_a_run_that_had_ended_is_not_trained_further(runs):
    flags = FLAGS | OFTEN | {"max_steps": 4}
    ended, _ = runs.run("ended", **flags)
    weights, steps = ended.weights(), ended.logged("loss")
    again, _ = runs.run("ended", **flags)
    assert again.weights() == weights
    assert again.logged("loss") == steps
    # How many passes that was is not known here.
    assert re.search(r"^4 steps, \d+ s", (again.output / "README.md").read_text(), re.MULTILINE)


def test_two_processes_with_workers_read_one_parquet_file_as_one_process_does(runs):
    source = runs.folder / "parquet"
    source.mkdir()
    rows = [json.loads(line) for line in runs.dataset.read_text().splitlines()]
    for split in ("train", "validation", "test"):
        of_split = [row for row in rows if row["split"] == split]
        images = [{"path": r["image"], "bytes": (runs.dataset.parent / r["image"]).read_bytes()} for r in of_split]
        table = datasets.Dataset.from_dict({"image": images, "captions": [r["captions"] for r in of_split]})
        table.to_parquet(source / f"{split}.parquet")
    flags = FLAGS | {"dataset_name": source, "eval_strategy": "no", "save_strategy": "no"}
    one, _ = runs.run("parquet one", **flags)
    two, _ = runs.run("parquet two", **flags, processes=2, dataloader_num_workers=2)
    for number, other in itertools.product(range(3), (one, two)):
        assert other.images(number) == sorted(laws.training_pairs())
    assert two.steps() == one.steps()
    assert two.logged("loss") == pytest.approx(one.logged("loss"), abs=1e-5)

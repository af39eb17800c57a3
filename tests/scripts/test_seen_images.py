"""train.py and evaluate.py: images that a model was trained on are not scored, and a run does not go on with other data."""

import json
import shutil

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import small_run
import tiny
from ranks import Ranks

import data
from data import seen

CAPTIONS = {f"photo{i}": small_run.CAPTIONS[f"photo{i % 16}"] for i in range(24)}
FAST = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", "0")


def test_what_was_held_out_is_scored_after_the_data_grew_and_moved_and_a_resume_is_refused(tmp_path):
    table = tiny.write_photos(tmp_path / "set", dict(list(CAPTIONS.items())[:23]))
    changed = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "split_seed": 7}
    flags = small_run.flags(tmp_path, table, tmp_path / "run", **changed)
    tiny.run("train.py", *flags)
    scores = json.loads((tmp_path / "run" / "coco_metrics.json").read_text())
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert scores["seen"] == {"images": len(predictions), "trained_on": 0, "validated_on": 0}
    assert f"0 of these {len(predictions)} images were trained on." in (tmp_path / "run" / "README.md").read_text()

    tiny.write_photos(tmp_path / "set", CAPTIONS)
    refused = tiny.run("train.py", *flags, fails=True)
    assert "the data changed since" in refused.stderr
    assert "images added. Restore" in refused.stderr
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    model = ("--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "out", *FAST)
    tiny.run("evaluate.py", *model, "--dataset_name", tmp_path / "elsewhere")
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == predictions

    trained = {row["image_id"] for row in predictions}
    rows = [json.loads(line) for line in (tmp_path / "elsewhere" / "data.jsonl").read_text().splitlines()]
    (tmp_path / "elsewhere" / "data.jsonl").unlink()
    for name, part in (("train", rows[:2]), ("test", rows[2:])):
        (tmp_path / "elsewhere" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    refused = tiny.run("evaluate.py", *model, "--dataset_name", tmp_path / "elsewhere", fails=True)
    assert f"of these {len(rows) - 2} images" in refused.stderr
    assert "--score_trained_images" in refused.stderr
    tiny.run("evaluate.py", *model, "--dataset_name", tmp_path / "elsewhere", "--score_trained_images")
    overlap = json.loads((tmp_path / "out" / "coco_metrics.json").read_text())["seen"]
    assert overlap["images"] == len(rows) - 2
    assert 0 < overlap["trained_on"] <= len(rows) - len(trained)


def test_the_split_of_a_run_without_a_record_is_not_known(tmp_path):
    table = tiny.write_photos(tmp_path / "set", small_run.CAPTIONS)
    model = tiny.build_folder(tmp_path)
    (model / "run.json").write_text(json.dumps({"flags": {"dataset_name": str(table)}}))
    flags = ("--model_name_or_path", model, "--dataset_name", table, "--output_dir", tmp_path / "out", *FAST)
    assert (
        "seen.parquet, which says on which images, is not with it" in tiny.run("evaluate.py", *flags, fails=True).stderr
    )
    tiny.run("evaluate.py", *flags, "--score_trained_images")
    seen = json.loads((tmp_path / "out" / "coco_metrics.json").read_text())["seen"]
    assert seen["trained_on"] is None
    assert seen["images"] < len(small_run.CAPTIONS), "the split was drawn"


def check_record(file, table) -> None:
    """Every image of the table is recorded once, in its split."""
    record = pq.read_table(file)
    for split, rows in data.load(str(table)).items():
        assert record.filter(pc.field("split") == split).equals(seen.describe({split: rows})), split
    assert len(record) == 23


@pytest.mark.slow
def test_a_run_that_was_killed_does_not_go_on_when_its_data_changed_and_goes_on_when_they_are_back(tmp_path):
    table = tiny.write_photos(tmp_path / "set", dict(list(CAPTIONS.items())[:23]))
    before = table.read_text()
    run = tmp_path / "run"
    flags = small_run.flags(tmp_path, table, run, save_strategy="steps", save_steps=2, eval_strategy="no")
    ranks = Ranks(tmp_path)
    ranks.run(*flags, until=run / "checkpoint-2" / "trainer_state.json")
    ranks.close()
    check_record(run / seen.NAME, table)

    tiny.write_photos(tmp_path / "set", CAPTIONS)
    refused = tiny.run("train.py", *flags, fails=True).stderr
    assert f"the data changed since {run} was begun: 1 images added. Restore the data to resume it" in refused
    check_record(run / seen.NAME, tiny.write_photos(tmp_path / "set", dict(list(CAPTIONS.items())[:23])))
    assert table.read_text() == before
    assert "resuming from" in tiny.run("train.py", *flags).stderr
    assert json.loads((run / "coco_metrics.json").read_text())["seen"]["trained_on"] == 0


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    table = tiny.write_photos(tmp_path / "set", dict(list(CAPTIONS.items())[:23]))
    flags = small_run.flags(tmp_path, table, tmp_path / "run", max_steps=1, eval_strategy="no", save_strategy="no")
    tiny.run("train.py", *flags, processes=2)
    check_record(tmp_path / "run" / seen.NAME, table)

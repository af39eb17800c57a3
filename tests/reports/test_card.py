"""The model card: accepted by the Hub's library, true, and its snippet runs."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from small_run import CAPTIONS, SPLITS, flags

from common.publish import _uploaded
from reports.model_card import _examples, write_eval_results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dataset = tiny.write_photos(folder / "photos", CAPTIONS, SPLITS)
    tiny.run("train.py", *flags(folder, dataset, folder / "out", num_train_epochs=1))
    return folder / "out"


def test_the_hub_accepts_its_metadata(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.language == "en"
    assert card.data.license == "bsd-3-clause"
    assert card.data.pipeline_tag == "image-to-text"
    scores = json.loads((trained / "coco_metrics.json").read_text())
    results = {(r.metric_name, r.dataset_split): r.metric_value for r in card.data.eval_results}
    assert results["CIDEr", "test"] == round(scores["CIDEr"], 4)
    assert results["sacreBLEU", "test"] == round(scores["sacrebleu"], 4)


def test_scores_on_data_sets_of_the_hub_are_read_back_by_its_library(trained, tmp_path):
    scores = json.loads((trained / "coco_metrics.json").read_text())
    assert not (trained / ".eval_results").exists(), "its data set is a file here"
    write_eval_results(
        tmp_path, [scores | {"dataset_name": "me/set"}, scores | {"dataset_name": "me/set", "split": "validation"}]
    )
    (file,) = (tmp_path / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    values = {(entry.dataset_id, entry.task_id): entry.value for entry in entries}
    for split in ("test", "validation"):
        assert values["me/set", f"{split}_CIDEr"] == round(scores["CIDEr"], 4)
    assert file.relative_to(tmp_path) in [path.relative_to(tmp_path) for path in _uploaded(tmp_path)]


def test_it_tells_what_the_run_knows(trained):
    text = (trained / "README.md").read_text()
    run = json.loads((trained / "run.json").read_text())
    assert run["data"]["train"] == {"images": 12, "captions": 24}
    assert "| train | 12 | 24 |" in text
    assert "| learning_rate | 0.001 |" in text
    assert run["examples"][0]["caption"] in text
    assert run["commit"] in text
    assert "in 1 process on" in text
    assert ": the best sacreBLEU on the validation split (" in text
    assert "(training_curves.png)" in text
    assert (trained / "training_curves.png").is_file()
    assert "GiB" in text
    assert "METEOR" not in text or "not computed" in text


def test_what_people_said_stays_in_its_cell_of_the_table():
    hostile = {"image_id": "a|b", "caption": "x | y <img src=x> [a](b) `c`", "references": ["one\n| two |", "*three*"]}
    row = _examples({"examples": [hostile]}).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[<>`*\[\]]", row)


def run_snippet(folder, text, picture=None):
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    (picture or Image.new("RGB", (50, 40), "red")).save(folder.parent / "photo.jpg", "PNG")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_its_snippet_runs_and_gives_the_caption_of_infer(trained):
    text = (trained / "README.md").read_text()
    caption = run_snippet(trained, text)
    inferred = tiny.run("infer.py", trained.parent / "photo.jpg", "--model_name_or_path", trained).stdout
    assert inferred.split("\t")[1].strip() == caption


def test_export_of_a_checkpoint_is_a_folder_that_stands_alone(trained, tmp_path):
    checkpoint = next(trained.glob("checkpoint-*"))
    tiny.run("export.py", checkpoint, "--output_dir", tmp_path / "exported")
    written = [tmp_path / "exported" / name for name in ("model.safetensors", "config.json")]
    assert len({file.stat().st_mode for file in written}) == 1
    assert not list((tmp_path / "exported").glob("*optimizer*"))
    run_snippet(tmp_path / "exported", (tmp_path / "exported" / "README.md").read_text())


def test_export_of_a_run_keeps_its_scores(trained, tmp_path):
    tiny.run("export.py", trained, "--output_dir", tmp_path / "exported")
    assert ModelCard.load(tmp_path / "exported" / "README.md").data.eval_results
    assert "(training_curves.png)" in (tmp_path / "exported" / "README.md").read_text()
    assert (tmp_path / "exported" / "training_curves.png").is_file()
    run_snippet(tmp_path / "exported", (tmp_path / "exported" / "README.md").read_text())


AWKWARD = 'a "red" `x` | <b>\n'


@pytest.mark.slow
def test_the_card_of_an_adapter_from_a_stream_is_true(dataset, tmp_path):
    base = tiny.build_folder(tmp_path)
    values = {
        "model_name_or_path": base, "dataset_name": dataset, "output_dir": tmp_path / "out", "use_peft": "true",
        "streaming": "true", "max_steps": 2, "caption_language": "de", "prompt": AWKWARD, "eval_strategy": "no",
        "save_steps": 1, "save_strategy": "steps", "save_total_limit": 1, "load_best_model_at_end": "false",
        "num_beams": 3, "no_repeat_ngram_size": 2, "early_stopping": "false", "max_new_tokens": 8, "meteor": "false",
        "spice": "false", "bootstrap_samples": 0, "report": "false", "per_device_train_batch_size": 4,
    }  # fmt: skip
    tiny.run("train.py", *[word for name, value in values.items() for word in (f"--{name}", value)])
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "README.md")
    assert card.data.language == "de"
    assert card.text.lstrip().startswith("# out\n")
    assert "More Information Needed" not in card.text
    assert not list(folder.glob("checkpoint-*/README.md"))
    assert "No image is in two splits" not in card.text
    assert "not checked" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith(("| prompt |", "| no_repeat"))]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    outside = re.sub(r"```.*?\n```", "", card.text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<b", outside)
    predictions = json.loads((folder / "predictions.json").read_text())
    for number, row in enumerate(predictions):
        picture = Image.open(dataset.parent / row["image_id"])
        assert run_snippet(folder, card.text, picture) == row["caption"], number
    tiny.run("export.py", folder)  # in place: it stays an adapter
    assert (folder / "adapter_config.json").is_file()
    assert ModelCard.load(folder / "README.md").text == card.text


def test_what_is_no_model_is_not_exported(tmp_path):
    assert "is not a model folder" in tiny.run("export.py", tmp_path, fails=True).stderr


def test_no_secret_of_the_command_line_is_written_down(trained, tmp_path):
    dataset = trained.parent / "photos" / "data.jsonl"
    command = flags(trained.parent, dataset, tmp_path / "out", num_train_epochs=1)
    tiny.run("train.py", *command, "--hub_token", "hf_secret1")
    tiny.run(
        "train.py", *flags(trained.parent, dataset, tmp_path / "two", num_train_epochs=1), "--hub_token=hf_secret2"
    )
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("README.md")]:
        assert "hf_secret" not in file.read_text(), file
    assert not [file for file in tmp_path.rglob("*.bin") if b"hf_secret" in file.read_bytes()]

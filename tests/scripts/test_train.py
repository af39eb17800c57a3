"""train.py end to end on a tiny model: what it leaves, that it is honest, that it resumes, that it says what is wrong."""

import io
import json
import os
import signal
import time

import pytest
import tiny
from small_run import CAPTIONS, SPLITS, equal_weights, flags, weights
from transformers import AutoProcessor, BlipForConditionalGeneration


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = tiny.run("train.py", *flags(folder, dataset, folder / "out"))
    return folder / "out", result


def test_weights_may_be_read_by_whoever_may_read_the_rest(trained):
    """safetensors 0.8 writes files that only their owner may read: no colleague, no other user of a container."""
    out, _ = trained
    weights = [*out.glob("*.safetensors"), *out.glob("checkpoint-*/*.safetensors")]
    assert len(weights) > 1
    assert {file.stat().st_mode for file in weights} == {(out / "config.json").stat().st_mode}


def test_a_run_leaves_everything_that_the_readme_promises(trained):
    out, _ = trained
    for name in (
        "model.safetensors", "config.json", "generation_config.json", "processor_config.json", "coco_metrics.json",
        "predictions.json", "per_image.jsonl", "report.html", "validation/report.html", "validation/coco_metrics.json",
        "validation/predictions.json", "training_curves.svg",
        "training_curves.png", "train_results.json", "eval_results.json", "trainer_state.json", "README.md", "run.json",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name


def test_the_model_folder_loads_with_the_library_alone(trained):
    out, _ = trained
    model = BlipForConditionalGeneration.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.generation_config.num_beams == 2
    assert model.generation_config.max_new_tokens == 8


def test_the_scores_are_of_one_caption_an_image_and_all_references(trained):
    out, _ = trained
    scores = json.loads((out / "coco_metrics.json").read_text())
    predictions = json.loads((out / "predictions.json").read_text())
    assert sorted(row["image_id"] for row in predictions) == ["photo12.png", "photo9.png"]
    assert scores["counts"] == {"images": 2, "references": 4} | scores["counts"]
    assert scores["split"] == "test"
    assert {"sacrebleu_signature", "generation", "versions", "dataset_fingerprint", "command", "commit"} <= set(scores)
    assert scores["METEOR"] is None
    assert scores["SPICE"] is None


def test_the_log_has_the_loss_and_the_scores_of_every_epoch(trained):
    out, _ = trained
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    evaluations = [row for row in history if "eval_sacrebleu" in row]
    assert len(evaluations) == 3
    assert all({"eval_loss", "eval_CIDEr"} <= set(row) for row in evaluations)
    assert all("data_wait" in row for row in history if "loss" in row)


def test_the_best_checkpoint_is_the_one_that_is_saved_and_scored(trained):
    out, _ = trained
    state = json.loads((out / "trainer_state.json").read_text())
    best = max(row["eval_sacrebleu"] for row in state["log_history"] if "eval_sacrebleu" in row)
    assert state["best_metric"] == best
    assert json.loads((out / "eval_results.json").read_text())["eval_sacrebleu"] == pytest.approx(best, abs=1e-6)
    kept = out / f"checkpoint-{state['best_global_step']}"
    assert equal_weights(out, kept)


def test_the_same_command_gives_the_same_numbers(dataset, trained, tmp_path):
    out, _ = trained
    tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "out"))
    assert equal_weights(out, tmp_path / "out")


def kill_after(process, folder, *, checkpoints: int):
    """SIGKILL once so many checkpoints are there."""
    deadline = time.time() + 200
    while len(list(folder.glob("checkpoint-*"))) < checkpoints:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_an_unbroken_one(dataset, tmp_path):
    # Checkpoints in the middle of epochs, with augmentation, whose chance must be the same after a resume.
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3,
               "num_train_epochs": 6, "save_total_limit": 50}  # fmt: skip
    augment = ["--augment", "random_resized_crop:0.5:1.0", "flip", "randaugment:2:5", "gaussian_noise:20:0.5",
               "--augment_text", "synonym:0.5"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tiny.run("train.py", *flags(tmp_path, dataset, whole, **options), *augment)
    command = [*flags(tmp_path, dataset, broken, **options), *augment]
    kill_after(tiny.start("train.py", *command), broken, checkpoints=2)
    kill_after(tiny.start("train.py", *command), broken, checkpoints=5)
    # What a kill in the middle of a save leaves.
    unfinished = broken / "checkpoint-1000"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    result = tiny.run("train.py", *command)
    assert "resuming from" in result.stderr
    assert "checkpoint-1000 is unfinished" in result.stderr
    assert not unfinished.exists()
    assert equal_weights(whole, broken)
    one, other = (json.loads((f / "coco_metrics.json").read_text()) for f in (whole, broken))
    assert {k: one[k] for k in ("sacrebleu", "CIDEr", "Bleu_4")} == {
        k: other[k] for k in ("sacrebleu", "CIDEr", "Bleu_4")
    }


def test_captions_are_augmented_in_training_and_not_in_evaluation(dataset, tmp_path):
    """A model that does not move, in one batch: its losses tell which captions it was shown."""
    import data
    from collator import CaptionCollator
    from models.loading import load_model
    from objectives import caption_loss

    options = {
        "learning_rate": 0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 28,
        "label_smoothing_factor": 0,
    }
    more = {"gradient_accumulation_steps": 1, "freeze_vision": "true", "augment_text": "synonym:1"}
    tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "out", **options, **more))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = {name: row[name] for row in history for name in ("loss", "eval_loss") if name in row}

    model, processor = load_model(str(tmp_path / "out"))
    model.eval()
    splits = data.load(dataset)

    def loss(split, text_augmentation=None):
        collator = CaptionCollator(processor, model.config, text_augmentation=text_augmentation)
        return caption_loss(model, collator(list(data.CaptionPairs(splits[split])))).item()

    augmented = loss("train", data.TextAugmentation(["synonym:1"]))
    assert logged["loss"] == pytest.approx(augmented, abs=1e-4)
    assert abs(augmented - loss("train")) > 1e-3
    assert logged["eval_loss"] == pytest.approx(loss("validation"), abs=1e-4)


def test_a_finished_run_started_again_ends_with_the_same_weights(dataset, trained):
    out, result = trained
    before = weights(out)
    command = [word for word in result.args if str(word) != "x"]
    again = tiny.run("train.py", *command[2:])
    assert "resuming from" in again.stderr
    assert all(before[name].equal(value) for name, value in weights(out).items())


def test_a_folder_of_another_run_is_refused_by_name(dataset, trained, tmp_path):
    out, _ = trained
    result = tiny.run("train.py", *flags(tmp_path, dataset, out, learning_rate=5e-4), fails=True)
    assert str(out) in result.stderr
    assert "learning_rate was 0.001, is 0.0005" in result.stderr


def test_two_processes_give_the_scores_and_the_weights_of_one_with_the_doubled_batch(dataset, tmp_path):
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 1}
    one = flags(tmp_path, dataset, tmp_path / "one", per_device_train_batch_size=4, **options)
    two = flags(tmp_path, dataset, tmp_path / "two", per_device_train_batch_size=2, **options)
    tiny.run("train.py", *one)
    tiny.run("train.py", *two, processes=2)
    logs = [json.loads((tmp_path / f / "trainer_state.json").read_text())["log_history"] for f in ("one", "two")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    first, second = (json.loads((tmp_path / f / "coco_metrics.json").read_text()) for f in ("one", "two"))
    assert first["counts"] == second["counts"]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(first[name].allclose(second[name], atol=1e-4) for name in first)


def test_two_processes_train_from_a_stream(dataset, tmp_path):
    values = flags(tmp_path, dataset, tmp_path / "out", streaming="true", max_steps=3, eval_strategy="no")
    tiny.run("train.py", *values, processes=2)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert len([row for row in log if "loss" in row]) == 3
    assert "| train | a stream | a stream |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_untrained_model_scores_nothing_in_training(test_data, tmp_path):
    """The published script's evaluation, with references for prompts, gave such a model BLEU 91."""
    values = flags(
        tmp_path, test_data / "flickr8k", tmp_path / "out", learning_rate=0, num_train_epochs=1, max_train_samples=4,
        max_eval_samples=40, max_test_samples=40, num_beams=5, max_new_tokens=30,
        tokenizer_vocab=test_data / "bert-base-uncased" / "vocab.txt",
    )  # fmt: skip
    tiny.run("train.py", *values)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [row["eval_sacrebleu"] < 5 for row in log if "eval_sacrebleu" in row] == [True]
    assert json.loads((tmp_path / "out" / "coco_metrics.json").read_text())["sacrebleu"] < 5
    assert json.loads((tmp_path / "out" / "validation" / "coco_metrics.json").read_text())["sacrebleu"] < 5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("num_beam: 3", "unrecognized argument: num_beam. Did you mean num_beams?"),
        ("num_beams: many", "num_beams: expected int, got 'many'"),
        ("freeze_vision: 3", "freeze_vision: expected true or false, got 3"),
        ("generation_num_beams: 3", "use num_beams"),
        ("- a list", "must hold 'flag: value' lines"),
        ("a: [", "is not YAML"),
        ("lr_scheduler_type: cosin", "'cosin' is not one of"),
    ],
)
def test_a_wrong_recipe_is_one_clear_message(lines, said, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(lines)
    result = tiny.run("train.py", recipe, fails=True)
    assert said in result.stderr
    assert str(recipe) in result.stderr


def test_the_command_line_goes_before_the_recipe_and_the_recipe_before_the_defaults(tmp_path):
    import arguments
    from common import cli

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nseed: 7\naugment: [flip]\n")
    data_args, args = cli.parse((arguments.TrainDataArguments, arguments.TrainArguments), [str(recipe), "--seed", "9"])
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (1e-3, 9, 4.0)
    assert data_args.augment == ["flip"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset_name": "no/where"}, "no/where"),
        ({"model_config": "none.json"}, "--model_config none.json: no such file"),
        ({"eval_strategy": "steps"}, "load_best_model_at_end needs a checkpoint at each evaluation"),
        ({"max_train_samples": 0}, "at least 1"),
        ({"captions_per_image": 0}, "at least 1"),
        ({"max_txt_len": 2}, "leaves no room"),
        ({"augment": "wobble"}, "wobble"),
        ({"augment_text": "synonym:2"}, "P from 0 to 1"),
        ({"lerning_rate": 1}, "Did you mean --learning_rate?"),
    ],
)
def test_a_wrong_flag_is_one_clear_message(changed, said, dataset, tmp_path):
    assert said in tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "out", **changed), fails=True).stderr


def test_an_output_path_that_is_a_file_is_refused(dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "file"), fails=True)
    assert "is a file" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_samples_stop_training_unless_told_otherwise(tmp_path):
    dataset = tiny.write_photos(tmp_path / "photos", CAPTIONS, SPLITS)
    (tmp_path / "photos" / "photo0.png").write_bytes(b"not an image")
    command = flags(tmp_path, dataset, tmp_path / "out", num_train_epochs=1)
    assert "photo0.png" in tiny.run("train.py", *command, fails=True).stderr
    tiny.run("train.py", *command, "--skip_bad_samples")
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in listed] == ["photo0.png"]


def test_evaluation_never_skips_a_bad_image(tmp_path):
    dataset = tiny.write_photos(tmp_path / "photos", CAPTIONS, SPLITS)
    (tmp_path / "photos" / "photo9.png").write_bytes(b"")  # of the test split
    result = tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "out"), "--skip_bad_samples", fails=True)
    assert "photo9.png" in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_nothing_finished_is_lost(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "trainer_state.json").symlink_to("/dev/full")  # the last file that training itself writes
    result = tiny.run("train.py", *flags(tmp_path, dataset, out, num_train_epochs=1), fails=True)
    assert "the disk is full" in result.stderr
    assert list(out.glob("checkpoint-*/model.safetensors"))


def test_tensorboard_has_the_scores_and_the_pictures_with_their_captions_of_each_evaluation(trained):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    from PIL import Image

    out, _ = trained
    folder = min((out / "runs").iterdir(), key=lambda path: path.stat().st_ctime)  # a later start has one of its own
    board = events.EventAccumulator(str(folder), size_guidance={events.IMAGES: 0}).Reload()
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    expected = [(row["step"], row["eval_CIDEr"]) for row in log if "eval_CIDEr" in row]
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("eval/CIDEr")] == expected
    sheets = board.Images("captions")
    assert [sheet.step for sheet in sheets] == [step for step, _ in expected]
    assert Image.open(io.BytesIO(sheets[0].encoded_image_string)).width == 1300


def test_trackers_are_chosen_by_name(tmp_path):
    from arguments import TrainArguments

    assert TrainArguments(output_dir=str(tmp_path), report_to=["none"]).report_to == []
    assert TrainArguments(output_dir=str(tmp_path)).report_to == ["tensorboard"]
    with pytest.raises(ValueError, match="report_to: carrier_pigeon is not installed, or not a tracker"):
        TrainArguments(output_dir=str(tmp_path), report_to=["carrier_pigeon"])


def test_a_sheet_shows_each_picture_with_its_caption_and_takes_any_text():
    from drawn_scenes import drawing as scenes
    from training.tracker_images import draw_sheet

    records = scenes.load(train=0, validation=5, test=0)["validation"]
    captions = {image_id: f"$x_{{ <b>{n}" for n, image_id in enumerate(records["image_id"])}
    figure = draw_sheet(records, captions)
    assert [axis.get_title() for axis in figure.axes] == [*captions.values(), "", "", ""]
    assert records[0]["captions"][0][:20] in figure.axes[0].get_xlabel()
    figure.savefig(io.BytesIO())  # as mathematics, the captions would not be drawable

"""Prompts of each image's own through the scripts: train.py, evaluate.py and infer.py ask rows what they say."""

import ast
import json

import families
import pytest
import tiny
import torch
from PIL import Image
from places import script

from captioner import Captioner
from captioning.sources import image_rows
from common.errors import UserError
from data.rows import Options
from models.loading import asks
from reports.snippet import snippet

ANSWERS = {
    "Which colour is it?": ["red", "green", "blue", "yellow"],
    "What is it?": ["a dog", "a cat", "a ball", "a star"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = families.build("llava")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for pictures to matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Two questions about each of four pictures."""
    folder = tmp_path_factory.mktemp("talk")
    rows = []
    for number, split in enumerate(("train", "train", "validation", "test")):
        Image.new("RGB", (32, 32), ("red", "green", "yellow", "blue")[number]).save(folder / f"{number}.png")
        for question, answers in ANSWERS.items():
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answers[number % 2]}]
            rows.append({"image": f"{number}.png", "conversations": turns, "split": split})
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "talk.jsonl"


def train(base, talk, output, **changed) -> None:
    values = {
        "model_name_or_path": base, "dataset_name": talk, "output_dir": output, "num_train_epochs": 60,
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_beams": 1,
        "gradient_checkpointing": "false", "meteor": "false", "spice": "false", "bootstrap_samples": 0,
        "eval_strategy": "no", "save_strategy": "no", "label_smoothing_factor": 0, "report": "false",
    }  # fmt: skip
    script("train", *[word for name, value in (values | changed).items() for word in (f"--{name}", value)])


def test_a_model_asked_two_questions_about_an_image_answers_each(base, talk, tmp_path):
    train(base, talk, tmp_path / "run", captions_per_image=2)
    captioner = Captioner.from_pretrained(str(tmp_path / "run"))
    for number in (0, 1):
        image = str(talk.parent / f"{number}.png")
        for question, answers in ANSWERS.items():
            assert captioner.with_settings(question)([image]) == [answers[number]]
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [row["image_id"] for row in predictions] == ["3.png", "3.png#2"]  # the test split: one for each question
    # What it was trained with is asked again, with nothing said: by evaluate.py and by infer.py.
    flags = ("--model_name_or_path", tmp_path / "run")
    quiet = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--report", "false")
    script("evaluate", talk, *flags, "--split", "train", "--output_dir", tmp_path / "scores", *quiet)
    scored = json.loads((tmp_path / "scores" / "predictions.json").read_text())
    wanted = [answers[number] for number in (0, 1) for answers in ANSWERS.values()]
    assert [row["caption"] for row in scored] == wanted
    script("infer", talk, *flags, "--output", tmp_path / "said.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows[:4]] == wanted
    assert [row["image"].rpartition("/")[2] for row in rows[:4]] == ["0.png", "0.png#2", "1.png", "1.png#2"]


def test_a_prompt_that_is_given_is_asked_in_place_of_the_questions(base, talk, tmp_path, caplog):
    caplog.set_level("INFO")
    train(base, talk, tmp_path / "run", num_train_epochs=1, prompt="caption:")
    assert "questions of 8 conversations are left out" in caplog.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["caption_prompt"] == "caption:"
    assert "own_questions" not in config["caption_text"]


@pytest.fixture
def table(tmp_path):
    rows = [
        {"image": f"{n}.png", "caption": "a dog", "kind": kind} for n, kind in enumerate(("a red", "the small", "two"))
    ]
    for row in rows:
        Image.effect_noise((32, 32), 20 + 30 * int(row["image"][0])).convert("RGB").save(tmp_path / row["image"])
    write(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def write(path, rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def said(path) -> list[str]:
    return [json.loads(line)["caption"] for line in path.read_text().splitlines()]


def test_infer_fills_in_columns_and_captions_again_what_is_asked_anew(table, tmp_path, capsys):
    folder = tiny.build_folder(tmp_path)
    captioner = Captioner.from_pretrained(str(folder), keep_prompt=True, max_new_tokens=4, min_new_tokens=4)
    images = [str(table.parent / f"{number}.png") for number in range(3)]
    alone = lambda asked: [captioner.with_settings(p)([i])[0] for p, i in zip(asked, images, strict=True)]  # noqa: E731
    how = ("--model_name_or_path", folder, "--keep_prompt", "--max_new_tokens", 4, "--min_new_tokens", 4)
    how = (*how, "--output", tmp_path / "out.jsonl", "--shard_size", 2)
    script("infer", table, *how, "--prompt", "near {kind}")
    asked = ["near a red", "near the small", "near two"]
    assert said(tmp_path / "out.jsonl") == alone(asked)
    # Another value in the column: that image is captioned again, the others are not.
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[1]["kind"] = "three"
    write(table, rows)
    capsys.readouterr()
    script("infer", table, *how, "--prompt", "near {kind}")
    assert said(tmp_path / "out.jsonl") == alone(["near a red", "near three", "near two"])
    script("infer", table, *how[:-4], "--output", tmp_path / "column.jsonl", "--prompt_column", "kind")
    assert said(tmp_path / "column.jsonl") == alone(["a red", "three", "two"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "a {kid}"), "line 1: no column 'kid'"),
        (("--prompt_column", "kin"), "line 1: no column 'kin', which the prompt '{kin}' holds. Did you mean kind?"),
        (("--prompt", "a", "--prompt_column", "kind"), "--prompt and --prompt_column: give one of them"),
        (("--system_prompt", "Be short."), "takes no system prompt"),
        (("--prompt", "a {blank}"), "line 1: nothing in column 'blank'"),
    ],
)
def test_mistakes_are_one_line(table, tmp_path, flags, message):
    rows = [json.loads(line) | {"blank": ""} for line in table.read_text().splitlines()]
    write(table, rows)
    done = tiny.run("infer.py", table, "--model_name_or_path", tiny.build_folder(tmp_path), *flags, fails=True)
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if "rror" in line or message in line]) == 1


def test_an_image_without_a_row_is_one_line(table, tmp_path):
    flags = ("--model_name_or_path", tiny.build_folder(tmp_path), "--prompt", "a {kind}")
    done = tiny.run("infer.py", table.parent / "0.png", *flags, fails=True)
    assert "no column 'kind'" in done.stderr
    assert "Columns: none" in done.stderr


def test_a_run_whose_prompts_changed_does_not_resume(base, table, tmp_path):
    rows = [json.loads(line) | {"split": "train"} for line in table.read_text().splitlines()]
    rows[-1]["split"] = "validation"
    write(table, rows)
    flags = {"num_train_epochs": 1, "save_strategy": "epoch", "load_best_model_at_end": "false"}
    train(base, table, tmp_path / "run", prompt="Which {kind}?", **flags)
    rows[0]["kind"] = "another"
    write(table, rows)
    with pytest.raises(UserError, match=r"the data changed since .* was begun: 1 images with other captions"):
        train(base, table, tmp_path / "run", prompt="Which {kind}?", **flags)
    with pytest.raises(UserError, match="prompt"):
        train(base, table, tmp_path / "run", prompt="What {kind}?", **flags)


def test_the_cards_code_shows_the_columns_as_text(tmp_path):
    captioner = Captioner.from_pretrained(str(tiny.build_folder(tmp_path)), prompt="a {kind} {{of}}")
    code = snippet("me/mine", captioner, "float32")
    assert "# In place of {...}, the image's own: kind" in code
    assert 'text="a {kind} {of}"' in code
    ast.parse(code)


def test_a_model_on_a_server_is_asked_the_question_of_a_conversation(talk):
    asked = asks("openai:any", "main", None)
    sent = [row["prompt"] for row in image_rows([str(talk)], Options(**asked))]
    assert sent == list(ANSWERS) * 4
    assert {row["prompt"] for row in image_rows([str(talk)], Options(**asks("openai:any", "main", "Say.")))} == {None}

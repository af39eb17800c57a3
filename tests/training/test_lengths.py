"""Lengths follow the training captions: what is learnt, whether ends are, and what is said of captions that are cut."""

import json

import datasets
import families
import pytest
import tiny
import torch
from PIL import Image
from small_run import SPLITS, flags

from arguments import GenerationArguments, TrainDataArguments
from captioner import Captioner
from collator import CaptionCollator
from models.loading import ready
from training.lengths import fit_lengths

PICTURE = Image.new("RGB", (48, 40), "red")


def records_of(lengths: list[int]):
    captions = [" ".join(["a", "dog", "runs", "near"][n % 4] for n in range(length)) for length in lengths]
    return datasets.Dataset.from_dict({"captions": [[caption] for caption in captions]})


def fit(captioner, lengths, checkpoint=None, **asked):
    data_args = TrainDataArguments(max_txt_len=asked.pop("max_txt_len", None))
    return fit_lengths(captioner, records_of(lengths), data_args, GenerationArguments(**asked), checkpoint)


@pytest.fixture
def captioner(tmp_path):
    model, processor = tiny.build(tmp_path)
    return Captioner(model, processor)


@pytest.mark.parametrize(
    ("lengths", "learnt", "written", "cut"),
    [
        ([10] * 300, 40, 30, 0),
        ([36] + [10] * 299, 40, 30, 0),
        ([50] * 3 + [10] * 297, 40, 30, 3),  # 1 %
        ([45] * 4 + [10] * 296, 47, 46, 0),
        ([35] * 40 + [10] * 260, 40, 36, 0),  # fits what is learnt, not what is written
        ([45] * 99 + [55], 47, 46, 1),
        ([300] * 100, 64, 63, 100),  # the model has 64 positions
    ],
)
def test_lengths_are_the_published_ones_where_captions_fit_and_follow_them_where_not(
    captioner, lengths, learnt, written, cut, caplog
):
    caplog.set_level("INFO")
    lengths_said = fit(captioner, lengths)
    assert (lengths_said["max_txt_len"], lengths_said["max_new_tokens"], lengths_said["cut"]) == (learnt, written, cut)
    assert captioner.model.generation_config.max_new_tokens == captioner.settings["max_new_tokens"] == written
    assert captioner.with_settings(num_beams=2).settings["max_new_tokens"] == written
    (line,) = [one.message for one in caplog.records if one.name == "training.lengths"]
    assert f"{cut} are cut" in line
    assert ("the model has 64 positions" in line) == (max(lengths) == 300)
    captioner([PICTURE])  # fits the positions


def test_flags_win_and_a_resumed_run_keeps_its_lengths(captioner, tmp_path):
    assert fit(captioner, [50] * 9, max_txt_len=20)["cut"] == 9
    assert fit(captioner, [50] * 9, max_txt_len=20)["max_new_tokens"] == 30
    assert fit(captioner, [50] * 9, max_new_tokens=7)["max_new_tokens"] == 7
    recorded = {"max_txt_len": 40, "max_new_tokens": None}  # as versions before did
    (tmp_path / "run.json").write_text(json.dumps({"flags": recorded}))
    (tmp_path / "checkpoint-1").mkdir()
    captioner.settings["max_new_tokens"] = 30
    kept = fit(captioner, [50] * 9, checkpoint=str(tmp_path / "checkpoint-1"))
    assert (kept["max_txt_len"], kept["max_new_tokens"], kept["cut"]) == (40, 30, 9)


@pytest.mark.parametrize("name", families.NAMES)
def test_every_familys_captions_are_learnt_to_their_end_within_its_positions(name):
    model, processor = families.build(name)
    captioner = Captioner(ready(model, processor), processor, num_beams=1)
    lengths = fit(captioner, [60] * 10)
    images = captioner.collator
    collator = CaptionCollator(processor, model.config, max_txt_len=lengths["max_txt_len"], prompt=captioner.prompt)
    sample = {"image": PICTURE, "image_id": "0", "epoch": 0, "captions": records_of([60])["captions"][0]}
    batch = collator([sample])
    ends = batch["labels"][0][batch["labels"][0] >= 0][-1] == images.end
    assert ends == (lengths["cut"] == 0) == ("positions" not in lengths["in_words"])
    with torch.no_grad():
        tokens = captioner.generate_tokens(images([sample]))
        assert tokens.shape[1] <= lengths["max_new_tokens"]


@pytest.mark.slow
def test_paragraphs_are_learnt_to_their_end_without_a_flag(tmp_path):
    """Captions of 10, 100 and 300 words, with the default flags: greedy captions end by themselves, in the same words."""
    words = [f"w{n}" for n in range(300)]
    captions = {f"p{n}": " ".join(words[:n]) for n in (10, 100, 300)}
    held = {"held0": ["w0 w1"], "held1": ["w1 w2"]}
    splits = dict.fromkeys(captions, "train") | {"held0": "validation", "held1": "test"}
    source = tiny.write_photos(tmp_path / "photos", {name: [text] for name, text in captions.items()} | held, splits)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = {**tiny.CONFIG, "text_config": {**tiny.CONFIG["text_config"], "max_position_embeddings": 320}}
    (tmp_path / "model.json").write_text(json.dumps(config))
    run = tiny.run(
        "train.py", "--model_config", tmp_path / "model.json", "--tokenizer_vocab", tmp_path / "vocab.txt",
        "--dataset_name", source, "--output_dir", tmp_path / "run", "--max_steps", 250, "--num_beams", 1,
        "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2,
        "--label_smoothing_factor", 0, "--gradient_checkpointing", "false", "--eval_strategy", "no", "--save_strategy",
        "no", "--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--report", "false",
    )  # fmt: skip
    sentence = (
        "up to 302 tokens of a training caption (max_txt_len), and of a generated one up to 301 (max_new_tokens); of 3 training "
        "captions, the longest of 302 tokens, 0 are cut"
    )
    assert f"lengths: {sentence}\n" in run.stderr
    recorded = json.loads((tmp_path / "run/run.json").read_text())
    assert recorded["lengths"]["in_words"] == sentence
    assert (recorded["flags"]["max_txt_len"], recorded["flags"]["max_new_tokens"]) == (302, 301)
    assert f"Lengths: {sentence}." in (tmp_path / "run/README.md").read_text()
    for name, text in captions.items():
        outcome = tiny.run("infer.py", tmp_path / f"photos/{name}.png", "--model_name_or_path", tmp_path / "run")
        assert outcome.stdout.split("\t")[1].strip() == text
        assert "were cut" not in outcome.stderr
    pictures = [tmp_path / f"photos/{name}.png" for name in captions]
    model, short = ("--model_name_or_path", tmp_path / "run"), ("--max_new_tokens", 150)
    for output in ((), ("--output", tmp_path / "o.jsonl", "--shard_size", 1), ("--output_format", "txt")):
        outcome = tiny.run("infer.py", *pictures, *model, *short, *output)
        assert "1 of 3 captions were cut at max_new_tokens, 150" in outcome.stderr
    scoring = (
        "--dataset_name",
        source,
        "--split",
        "train",
        "--meteor",
        "false",
        "--spice",
        "false",
        "--report",
        "false",
    )
    scoring += ("--bootstrap_samples", 0, "--score_trained_images", "true")
    for number, (cut, processes, more) in enumerate(
        [(1, 1, short), (1, 2, short), (0, 1, ()), (0, 1, ("--sweep", "max_new_tokens=150,301,302"))]
    ):
        folder = tmp_path / f"scores{number}"
        tiny.run("evaluate.py", *model, *scoring, *more, "--output_dir", folder, processes=processes)
        assert json.loads((folder / "coco_metrics.json").read_text())["counts"]["cut_captions"] == cut


def test_a_run_says_how_many_captions_it_cuts(dataset, tmp_path):
    run = tiny.run("train.py", *flags(tmp_path, dataset, tmp_path / "out", num_train_epochs=1, max_txt_len=7))
    train = sum(2 for split in SPLITS.values() if split == "train")
    assert (
        f"of {train} training captions, the longest of 9 tokens, {train} are cut, and the model does not" in run.stderr
    )

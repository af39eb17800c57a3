"""Every script takes every family: the cells of the README's table, a test each.

The scripts' own main() runs in this process, as importing the libraries takes longer than what they do here.
"""

import json
import re
import shutil

import families
import places
import pytest
import tiny
import torch
from peft import PeftModel
from places import script
from safetensors.torch import load_file, save_file
from small_run import CAPTIONS, SPLITS, checkpoints
from transformers import AutoConfig

import data
from captioner import Captioner
from collator import CaptionCollator
from common import processes
from models.families import special_tokens
from models.loading import load_model
from objectives import caption_loss

FEW = [f"photo{i}" for i in (0, 1, 2, 3, 6, 9)]  # three to train with, one or two of the other splits


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    captions = {name: CAPTIONS[name] for name in FEW}
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), captions, {name: SPLITS[name] for name in FEW})


@pytest.fixture(scope="module", params=families.NAMES)
def base(request, tmp_path_factory):
    """The folder of a family's tiny model, as its publisher would have saved it."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = families.build(request.param)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


def train(base, dataset, output, **changed) -> None:
    values = {
        "model_name_or_path": base, "dataset_name": dataset, "output_dir": output, "num_train_epochs": 2,
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "gradient_checkpointing": "true", "num_beams": 2, "max_new_tokens": 6, "meteor": "false", "spice": "false",
        "bootstrap_samples": 0, "length_penalty": 0.5, "no_repeat_ngram_size": 2,
    }  # fmt: skip
    if "pix2struct" in str(base):
        values["gradient_checkpointing"] = "false"  # the library has none for it
    script("train", *[word for key, value in (values | changed).items() for word in (f"--{key}", value)])


# The checkpoint of the highest loss is the best one: the first of two, so that the last is not the one to end with.
FIRST_IS_BEST = {"metric_for_best_model": "loss", "greater_is_better": "true"}
LORA = FIRST_IS_BEST | {"use_peft": "true", "lora_r": 4, "prompt": 'a "small"\n`dog` of', "keep_prompt": "true"}


@pytest.fixture(scope="module")
def trained(base, dataset):
    train(base, dataset, base.parent / "trained", **FIRST_IS_BEST)
    return base.parent / "trained"


@pytest.fixture(scope="module")
def adapted(base, dataset):
    train(base, dataset, base.parent / "adapted", **LORA)
    return base.parent / "adapted"


def weights_of(folder) -> dict:
    return {
        name: tensor for file in sorted(folder.glob("*model*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_equal(ones: dict, others: dict) -> None:
    assert ones.keys() == others.keys()
    assert [name for name in ones if not ones[name].equal(others[name])] == []


DRAWS_IMAGES = r"model\.(vqmodel|generation_)"  # the half of Janus that captions never go through


def captions_of(folder, dataset) -> dict:
    return {row["image_id"]: row["caption"] for row in json.loads((folder / "predictions.json").read_text())}


def test_train(trained, base):
    state = json.loads((trained / "trainer_state.json").read_text())
    assert all("eval_loss" in row for row in state["log_history"] if "eval_CIDEr" in row)
    scores = json.loads((trained / "coco_metrics.json").read_text())
    assert scores["generation"]["length_penalty"] == 0.5
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    read = [name for name in before if not re.match(DRAWS_IMAGES, name)]
    assert sum(not before[name].equal(after[name]) for name in read) > len(read) / 2
    ends = [special_tokens(AutoConfig.from_pretrained(folder)) for folder in (base, trained)]
    assert ends[0] == ends[1]  # the Trainer would put the tokenizer's end in place of the model's


def test_eval_loss_is_the_mean_over_all_target_tokens(trained, dataset):
    checkpoint = checkpoints(trained)[0]
    model, processor = load_model(str(checkpoint))
    collator = CaptionCollator(processor, model.config, prompt=model.config.caption_prompt)
    total = tokens = 0
    for record in data.load(str(dataset))["validation"]:
        for caption in record["captions"]:
            batch = collator([{**record, "captions": [caption], "epoch": 0}])
            with torch.no_grad():
                total += caption_loss(model.eval(), batch, num_items_in_batch=1).item()
            tokens += len(collator.images.target_ids([caption])[0])
    (logged,) = [
        row["eval_loss"]
        for row in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in row
    ]
    assert logged == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_evaluate(kind, base, dataset, request, tmp_path):
    trained = request.getfixturevalue(kind)
    flags = ("--dataset_name", dataset, "--meteor", "false", "--spice", "false", "--bootstrap_samples", "0")
    script("evaluate", "--model_name_or_path", trained, *flags, "--output_dir", tmp_path / "scores")
    scores, before = (json.loads((f / "coco_metrics.json").read_text()) for f in (tmp_path / "scores", trained))
    assert scores["CIDEr"] == before["CIDEr"]
    assert scores["generation"] == before["generation"]
    assert captions_of(tmp_path / "scores", dataset) == captions_of(trained, dataset)


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_the_same_captions_everywhere(kind, base, dataset, request, tmp_path, monkeypatch):
    """predictions.json byte for byte: infer.py, the demo, the endpoint, an exported folder and the card's own code."""
    pytest.importorskip("gradio", reason="gradio is not installed (requirements-dev.txt)")
    folder = request.getfixturevalue(kind)
    expected = captions_of(folder, dataset) | captions_of(folder / "validation", dataset)
    images = [dataset.parent / name for name in expected]
    # On processors of both kinds, as far as they say so themselves.
    monkeypatch.setattr(processes, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16 amx_bf16")
    said = places.captions(folder, images, tmp_path)
    (tmp_path / "cpuinfo").write_text("flags : avx2")
    said["infer with AVX2"] = places.by_infer(folder, images, tmp_path / "avx2.jsonl")
    assert said == {place: list(expected.values()) for place in said}


def test_lora(adapted, base):
    """Only the adapter is saved, all of it moved, in the last checkpoint as in the best; the base is untouched."""
    weights = load_file(adapted / "adapter_model.safetensors")
    assert not (adapted / "model.safetensors").exists()
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)  # it starts as zeros
    if base.parent.name.startswith(("blip2", "instructblip")):
        assert any("qformer" in name for name in weights)
        assert any("language_model" in name for name in weights)
    state = json.loads((adapted / "trainer_state.json").read_text())
    best = load_file(adapted / f"checkpoint-{state['best_global_step']}" / "adapter_model.safetensors")
    assert weights.keys() == best.keys()
    assert all(weights[name].equal(best[name]) for name in weights)
    model, _ = load_model(str(adapted), merge=False)
    assert isinstance(model, PeftModel)
    original, _ = load_model(str(base))
    loaded = dict(model.get_base_model().named_parameters())
    for name, parameter in original.named_parameters():
        same = loaded.get(name, loaded.get(name.rpartition(".")[0] + ".base_layer." + name.rpartition(".")[2]))
        assert same.equal(parameter), name


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_best_is_final(kind, base, request):
    """The folder's weights are those of the checkpoint that trainer_state.json names, bit for bit, and not the last."""
    folder = request.getfixturevalue(kind)
    state = json.loads((folder / "trainer_state.json").read_text())
    first, last = map(weights_of, checkpoints(folder))
    assert state["best_global_step"] == state["global_step"] // 2
    assert_equal(weights_of(folder), first)
    assert any(not first[name].equal(last[name]) for name in first)


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_resumed_is_unbroken(kind, base, dataset, request, tmp_path):
    whole = request.getfixturevalue(kind)
    stopped, (first, last) = tmp_path / "stopped", checkpoints(whole)
    shutil.copytree(first, stopped / first.name)
    shutil.copy(whole / "run.json", stopped)
    train(base, dataset, stopped, **(LORA if kind == "adapted" else FIRST_IS_BEST))
    assert_equal(weights_of(stopped / last.name), weights_of(last))
    assert_equal(weights_of(stopped), weights_of(first))


def test_a_checkpoint_whose_weights_have_no_place_is_an_error(trained, base, dataset, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints(trained)[0], checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[f"old.{name}"] = weights.pop(name)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks [12] weights.*old.{re.escape(name)}"):
        train(base, dataset, tmp_path / "run", resume_from_checkpoint=checkpoint)


def test_export(adapted, dataset, tmp_path):
    """The adapter and the merged model that stands alone give the same captions, and the base gives others."""
    script("export", adapted, "--output_dir", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert not (tmp_path / "exported" / "adapter_config.json").exists()
    images = sorted(map(str, dataset.parent.glob("*.png")))
    put_on, processor = load_model(str(adapted), merge=False)
    ours = Captioner(put_on.eval(), processor)
    alone = Captioner.from_pretrained(str(tmp_path / "exported"))
    assert alone.settings == ours.settings
    assert alone.prompt == ours.prompt
    assert alone(images) == ours(images)
    batch = ours.collator([{"image": images[0], "image_id": "0"}])
    words = alone.model.config.get_text_config().vocab_size - 3  # special tokens are at the front
    batch = ours.training_batch(batch, [[words, words + 1, words + 2]])
    with torch.no_grad():
        logits = [model(**batch).logits for model in (put_on.get_base_model(), alone.model)]
        with put_on.disable_adapter():
            logits.append(put_on(**batch).logits)
    assert logits[0].allclose(logits[1], atol=1e-3)
    assert not logits[0].allclose(logits[2], atol=1e-3)


def test_scst(trained, dataset, tmp_path):
    train(trained, dataset, tmp_path / "scst", objective="scst", num_train_epochs=1, scst_samples=3, ce_weight=0.3)
    state = json.loads((tmp_path / "scst" / "trainer_state.json").read_text())
    assert any("reward" in row and "advantage" in row for row in state["log_history"]), state["log_history"]
    before, after = load_file(trained / "model.safetensors"), load_file(tmp_path / "scst" / "model.safetensors")
    assert any(not before[name].equal(after[name]) for name in before)


def test_dico(trained, dataset, tmp_path):
    flags = {"objective": "dico", "num_train_epochs": 1, "dico_candidates": 2}
    train(trained, dataset, tmp_path / "dico", **flags)
    state = json.loads((tmp_path / "dico" / "trainer_state.json").read_text())
    assert any("reward_best" in row and "margin" in row for row in state["log_history"]), state["log_history"]
    before, after = load_file(trained / "model.safetensors"), load_file(tmp_path / "dico" / "model.safetensors")
    assert any(not before[name].equal(after[name]) for name in before)

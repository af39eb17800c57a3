"""What is said of adapters, precision and families that cannot be, and what old checkpoints lack."""

import json
import shutil

import families
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import flags
from test_family_scripts import train
from transformers import BertConfig, BertModel

from captioner import Captioner
from models.adapters import add_adapter
from models.loading import load_model, ready


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("base"))


def test_targets_that_match_nothing_are_an_error_that_lists_what_there_is(base):
    model, _ = load_model(str(base))
    with pytest.raises(ValueError, match=r"'q_proj' matches no linear layer of .* It has: .*text_decoder\.bert"):
        add_adapter(model, r=4, alpha=8, dropout=0.0, targets="q_proj")


def test_a_module_to_save_that_is_not_there_is_an_error(base):
    model, _ = load_model(str(base))
    with pytest.raises(ValueError, match="has no module lm_head"):
        add_adapter(model, r=4, alpha=8, dropout=0.0, modules_to_save=["lm_head"])


def test_modules_to_save_are_trained_whole(base, dataset, tmp_path):
    flags = {"use_peft": "true", "modules_to_save": "predictions.transform.dense", "num_train_epochs": 1}
    train(base, dataset, tmp_path / "out", **flags)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = next(name for name in saved if name.endswith("transform.dense.weight"))
    before, _ = load_model(str(base))
    assert not before.text_decoder.cls.predictions.transform.dense.weight.equal(saved[name])


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder of an adapter whose values are not those of a new one."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = load_model(str(base))
    add_adapter(model, r=4, alpha=8, dropout=0.25, targets=".*(query|dense)").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_an_adapter_that_is_trained_further_keeps_its_values_and_the_run_says_them(adapter, dataset, tmp_path):
    train(adapter, dataset, tmp_path / "out", use_peft="true", num_train_epochs=1, lora_targets=".*(query|dense)")
    own = json.loads((tmp_path / "out/adapter_config.json").read_text())
    run = json.loads((tmp_path / "out/run.json").read_text())
    values = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.25}
    assert {name: own[name.replace("lora_r", "r")] for name in values} == values
    assert {name: run["flags"][name] for name in values} == values
    facts = run["model"]["adapter"]
    assert (facts["r"], facts["lora_alpha"], facts["lora_dropout"], facts["modules_to_save"]) == (4, 8, 0.25, [])
    assert sum(facts["layers"].values()) == len(own["target_modules"])
    assert all(name.endswith(("query", "dense")) for name in facts["layers"])
    card = (tmp_path / "out/README.md").read_text()
    assert "An adapter (LoRA) of rank 4, alpha 8, dropout 0.25, on " in card
    assert "| lora_r | 4 |" in card


def test_a_run_says_the_values_of_a_new_adapter(base, dataset, tmp_path):
    train(base, dataset, tmp_path / "out", use_peft="true", num_train_epochs=1, lora_alpha=64)
    run = json.loads((tmp_path / "out/run.json").read_text())
    recorded = [run["flags"][name] for name in ("lora_r", "lora_alpha", "lora_dropout", "modules_to_save")]
    assert recorded == [16, 64, 0.05, []]
    assert (run["model"]["adapter"]["r"], run["model"]["adapter"]["lora_alpha"]) == (16, 64)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lora_r", 16),
        ("lora_alpha", 32),
        ("lora_dropout", 0.05),
        ("modules_to_save", ["cls"]),
        ("lora_targets", ".*key"),
    ],
)
def test_a_flag_that_contradicts_the_adapter_is_refused(adapter, dataset, tmp_path, flag, value):
    words = value if isinstance(value, list) else [value]
    command = ["--model_name_or_path", adapter, "--dataset_name", dataset, "--output_dir", tmp_path / "out"]
    command += ["--use_peft", "true", "--meteor", "false", "--spice", "false"]
    message = tiny.run("train.py", *command, f"--{flag}", *words, fails=True).stderr
    assert f"--{flag} {value}: the adapter" in message
    assert message.strip().endswith("Leave the flag out.")


def test_an_adapter_needs_a_trained_model(dataset, tmp_path):
    command = flags(tmp_path, dataset, tmp_path / "out")
    assert "give --model_name_or_path" in tiny.run("train.py", *command, "--use_peft", "true", fails=True).stderr


def test_a_base_model_that_has_moved_is_named(base, dataset, tmp_path):
    moved = base.parent / "moved"
    train(base, dataset, tmp_path / "out", use_peft="true", num_train_epochs=1)
    base.rename(moved)
    try:
        with pytest.raises(ValueError, match=rf"is an adapter, and its base model does not load: .*{base.name}"):
            load_model(str(tmp_path / "out"))
    finally:
        moved.rename(base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here: quantisation is not refused")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantisation_is_refused_without_a_gpu(base, quantization):
    with pytest.raises(ValueError, match=f"quantization {quantization} needs a CUDA GPU"):
        load_model(str(base), quantization=quantization)


def test_float16_weights_are_refused(base):
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        load_model(str(base), dtype="float16")


def test_bfloat16_weights_train_an_adapter_in_float32(base, dataset, tmp_path):
    train(base, dataset, tmp_path / "out", use_peft="true", dtype="bfloat16", num_train_epochs=1)
    model, _ = load_model(str(tmp_path / "out"), dtype="bfloat16", merge=False)
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if "lora" in name}
    assert kinds == {torch.float32}
    assert model.text_decoder.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_an_unknown_family_is_told_the_known_ones(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"family 'bert'\. Known families: blip, blip-2, .*git, .*idefics3"):
        load_model(str(tmp_path))


def test_image_tokens_that_an_old_blip2_checkpoint_lacks_are_filled_in():
    """As Salesforce/blip2-opt-2.7b was until transformers 4.46."""
    model, processor = families.build("blip2-opt")
    images = [Image.new("RGB", (40, 40), "red")]
    expected = Captioner(model.eval(), processor, max_new_tokens=5)(images)
    model.config.image_token_index = None
    processor.num_query_tokens = None
    ready(model, processor)
    assert processor.num_query_tokens == 4
    assert model.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert Captioner(model, processor, max_new_tokens=5)(images) == expected


def test_an_adapter_of_the_hub_is_asked_as_it_was_trained(base, adapter, tmp_path):
    """From the Hub's cache on this machine: its own prompt and settings, not those of its base model."""
    images = tmp_path / "photos"
    images.mkdir()
    Image.new("RGB", (32, 32), "red").save(images / "red.png")
    (images / "list.csv").write_text("image,kind\nred.png,a red\n")
    snapshot = tmp_path / "hub/models--me--lora/snapshots/0123"
    shutil.copytree(adapter, snapshot)
    (tmp_path / "hub/models--me--lora/refs").mkdir()
    (tmp_path / "hub/models--me--lora/refs/main").write_text("0123")
    config = json.loads((base / "config.json").read_text()) | {"caption_prompt": "{kind} circle", "caption_text": {}}
    (snapshot / "config.json").write_text(json.dumps(config | {"caption_text": {"keep_prompt": True}}))
    (snapshot / "generation_config.json").write_text(json.dumps({"num_beams": 1, "max_new_tokens": 3}))
    asked = [
        tiny.run(
            "infer.py", images / "list.csv", "--model_name_or_path", name, HF_HUB_CACHE=str(tmp_path / "hub")
        ).stdout
        for name in ("me/lora", snapshot)
    ]
    assert asked[0] == asked[1]
    assert len(asked[0].split("\t")[1].split()) in range(3, 7)
    assert "\ta red circle" in asked[0]

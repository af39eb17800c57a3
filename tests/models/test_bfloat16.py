"""Captioning with bfloat16 weights: where it is the default, and that it says what float32 says to its rounding."""

import json
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import flags
from transformers import BlipForConditionalGeneration

import evaluate as evaluate_script
import infer as infer_script
from arguments import EVALUATE_GROUPS, INFER_GROUPS
from benchmarks import harness
from captioner import Captioner
from common.cli import parse
from models.adapters import add_adapter
from models.loading import load_model
from objectives.cross_entropy import mean_log_probs
from training.building import as_loaded

IMAGES = [Image.effect_noise((48, 40), 90 + 60 * number).convert("RGB") for number in range(3)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni", True),
        ("flags\t\t: fpu avx2 amx_tile amx_bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("Features\t: fp asimd bf16", False),  # ARM: not looked at
    ],
)
def test_bfloat16_is_told_from_the_processor(flags, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 in a name\n{flags}\n")
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "cpuinfo")
    assert harness.has_bfloat16(torch.device("cpu")) == expected
    assert not harness.has_bfloat16(torch.device("mps"))
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "none")
    assert not harness.has_bfloat16(torch.device("cpu"))


@pytest.fixture
def model_folder(tmp_path_factory):
    return str(tiny.build_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("named", ["avx2", "avx2 avx512_bf16 amx_bf16"])
def test_on_every_processor_every_script_has_one_precision(named, asked, model_folder, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {named}\n")
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "cpuinfo")
    words = [] if asked is None else ["--bf16", str(asked)]
    words = ["--model_name_or_path", model_folder, "--device", "cpu", *words]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words, "--output_dir", str(tmp_path / "out")])
    model_args, _, generation_args, _, args, _ = parse(EVALUATE_GROUPS)
    monkeypatch.setattr("sys.argv", ["infer.py", "photo.jpg", *words])
    (tmp_path / "photo.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    *infer_args, _ = parse(INFER_GROUPS, positional="paths")
    loaded = [
        Captioner.from_pretrained(model_folder, device="cpu", bf16=asked),
        evaluate_script.load_captioner(model_args, generation_args, args),
        infer_script.load_captioner(*infer_args)[0],
    ]
    expected = torch.bfloat16 if asked else torch.float32
    assert [one.model.dtype for one in loaded] == [expected] * 3
    assert {one.description()["precision"] for one in loaded} == {str(expected).removeprefix("torch.")}


def test_captions_are_those_of_the_librarys_bfloat16_model(model_folder):
    ours = Captioner.from_pretrained(model_folder, device="cpu", bf16=True, num_beams=3, max_new_tokens=8)
    theirs = BlipForConditionalGeneration.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    batch = ours.collator([{"image": image, "image_id": ""} for image in IMAGES])
    settings = {"num_beams": 3, "max_new_tokens": 8, "early_stopping": True}
    expected = theirs.generate(pixel_values=batch["pixel_values"].bfloat16(), **settings)
    assert torch.equal(ours.generate_tokens(batch), expected[:, 1:])


def test_a_run_in_bfloat16_captions_as_all_scripts_do_in_bfloat16(dataset, tmp_path):
    """Trained under autocast with float32 weights; captioned, as by the others, with bfloat16 weights."""
    out, given = tmp_path / "out", ("--bf16", "true")
    tiny.run("train.py", *flags(tmp_path, dataset, out, num_train_epochs=1), *given, "--report", "false")
    expected = {row["image_id"]: row["caption"] for row in json.loads((out / "predictions.json").read_text())}
    assert json.loads((out / "coco_metrics.json").read_text())["generation"]["precision"] == "bfloat16"
    images = [dataset.parent / name for name in expected]
    said = tiny.run("infer.py", *images, "--model_name_or_path", out, *given).stdout
    assert [line.partition("\t")[2] for line in said.splitlines()] == list(expected.values())
    saved = load_file(next(out.glob("*model.safetensors")))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", families.NAMES)
def test_a_trained_adapter_becomes_what_is_loaded_of_it_to_the_bit(name, rounded, tmp_path):
    model, processor = families.build(name)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, processor = load_model(str(tmp_path / "base"))
    trained = Captioner(add_adapter(model, r=4, alpha=8, dropout=0.0), processor, autocast=torch.bfloat16)
    for parameter_name, parameter in trained.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.model.save_pretrained(tmp_path / "adapter")
    args = SimpleNamespace(bf16=rounded, fp16=False, device=torch.device("cpu"))
    trained = as_loaded(trained, SimpleNamespace(dtype="float32"), args)
    loaded = Captioner.from_pretrained(str(tmp_path / "adapter"), device="cpu", bf16=rounded, prompt=trained.prompt)
    batch = trained.collator([{"image": image, "image_id": ""} for image in IMAGES])
    words = trained.model.config.get_text_config().vocab_size - 3  # special tokens are at the front
    rows = [[words, words + 1, words + 2]] * len(IMAGES)
    with torch.inference_mode():
        scores = [mean_log_probs(one.model.eval(), one.training_batch(batch, rows)) for one in (trained, loaded)]
    assert scores[0].equal(scores[1])
    assert trained.description() == loaded.description()


# Kernels for a processor with AVX2 and no more.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def test_another_processor_writes_the_same_captions(model_folder, dataset):
    images = sorted(dataset.parent.glob("*.png"))
    command = ("infer.py", *images, "--model_name_or_path", model_folder, "--num_beams", 3, "--max_new_tokens", 8)
    assert tiny.run(*command, **AVX2).stdout == tiny.run(*command).stdout


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_scores_its_captions_as_in_float32(name, tmp_path):
    model, processor = families.build(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rough, exact = (
        Captioner.from_pretrained(str(tmp_path), device="cpu", bf16=bf16, num_beams=2, max_new_tokens=6)
        for bf16 in (True, False)
    )
    assert all(weight.dtype == torch.bfloat16 for weight in rough.model.parameters())
    samples = [{"image": image, "image_id": str(number)} for number, image in enumerate(IMAGES)]
    batch = rough.collator(samples)
    rows = rough.rows(rough.generate_tokens(rough.encode(batch)))
    with torch.inference_mode():
        scores = [mean_log_probs(one.model, one.training_batch(one.collator(samples), rows)) for one in (rough, exact)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0.02, atol=0.05)

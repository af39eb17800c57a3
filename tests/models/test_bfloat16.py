"""Captioning with bfloat16 weights: where it is the default, and that it says what float32 says to its rounding."""

import families
import pytest
import tiny
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

import captioner as captioner_module
import evaluate as evaluate_script
from arguments import EVALUATE_GROUPS
from captioner import Captioner
from common import processes
from common.cli import parse
from objectives.cross_entropy import mean_log_probs

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
    monkeypatch.setattr(processes, "CPUINFO", tmp_path / "cpuinfo")
    assert processes.has_bfloat16(torch.device("cpu")) == expected
    assert not processes.has_bfloat16(torch.device("mps"))
    monkeypatch.setattr(processes, "CPUINFO", tmp_path / "none")
    assert not processes.has_bfloat16(torch.device("cpu"))


@pytest.fixture
def model_folder(tmp_path_factory):
    return str(tiny.build_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("has", [True, False])
def test_the_default_is_what_the_processor_has_and_evaluates_is_float32(has, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(captioner_module, "has_bfloat16", lambda device: has)
    found = Captioner.from_pretrained(model_folder, device="cpu")
    assert found.model.dtype == (torch.bfloat16 if has else torch.float32)
    assert found.description()["precision"] == ("bfloat16" if has else "float32")
    assert all(isinstance(caption, str) for caption in found(IMAGES))
    for asked, dtype in (
        ([], torch.float32),
        (["--bf16", "true"], torch.bfloat16),
        (["--bf16", "false"], torch.float32),
    ):
        words = ["--model_name_or_path", model_folder, "--output_dir", str(tmp_path / "out"), "--device", "cpu", *asked]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
        model_args, _, generation_args, _, args = parse(EVALUATE_GROUPS)
        assert evaluate_script.load_captioner(model_args, generation_args, args).model.dtype == dtype


def test_captions_are_those_of_the_librarys_bfloat16_model(model_folder):
    ours = Captioner.from_pretrained(model_folder, device="cpu", bf16=True, num_beams=3, max_new_tokens=8)
    theirs = BlipForConditionalGeneration.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    batch = ours.collator([{"image": image, "image_id": ""} for image in IMAGES])
    settings = {"num_beams": 3, "max_new_tokens": 8, "early_stopping": True}
    expected = theirs.generate(pixel_values=batch["pixel_values"].bfloat16(), **settings)
    assert torch.equal(ours.generate_tokens(batch), expected[:, 1:])


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

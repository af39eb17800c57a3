"""What the scripts do where a library, or a package that it asks for, is not the one that they were written for."""

import importlib.util
import json
import sys

import families
import pytest
import torch
from conftest import ROOT
from transformers import GitVisionModel, PreTrainedModel, ViTModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from models.families import FAMILIES, vision_encoder
from models.loading import load_model
from models.vision import encode_images, take_encoded_images, takes_encoded

sys.path.insert(0, str(ROOT / "sagemaker"))
import bundle


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_installed_release_has_the_class_of_every_family(kind):
    assert issubclass(FAMILIES[kind].model_class, PreTrainedModel | _BaseAutoModelClass)


def test_a_vision_encoder_with_new_arguments_stays_the_librarys(monkeypatch, caplog):
    plain = GitVisionModel.forward

    def forward(self, images=None, interpolate_pos_encoding=False, **kwargs):
        return plain(self, images, interpolate_pos_encoding, **kwargs)

    monkeypatch.setattr(GitVisionModel, "forward", forward)
    model, _ = families.build("git")
    assert type(vision_encoder(model)) is GitVisionModel
    assert not takes_encoded(vision_encoder(model))
    [record] = [record for record in caplog.records if record.name == "models.vision"]
    assert (
        "GitVisionModel.forward takes (images, interpolate_pos_encoding, kwargs), which is new" in record.getMessage()
    )
    monkeypatch.undo()
    assert takes_encoded(vision_encoder(take_encoded_images(model)))
    encoded = encode_images(model, torch.randn(2, 3, families.SIDE, families.SIDE))
    with pytest.raises(TypeError, match="output_hidden_states"):
        vision_encoder(model)(encoded, output_hidden_states=True)


def test_a_vision_encoder_that_takes_encoded_images_swallows_no_argument_of_pixels():
    model, _ = families.build("git")
    vision, pixels = vision_encoder(model).eval(), torch.randn(2, 3, 2 * families.SIDE, 2 * families.SIDE)
    expected = GitVisionModel.forward(vision, pixels, interpolate_pos_encoding=True).last_hidden_state
    assert vision(pixels, True).last_hidden_state.equal(expected)  # without it, pictures of this size are refused


def test_a_vision_encoder_of_one_channel_stays_the_librarys():
    """A picture of one channel could not be told from an encoded one."""
    model, _ = families.build("vit-gpt2")
    vision = vision_encoder(model)
    vision.__class__, vision.config.num_channels = ViTModel, 1
    assert not takes_encoded(vision_encoder(take_encoded_images(model)))
    vision.config.num_channels = 3
    assert takes_encoded(vision_encoder(take_encoded_images(model)))


@pytest.mark.parametrize(("kind", "module"), [("SmolVLM", "torchvision"), ("Qwen2VL", "torchvision")])
def test_a_package_that_a_processor_asks_for_is_named_in_one_line(kind, module, tmp_path):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is here")
    model, processor = families.build("idefics3")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(settings | {"processor_class": f"{kind}Processor"}))
    (tmp_path / "video_preprocessor_config.json").write_text(
        json.dumps({"video_processor_type": f"{kind}VideoProcessor"})
    )
    with pytest.raises(ValueError, match=rf"needs {module}, which is not installed: pip install {module}\.") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["requirements.txt", "sagemaker/requirements-serving.txt"])
def test_sagemaker_installs_the_versions_that_the_tests_run_with(path):
    pins = dict(line.split(" ;")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    lines = bundle.requirements(path).splitlines()
    for package in ("transformers", "accelerate", "datasets", "peft"):
        assert any(line.split(" ;")[0] == f"{package}=={pins[package]}" for line in lines)
    assert not any(line.startswith(("torch==", "numpy==")) for line in lines)  # the image's own

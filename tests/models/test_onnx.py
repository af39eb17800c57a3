"""A captioner as ONNX graphs gives the captions of the model that they were made from, whatever the settings."""

import shutil

import families
import pytest
import tiny
import torch
from PIL import Image
from transformers import GenerationConfig

from captioner import Captioner
from demo_page import candidates, heat_maps
from models.loading import load_model, ready
from models.onnx_export import write_graphs
from models.onnx_model import DECODER, IMAGES, OnnxModel

pytest.importorskip("onnxruntime")
NAMES = [name for name in families.NAMES if getattr(name, "values", [name])[0] in ("git", "blip2-opt", "vit-gpt2")]
SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 5},
    {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "prompt": "a man"},
    {
        "num_beams": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 3,
        "num_return_sequences": 3,
    },
]


def check_equal_captions(model, processor, folder):
    graphs, written = OnnxModel(model.config, folder), set()
    for settings in SETTINGS:
        ours, theirs = (Captioner(m, processor, max_new_tokens=8, **settings) for m in (graphs, model))
        pictures = [Image.effect_noise((40, 30 + i), 60).convert("RGB") for i in range(5)]
        batch = ours.collator([{"image": picture, "image_id": str(i)} for i, picture in enumerate(pictures)])
        for few in (batch, {n: v[:1] if isinstance(v, torch.Tensor) else v for n, v in batch.items()}):
            tokens = ours.generate_tokens(dict(few))
            assert torch.equal(tokens, theirs.generate_tokens(dict(few))), settings
            written |= {*tokens.flatten().tolist()}
    assert len(written) > 5


@pytest.mark.slow  # test_scripts has BLIP's captions
@pytest.mark.parametrize("name", NAMES)
def test_families(name, tmp_path):
    model, processor = families.build(name)
    model = ready(model.eval(), processor)
    for parameter in model.parameters():
        parameter.data *= 1.5  # else all captions are alike
    write_graphs(model, tmp_path)
    check_equal_captions(model, processor, tmp_path)


def test_what_cannot_be_written(tmp_path):
    model, _ = families.build("blip2-t5")
    with pytest.raises(ValueError, match=r"format onnx writes blip, git.*not blip-2"):
        write_graphs(model, tmp_path)


def test_scripts(tmp_path):
    """export.py writes graphs, in float32 and in 8 bits; every script captions with them as with the model, with its own settings;
    what cannot be is one line."""
    model = tiny.build_folder(tmp_path, seed=1)
    own = {"num_beams": 3, "max_new_tokens": 7, "repetition_penalty": 1.3}  # unlike the defaults
    settings = GenerationConfig.from_pretrained(model)
    settings.update(**own)
    settings.save_pretrained(model)
    photos = tiny.write_photos(tmp_path / "photos", {name: ["a red circle"] for name in "abcdef"}).parent
    few = ["--meteor", "false", "--spice", "false", "--bootstrap_samples", "0", "--score_trained_images", "true"]
    score = ["evaluate.py", photos / "data.jsonl", *few, "--model_name_or_path"]
    tiny.run(*score, model, "--output_dir", tmp_path / "scores")
    shutil.copy(tmp_path / "scores/coco_metrics.json", model)
    (model / "run.json").write_text('{"flags": {}}')
    export = ["export.py", model, "--format", "onnx"]
    tiny.run(*export, "--output_dir", tmp_path / "onnx")
    check_equal_captions(*load_model(str(model)), tmp_path / "onnx")
    said = [
        tiny.run("infer.py", photos, "--model_name_or_path", folder).stdout for folder in (model, tmp_path / "onnx")
    ]
    assert said[0] == said[1] != ""
    captioner = Captioner.from_pretrained(str(tmp_path / "onnx"))
    assert own.items() <= captioner.settings.items()
    picture = Image.open(photos / "a.png")
    assert [text for text, _ in candidates(captioner, picture)] == [said[0].splitlines()[0].split("\t")[1]]
    assert heat_maps(captioner, picture, "a red circle") == ""
    tiny.run(*score, tmp_path / "onnx", "--output_dir", tmp_path / "scores of onnx")
    predicted = [(tmp_path / folder / "predictions.json").read_bytes() for folder in ("scores", "scores of onnx")]
    assert predicted[0] == predicted[1]
    assert (tmp_path / "scores of onnx/report.html").exists()
    card = (tmp_path / "onnx/README.md").read_text()
    assert "from captioner import Captioner" in card
    assert "library_name: onnx" in card

    tiny.run(*export, "--int8", "--output_dir", tmp_path / "int8")
    for name in (IMAGES, DECODER):
        assert (tmp_path / "int8" / name).stat().st_size < (tmp_path / "onnx" / name).stat().st_size
    whole, rounded = (OnnxModel(load_model(str(tmp_path / f))[0].config, tmp_path / f) for f in ("onnx", "int8"))
    pixels = torch.rand(2, 3, 32, 32)
    logits = []
    for graphs in (whole, rounded):
        states = graphs.read(pixels)
        past = [state.new_empty(2, 1, state.shape[1], 0, state.shape[3]) for state in states]
        logits.append(graphs.next_logits(torch.zeros(2, 1, 1, dtype=torch.long), states, past)[0])
    difference = (logits[0] - logits[1]).abs().max() / logits[0].std()
    assert 0 < difference < 0.3
    assert Captioner.from_pretrained(tmp_path / "int8").description()["precision"] == "int8"
    assert (tmp_path / "onnx/coco_metrics.json").exists()
    assert not (tmp_path / "int8/coco_metrics.json").exists(), "its captions are others"

    graphs = tmp_path / "onnx"
    refused = tiny.run("infer.py", photos, "--model_name_or_path", graphs, "--bf16", "true", fails=True).stderr
    assert "holds ONNX graphs" in refused
    data = photos / "data.jsonl"
    refused = tiny.run("train.py", "--model_name_or_path", graphs, "--dataset_name", data, fails=True).stderr
    assert "are not trained" in refused
    assert "output_dir" in tiny.run(*export, fails=True).stderr
    assert "--format onnx" in tiny.run("export.py", model, "--int8", fails=True).stderr

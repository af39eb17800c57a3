"""Kept features of a frozen encoder: the training they give is that of the encoder itself, wherever they are kept."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from small_run import SPLITS, flags, weights

import data
from arguments import TrainArguments
from captioner import Captioner
from collator import CaptionCollator
from data.prompts import PROMPTS
from models.families import vision_encoder
from models.vision import take_encoded_images
from objectives import CrossEntropy
from training.feature_cache import _why_not, image_keys, keep_features


def frozen(folder, **settings):
    model, processor = tiny.build(folder)
    model.vision_model.requires_grad_(False)
    return Captioner(model, processor, **settings)


def arguments(tmp_path, **changed):
    values = {"output_dir": str(tmp_path / "out"), "per_device_eval_batch_size": 1, "bf16": False, "fp16": False}
    return TrainArguments(**(values | changed))


def train_flags(tmp_path, dataset, name, place, **changed):
    values = {"freeze_vision": "true", "feature_cache": place, "num_train_epochs": 3}
    return flags(tmp_path, dataset, tmp_path / name, **(values | changed))


def log(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        name: [row[name] for row in rows if name in row] for name in ("loss", "grad_norm", "eval_loss", "eval_CIDEr")
    }


def test_loss_and_gradients_of_features_are_those_of_pixels(dataset, tmp_path):
    batch = compare_with_pixels(frozen(tmp_path), dataset, tmp_path)
    assert batch["pixel_values"].shape == (4, 17, 32)


def of(*names: str) -> list:
    return [one for one in families.NAMES if one.values[0] in names]


MORE = {  # of an image than its features
    "florence2": "this model's processor makes its prompt of the image itself",
    "kosmos-2": "this model's processor makes its prompt of the image itself",
    "pix2struct": "this model reads which rows are patches from another input than the features",
}


@pytest.mark.parametrize("name", of(*MORE))
def test_families_that_need_more_of_an_image_than_features_are_refused_and_trained_on_pixels(name, dataset, tmp_path):
    model, processor = families.build(name)
    vision_encoder(model).requires_grad_(False)
    splits = data.load(dataset)
    assert keep_features("auto", Captioner(model, processor), splits, arguments(tmp_path), None, 1) == {}
    with pytest.raises(ValueError, match=f"cannot be kept, as {MORE[name]}"):
        keep_features("memory", Captioner(model, processor), splits, arguments(tmp_path))


@pytest.mark.parametrize("name", of("git", "blip2-opt", "instructblip-vicuna", "vit-gpt2"))
def test_so_they_are_in_every_family_that_takes_encoded_images(name, dataset, tmp_path):
    model, processor = families.build(name)
    vision_encoder(model).requires_grad_(False)
    batch = compare_with_pixels(Captioner(model.eval(), processor), dataset, tmp_path)
    assert batch["pixel_values"].shape[:2] == (4, 1)


CHATS = ("paligemma", "idefics2", "idefics3-llama3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava",
         "llava_onevision", "internvl", "janus")  # fmt: skip


def chat_captioner(name, **settings):
    """Only the text decoder is trained, as with LoRA."""
    torch.manual_seed(0)
    model, processor = families.build(name)
    model.requires_grad_(False).get_decoder().requires_grad_(True)
    return Captioner(model.eval(), processor, **settings)


@pytest.mark.parametrize("name", of(*CHATS))
def test_chat_models_give_the_same_for_kept_features_as_for_pixels(name, tmp_path):
    """Batches, losses and gradients of pictures of several sizes, one and several captions each, from memory and files; and
    captions."""
    photos = {f"photo{i}": ["a dog runs", "two men in the water", "a woman"][: 1 + i % 3] for i in range(5)}
    splits = dict.fromkeys(photos, "train") | {"photo4": "validation"}
    records = data.load(tiny.write_photos(tmp_path / "photos", photos, splits))["train"]
    sizes = ((40, 40), (64, 30), (30, 90), (20, 20))
    for record, size in zip(records, sizes, strict=True):
        Image.open(record["image"]["path"]).resize(size).save(record["image"]["path"])
    captioner = chat_captioner(name, num_beams=2, max_new_tokens=2)
    model, args = captioner.model, arguments(tmp_path)
    places = [keep_features(str(place), captioner, {"train": records}, args) for place in ("memory", tmp_path / "kept")]
    for number in (1, 3):
        results = []
        for source in (records, *(place["train"] for place in places)):
            pairs = data.CaptionPairs(source, number)
            batch = CaptionCollator(captioner.processor, model.config, prompt=captioner.prompt)(
                [pairs[i] for i in range(4)]
            )
            model.zero_grad()
            loss = CrossEntropy(0.1)(model, batch)["loss"]
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((batch, loss.item(), gradients))
        (pixels, loss, gradients), *kept = results
        for batch, kept_loss, kept_gradients in kept:
            assert not [name for name in batch if name.startswith("pixel")]
            for key in [key for key in batch if not key.endswith("_features")]:
                alike = batch[key] == pixels[key]
                assert alike.all() if isinstance(alike, torch.Tensor) else alike, key
            assert kept_loss == pytest.approx(loss, rel=1e-6)
            assert kept_gradients.allclose(gradients, atol=1e-6)
    expected = captioner.caption_split(records)
    assert all(captioner.caption_split(place["train"]) == expected for place in places)


def test_a_chat_models_features_are_its_own_and_a_cut_file_is_made_anew(dataset, tmp_path):
    """Other weights of the projector, prompt or precision: other files. Other weights of the text decoder: the same."""
    records, folder, args = {"train": data.load(dataset)["train"]}, tmp_path / "kept", arguments(tmp_path)

    def kept(captioner):
        keep_features(str(folder), captioner, records, args)
        return {path for path in folder.rglob("*") if path.is_file()}

    captioner = chat_captioner("llava")
    first = kept(captioner)
    with torch.no_grad():
        captioner.model.lm_head.weight[0, 0] += 1
        captioner.model.get_decoder().norm.weight[0] += 1
    assert len(first) == len(records["train"])
    cut, content = min(first), min(first).read_bytes()
    cut.write_bytes(content[:-10])
    assert kept(captioner) == first
    assert cut.read_bytes() == content
    captioner.autocast = torch.bfloat16
    rounded = kept(captioner)
    assert max(path.stat().st_size for path in rounded - first) < len(content)
    asked = kept(chat_captioner("llava", prompt="two men"))
    with torch.no_grad():
        captioner = chat_captioner("llava")
        captioner.model.model.multi_modal_projector.linear_2.bias[0] += 1e-3
    projected = kept(captioner)
    assert [len(found) / len(first) for found in (first, rounded, asked, projected)] == [1, 2, 3, 4]


def test_what_forbids_a_chat_models_features_is_named(dataset, tmp_path):
    captioner, records = chat_captioner("llava"), {"train": data.load(dataset)["train"]}
    captioner.model.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match="through a projector that is trained"):
        keep_features("memory", captioner, records, arguments(tmp_path))
    assert keep_features("auto", captioner, records, arguments(tmp_path)) == {}
    captioner.model.requires_grad_(True)
    with pytest.raises(ValueError, match="its vision encoder is trained"):
        keep_features("memory", captioner, records, arguments(tmp_path))
    captioner.model.requires_grad_(False)
    asked = records["train"].add_column(PROMPTS, [["a"] * len(texts) for texts in records["train"]["captions"][:]])
    with pytest.raises(ValueError, match="prompts of their own"):
        keep_features("memory", captioner, {"train": asked}, arguments(tmp_path))
    with pytest.raises(ValueError, match="augmentation changes an image"):
        keep_features("memory", captioner, records, arguments(tmp_path), 1, data.Augmentation(["flip"]))


def test_an_adapter_of_a_chat_model_is_the_same_with_kept_features_and_after_a_resume(dataset, tmp_path):
    """Two epochs, three captions per image behind one prompt; the resumed run's cache was deleted."""
    model, processor = families.build("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    chosen = {
        "dataset_name": dataset, "model_name_or_path": tmp_path / "llava", "use_peft": "true", "num_train_epochs": 2,
        "learning_rate": 1e-2, "captions_per_image": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "num_beams": 1, "max_new_tokens": 4, "meteor": "false", "spice": "false", "bootstrap_samples": 50,
        "gradient_checkpointing": "false",
    }  # fmt: skip

    def train(name, place):
        flags = chosen | {"output_dir": tmp_path / name, "feature_cache": place}
        said = tiny.run("train.py", *[word for key, value in flags.items() for word in (f"--{key}", value)]).stderr
        return said, load_file(tmp_path / name / "adapter_model.safetensors"), log(tmp_path / name)

    _, pixels, expected = train("pixels", "off")
    said, kept, found = train("kept", tmp_path / "cache")
    assert "image features: 14 images x about" in said
    assert max((pixels[key] - kept[key]).abs().max().item() for key in pixels) <= 1e-5
    for row, values in found.items():
        assert values == pytest.approx(expected[row], rel=1e-4), row
    shutil.rmtree(tmp_path / "cache")
    for path in (tmp_path / "kept").iterdir():  # as after a kill behind the first epoch
        if path.name not in ("checkpoint-3", "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said, resumed, _ = train("kept", tmp_path / "cache")
    assert "resuming from" in said
    assert all(kept[key].equal(resumed[key]) for key in kept)


def compare_with_pixels(captioner, dataset, tmp_path) -> dict:
    """Returns the batch with kept features."""
    splits = data.load(dataset)
    kept = keep_features("memory", captioner, splits, arguments(tmp_path))
    results = []
    for records in (splits["train"], kept["train"]):
        pairs = data.CaptionPairs(records, 2)
        batch = CaptionCollator(captioner.processor, captioner.model.config)([pairs[i] for i in range(4)])
        captioner.model.zero_grad()
        loss = CrossEntropy(0.1)(captioner.model, batch)["loss"]
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in captioner.model.named_parameters() if p.grad is not None}))
    (loss, gradients), (kept_loss, kept_gradients) = results
    assert kept_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == kept_gradients.keys()
    assert all(gradients[name].allclose(kept_gradients[name], atol=1e-6) for name in gradients)
    return batch


def test_in_bfloat16_the_loss_is_the_same_to_the_bit(dataset, tmp_path):
    captioner = frozen(tmp_path, autocast=torch.bfloat16)
    splits = {"train": data.load(dataset)["train"]}
    # The same images in one batch, so that nothing but the kept precision could make a difference.
    kept = keep_features("memory", captioner, splits, arguments(tmp_path, per_device_eval_batch_size=12))
    losses = []
    for records in (splits["train"], kept["train"]):
        samples = [data.CaptionPairs(records, 2)[i] for i in range(12)]
        batch = CaptionCollator(captioner.processor, captioner.model.config)(samples)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(CrossEntropy()(captioner.model, batch)["loss"].item())
    assert kept["train"].features.dtype == torch.bfloat16
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_training_on_kept_features_ends_with_the_weights_of_training_on_pixels(dataset, tmp_path):
    folder = tmp_path / "kept"
    said = {}
    for name, place in (("pixels", "off"), ("memory", "auto"), ("files", folder), ("again", folder)):
        said[name] = tiny.run("train.py", *train_flags(tmp_path, dataset, name, place)).stderr
    assert "image features: 14 images x 17 x 32 torch.float32" in said["memory"]
    assert "free memory" in said["memory"]
    assert "image features" not in said["pixels"]
    assert "encoding images" not in said["again"]
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 14
    pixels, expected = weights(tmp_path / "pixels"), log(tmp_path / "pixels")
    for name in ("memory", "files", "again"):
        found = weights(tmp_path / name)
        assert max((pixels[k] - found[k]).abs().max().item() for k in pixels) <= 1e-5, name
        for row, values in log(tmp_path / name).items():
            assert values == pytest.approx(expected[row], rel=1e-4), (name, row)


def test_pixels_are_not_touched_once_features_are_kept(dataset, tmp_path, monkeypatch):
    captioner = frozen(tmp_path)
    splits = data.load(dataset)
    kept = keep_features(str(tmp_path / "kept"), captioner, splits, arguments(tmp_path))
    monkeypatch.setattr("collator.open_image", lambda *a, **k: pytest.fail("an image was opened"))
    kept = keep_features(str(tmp_path / "kept"), captioner, splits, arguments(tmp_path))
    samples = [data.CaptionPairs(kept["train"], 2)[i] for i in range(3)]
    CaptionCollator(captioner.processor, captioner.model.config)(samples)
    assert list(captioner.caption_split(kept["validation"])) == splits["validation"]["image_id"][:]


def test_captions_of_features_are_those_of_pixels(dataset, tmp_path):
    captioner = frozen(tmp_path, num_beams=2, max_new_tokens=8)
    splits = data.load(dataset)
    kept = keep_features("memory", captioner, splits, arguments(tmp_path))
    assert captioner.caption_split(kept["train"]) == captioner.caption_split(splits["train"])


@pytest.mark.slow
def test_two_processes_share_the_work_and_the_files(dataset, tmp_path):
    folder = tmp_path / "kept"
    options = {"gradient_accumulation_steps": 1, "num_train_epochs": 2}
    one = train_flags(tmp_path, dataset, "one", "off", per_device_train_batch_size=4, **options)
    two = train_flags(tmp_path, dataset, "two", folder, per_device_train_batch_size=2, **options)
    tiny.run("train.py", *one)
    tiny.run("train.py", *two, processes=2)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 14
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(first[name].allclose(second[name], atol=1e-4) for name in first)


@pytest.mark.slow
def test_a_kill_in_the_middle_goes_on_with_what_is_there(tmp_path):
    captions = {f"photo{i:03}": ["a red ball.", "a dog."] for i in range(400)}
    splits = {name: "validation" if name < "photo002" else "train" for name in captions}
    dataset = tiny.write_photos(tmp_path / "photos", captions, splits)
    folder = tmp_path / "kept"
    command = train_flags(tmp_path, dataset, "out", folder, num_train_epochs=1, per_device_eval_batch_size=1)
    process = tiny.start("train.py", *command)
    deadline = time.time() + 100
    while not any("." not in path.name for path in folder.rglob("*/??/*")):  # a whole file: unfinished ones have a dot
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size == 17 * 32 * 4]
    assert 0 < len(files) < 400
    before = {path: path.stat().st_mtime_ns for path in files if "." not in path.name}
    files[0].write_bytes(b"cut")  # what a full disk or a power cut may leave
    tiny.run("train.py", *command)
    whole = [path for path in folder.rglob("*") if path.is_file() and "." not in path.name]
    assert {path.stat().st_size for path in whole} == {17 * 32 * 4}
    assert len(whole) == 400
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items() if path != files[0])


def test_another_encoder_processor_or_image_has_other_features(dataset, tmp_path):
    from training.feature_cache import Encoder

    captioner = frozen(tmp_path)

    def fingerprint():
        return Encoder(captioner.model.vision_model, captioner, 1, 0).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    with torch.no_grad():
        captioner.model.vision_model.post_layernorm.bias[0] += 1e-3
    changed = fingerprint()
    captioner.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    fewer = fingerprint()
    captioner.autocast = torch.bfloat16
    rounded = fingerprint()
    captioner = frozen(tmp_path, fast_jpeg=True)  # which changes pixels
    fast, plain = fingerprint(), Encoder(frozen(tmp_path).model.vision_model, frozen(tmp_path), 1, 0).fingerprint()
    assert plain == first
    assert len({first, changed, fewer, rounded, fast}) == 5

    records = data.load(dataset)["train"]
    keys = image_keys(records)
    path = records[0]["image"]["path"]
    os.utime(path, ns=(1, 1))
    assert [a == b for a, b in zip(keys, image_keys(records), strict=True)] == [False] + [True] * (len(keys) - 1)
    content = Path(records[1]["image"]["path"]).read_bytes()
    inside = [records.select([1]).map(lambda row, b=b: {"image": {"path": None, "bytes": b}}) for b in (content, b"x")]
    assert len({keys[1], *image_keys(inside[0]), *image_keys(inside[1])}) == 3


@pytest.mark.parametrize(
    ("place", "augment", "dropout"), [("auto", True, 0), ("memory", True, 0), ("auto", False, 0.1), ("x", False, 0.1)]
)
def test_augmentation_and_dropout_forbid_it_and_are_named(place, augment, dropout, dataset, tmp_path, caplog):
    captioner = frozen(tmp_path)
    captioner.model.config.vision_config.attention_dropout = dropout
    augmentation = data.Augmentation(["flip"]) if augment else None
    said = "augmentation changes an image" if augment else "dropout in the vision encoder"
    caplog.set_level("INFO")
    if place == "auto":
        assert keep_features(place, captioner, data.load(dataset), arguments(tmp_path), 1, augmentation) == {}
        assert said in caplog.text
    else:
        with pytest.raises(ValueError, match=said):
            keep_features(place, captioner, data.load(dataset), arguments(tmp_path), 1, augmentation)


SIZES = {"image_size": 32, "patch_size": 8, "num_labels": 1}
ONE_SIZE = {**SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
ENCODERS = {
    "ViT": (transformers.ViTModel, transformers.ViTConfig, ONE_SIZE),
    "BEiT": (transformers.BeitModel, transformers.BeitConfig, ONE_SIZE),
    "DINOv2": (transformers.Dinov2Model, transformers.Dinov2Config, ONE_SIZE),
    "Swin": (transformers.SwinModel, transformers.SwinConfig, SWIN),
    "Donut": (transformers.DonutSwinModel, transformers.DonutSwinConfig, SWIN),
}
DROPPED = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


@pytest.mark.parametrize("drops", [None, *DROPPED])
@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_kept_only_of_encoders_that_give_the_same_in_training(name, drops):
    """In training mode a frozen encoder gives what was kept, or nothing is."""
    model, _ = families.build("vit-gpt2")
    model_class, config_class, sizes = ENCODERS[name]
    rates = [rate for rate in DROPPED if hasattr(config_class(), rate)]
    config = config_class(**sizes, **{rate: 0.5 if rate == drops else 0.0 for rate in rates})
    model.encoder = model_class(config).requires_grad_(False).train()
    take_encoded_images(model)
    pixels = torch.rand(32, 3, config.image_size, config.image_size)
    with torch.no_grad():
        one, other = (model.encoder(pixels).last_hidden_state for _ in range(2))
    assert one.equal(other) == (drops not in rates)
    refusal = _why_not(model, {}, None)
    assert (refusal is None) == one.equal(other), refusal


def test_a_place_that_is_named_is_the_place_even_for_one_use(dataset, tmp_path, caplog, monkeypatch):
    captioner, splits = frozen(tmp_path), data.load(dataset)
    monkeypatch.setattr("training.feature_cache.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("training.feature_cache.free_memory", lambda: 1000)  # "auto" would take files
    caplog.set_level("INFO")
    kept = keep_features("memory", captioner, splits, arguments(tmp_path, num_train_epochs=1), captions_per_image=2)
    assert kept["train"].features[0].shape == (17, 32)
    assert "free memory" in caplog.text
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("training.feature_cache.free_memory", lambda: 2**40)
    assert keep_features("auto", captioner, splits, arguments(tmp_path))
    assert not (tmp_path / "cache").exists(), "they fit in memory"


def test_samples_that_training_draws(tmp_path):
    flags = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 5}
    assert arguments(tmp_path, **flags).samples_drawn(10) == 50
    assert arguments(tmp_path, **flags, max_steps=7).samples_drawn(10) == 7 * 12
    assert arguments(tmp_path, **flags, max_steps=0).samples_drawn(10) == 50  # the Trainer's own rule


def test_auto_keeps_nothing_that_is_used_once_or_does_not_fit(dataset, tmp_path, caplog, monkeypatch):
    captioner, splits = frozen(tmp_path), data.load(dataset)
    caplog.set_level("INFO")
    args = arguments(tmp_path, num_train_epochs=1)
    assert keep_features("auto", captioner, splits, args, captions_per_image=2) == {}
    assert "training encodes 12 of 12 images" in caplog.text
    assert keep_features("off", captioner, splits, args) == {}
    # Memory too small for half: files in the cache; a disk too small as well: none.
    monkeypatch.setattr("training.feature_cache.free_memory", lambda: 1000)
    monkeypatch.setattr("training.feature_cache.cache_folder", lambda: tmp_path / "cache")
    kept = keep_features("auto", captioner, splits, arguments(tmp_path))
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == len(SPLITS)
    assert kept["train"].features[0].shape == (17, 32)
    monkeypatch.setattr("training.feature_cache.cache_folder", lambda: tmp_path / "full")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert keep_features("auto", captioner, splits, arguments(tmp_path)) == {}
    assert "are to be written" in caplog.text
    with pytest.raises(ValueError, match="are to be written"):
        keep_features(str(tmp_path / "named"), captioner, splits, arguments(tmp_path))

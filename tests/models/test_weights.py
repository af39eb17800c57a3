"""Weights as others publish them: .bin files, shards, names of older releases, and files that are not weights."""

import importlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from captioner import Captioner
from models.adapters import add_adapter
from models.loading import load_model
from rewriting.backends import HFBackend

PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 40, 3), dtype=np.uint8)) for n in range(3)]


def captions(folder) -> list[str]:
    return Captioner.from_pretrained(str(folder), num_beams=2, max_new_tokens=6)(PICTURES)


def published(folder, name):
    model, processor = families.build(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def git(tmp_path_factory):
    return published(tmp_path_factory.mktemp("git"), "git")


def rewritten(folder, target, kind=".bin", change=dict):
    """A copy of a model folder with its weights in files of another kind, after `change` of their dict."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    state = change({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()})
    if kind == "safetensors":
        save_file(state, target / "model.safetensors", {"format": "pt"})
    elif "shards" not in kind:
        torch.save(state, target / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "legacy .bin")
    else:
        stem, ending = ("pytorch_model", "bin") if ".bin" in kind else ("model", "safetensors")
        where = {name: f"{stem}-{n % 2 + 1:05}-of-00002.{ending}" for n, name in enumerate(state)}
        for file in set(where.values()):
            tensors = {name: state[name] for name in where if where[name] == file}
            torch.save(tensors, target / file) if ending == "bin" else save_file(
                tensors, target / file, {"format": "pt"}
            )
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (target / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("kind", [".bin", "legacy .bin", ".bin shards", "safetensors shards"])
def test_other_files_of_the_same_weights_give_the_same_captions(kind, git, tmp_path, caplog):
    caplog.set_level("INFO", logger="common.weights")
    assert captions(rewritten(git, tmp_path / "model", kind)) == captions(git)
    assert [r.name for r in caplog.records].count("common.weights") == ("bin" in kind)


def gamma_and_beta(state: dict) -> dict:
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()}  # fmt: skip
    assert renamed.keys() != state.keys()
    return renamed


def old_buffers(state: dict) -> dict:
    ids = torch.arange(64)[None]
    names = ("git.embeddings.position_ids", "git.image_encoder.vision_model.embeddings.position_ids")
    return state | {name: ids.clone() for name in names}


@pytest.mark.parametrize("change", [gamma_and_beta, old_buffers])
@pytest.mark.parametrize("kind", [".bin", "safetensors"])
def test_names_and_buffers_of_older_releases_load(change, kind, git, tmp_path):
    assert captions(rewritten(git, tmp_path / "model", kind, change)) == captions(git)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llava", "model.language_model.", "language_model.model."),
        ("paligemma", "model.language_model.", "language_model.model."),
    ],
)
def test_the_language_model_under_its_old_name_loads(name, old, new, tmp_path):
    folder = published(tmp_path / "new", name)
    model, _ = load_model(str(folder))
    own = {n.replace(old, new) if n.startswith(old) else n: t for n, t in model.state_dict().items()}
    assert any(n.startswith(new) for n in own)
    old_folder = tmp_path / "old"
    shutil.copytree(folder, old_folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(
        {n.removeprefix("model.") if new not in n else n: t for n, t in own.items()}, old_folder / "pytorch_model.bin"
    )
    loaded = load_model(str(old_folder))[0].state_dict()
    assert [n for n, t in model.state_dict().items() if not loaded[n].equal(t)] == []


def without_one(state: dict) -> dict:
    return {n: t for n, t in state.items() if n != "git.encoder.layer.1.output.dense.weight"}


def one_renamed(state: dict) -> dict:
    return {n.replace("layer.1.output.dense.weight", "layer.1.out.dense.weight"): t for n, t in state.items()}


def a_layer_more(state: dict) -> dict:
    return state | {n.replace("layer.1.", "layer.2."): t.clone() for n, t in state.items() if "encoder.layer.1." in n}


def other_shapes(state: dict) -> dict:
    return {n: t[:, :-1].contiguous() if n.endswith("layer.1.output.dense.weight") else t for n, t in state.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_one, r"lacks 1 weights of GitForCausalLM \(first: git.encoder.layer.1.output.dense.weight\)"),
        (one_renamed, r"lacks 1 weights .*, and holds 1 that it does not know \(first: .*layer.1.out.dense.weight\)"),
        (a_layer_more, r"holds \d+ weights that GitForCausalLM has no place for \(first: git.encoder.layer.2"),
        (other_shapes, r"other shapes than its config"),
    ],
)
@pytest.mark.parametrize("kind", [".bin", "safetensors"])
def test_weights_of_another_model_are_refused(change, says, kind, git, tmp_path):
    with pytest.raises(ValueError, match=says) as raised:
        load_model(str(rewritten(git, tmp_path / "model", kind, change)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["cut", "pointer", "empty"])
@pytest.mark.parametrize("kind", [".bin", "safetensors"])
def test_damaged_files_are_named(damage, kind, git, tmp_path):
    folder = rewritten(git, tmp_path / "model", kind)
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 990\n"
    file.write_bytes({"cut": file.read_bytes()[:5000], "pointer": pointer, "empty": b""}[damage])
    with pytest.raises(ValueError, match="damaged") as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker) -> list[Payload]:
    line = f"open({str(marker)!r}, 'w').close()"
    return [Payload(exec, line), Payload(subprocess.check_call, [sys.executable, "-c", line]), Payload(open, str(marker), "w")]  # fmt: skip


@pytest.mark.parametrize("payload", range(3))
@pytest.mark.parametrize("kind", [".bin", "legacy .bin", ".bin shards"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(payload, kind, git, tmp_path):
    marker = tmp_path / "ran"
    folder = rewritten(git, tmp_path / "model", kind, lambda state: state | {"more": payloads(marker)[payload]})
    with pytest.raises(ValueError, match=r"hold more than tensors.*not loaded") as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)
    assert not marker.exists()
    torch.load(next(iter(sorted(folder.glob("*.bin")))), weights_only=False) if kind == ".bin" else None
    assert marker.exists() == (kind == ".bin")  # it is a payload


def test_the_same_holds_for_adapters_and_llms(git, tmp_path):
    marker = tmp_path / "ran"
    bad = {"more": payloads(marker)[0]}
    model, _ = load_model(str(git))
    add_adapter(model, r=2, alpha=4, dropout=0.0).save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(weights | bad, tmp_path / "adapter" / "adapter_model.bin")
    llm = rewritten(tiny.build_llm(tmp_path), tmp_path / "bad_llm", change=lambda state: state | bad)
    args = SimpleNamespace(bf16=False, quantization=None, chat=None, max_prompt_tokens=8, max_new_tokens=8)
    for load in (lambda: load_model(str(tmp_path / "adapter")), lambda: HFBackend(str(llm), args, device="cpu")):
        with pytest.raises(ValueError, match="hold more than tensors"):
            load()
    assert not marker.exists()


def test_an_llm_of_bin_shards_is_the_same_llm(tmp_path):
    folder = tiny.build_llm(tmp_path)
    args = SimpleNamespace(bf16=False, quantization=None, chat=None, max_prompt_tokens=8, max_new_tokens=8)
    ours = HFBackend(str(rewritten(folder, tmp_path / "bin", ".bin shards")), args, device="cpu").model.state_dict()
    theirs = HFBackend(str(folder), args, device="cpu").model.state_dict()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_an_adapter_whose_weights_have_no_place_is_refused(git, tmp_path):
    model, _ = load_model(str(git))
    add_adapter(model, r=2, alpha=4, dropout=0.0).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({n.replace(".git.", ".model.git."): t for n, t in weights.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .* weights of its adapter"):
        load_model(str(tmp_path))


def test_export_and_sagemaker_make_safetensors_of_bin_weights(git, tmp_path, monkeypatch):
    folder = rewritten(git, tmp_path / "model", ".bin shards")
    monkeypatch.syspath_prepend(ROOT / "sagemaker")
    importlib.import_module("bundle").write_model(folder, tmp_path / "deployed")
    monkeypatch.setattr(sys, "argv", ["export.py", str(folder)])
    importlib.import_module("export").main()
    for made in (tmp_path / "deployed", folder):
        assert not list((tmp_path / "deployed").glob("*.bin"))
        ours, theirs = load_file(made / "model.safetensors"), load_file(git / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert captions(tmp_path / "deployed") == captions(git)


@pytest.mark.parametrize(
    "family",
    ["llava", pytest.param("paligemma", marks=pytest.mark.slow), pytest.param("gemma3", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "made", ["from its config", pytest.param("from a published checkpoint", marks=pytest.mark.slow)]
)
def test_an_export_has_the_names_of_published_checkpoints(family, made, tmp_path):
    """Those of llava-hf, google/paligemma and google/gemma-3, which vLLM and llama.cpp's converter look for."""
    source = published(tmp_path / "made", family)
    named = lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1)  # noqa: E731
    if made == "from a published checkpoint":
        source = rewritten(
            source, tmp_path / "hub", "safetensors", lambda state: {named(n): t for n, t in state.items()}
        )
    tiny.run("export.py", source, "--output_dir", tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights.keys() == {named(name) for name in load_file(tmp_path / "made/model.safetensors")}
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in weights)
    assert any(name.startswith("language_model.model.layers.0.") for name in weights)

"""A caption is the search's that the settings name: what else a checkpoint's generation_config.json holds does not act."""

import contextlib
import io
import json
import shutil

import families
import pytest
import tiny
import torch
from PIL import Image
from test_family_scripts import train
from transformers import GenerationConfig

from captioner import Captioner
from models.decoding import DEFAULTS, TOKENS
from reports.snippet import snippet

# As published checkpoints have them (Qwen-VL, Gemma 3, Idefics, BART), and more of each kind.
LEFTOVERS = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 64, "top_p": 0.95},
    "almost greedy": {"do_sample": True, "temperature": 1e-6, "top_k": 1, "top_p": 0.001},
    "truncated": {"do_sample": True, "typical_p": 0.5, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "min_p": 0.1},
    "lengths": {"min_length": 40, "max_length": 12},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    "forbidden": {"bad_words_ids": [[token] for token in range(5, 30)], "begin_suppress_tokens": list(range(30, 60))},
    "more": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "encoder_repetition_penalty": 2.0,
        "suppress_tokens": list(range(90, 99)),
    },
}
SEARCH = {"num_beams": 3, "max_new_tokens": 8}
IMAGES = [Image.effect_noise((48, 40), 90 + 60 * number).convert("RGB") for number in range(3)]


def by_library(folder, captioner, tmp_path) -> list[str]:
    """The captions of the library's own model and search, by the code that a card has."""
    code, captions = snippet(str(folder), captioner, "float32"), []
    for image in IMAGES:
        image.save(tmp_path / "photo.png")
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code.replace("photo.jpg", "photo.png"), {})
        captions.append(printed.getvalue().removesuffix("\n"))
    return captions


def folders(name, tmp_path, leftovers) -> list:
    """A family's model with nothing but its tokens in generation_config.json, and the same with `leftovers`."""
    model, processor = families.build(name)
    if name == "git":
        model.output.bias.data[3] += 0.3  # some captions end by themselves
    Captioner(model, processor)
    model.save_pretrained(tmp_path / "clean")
    processor.save_pretrained(tmp_path / "clean")
    shutil.copytree(tmp_path / "clean", tmp_path / "left")
    path = tmp_path / "left" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | leftovers))
    return [tmp_path / "clean", tmp_path / "left"]


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_searches_with_beams_whatever_its_checkpoint_holds(name, tmp_path):
    everything = {key: value for part in LEFTOVERS.values() for key, value in part.items()}
    clean, left = folders(name, tmp_path, everything)
    said = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        captioner = Captioner.from_pretrained(left, **SEARCH)
        said.append(captioner(IMAGES))
    assert said == [by_library(clean, captioner, tmp_path)] * 2
    for module in captioner.model.modules():
        held = getattr(module, "generation_config", None)
        assert not held or set(held.to_diff_dict()) - {"transformers_version"} <= {*TOKENS, *DEFAULTS}


@pytest.mark.parametrize("part", LEFTOVERS)
def test_what_does_not_act_here_acts_in_the_library(part, tmp_path):
    """So that the test above is one: each of the leftovers alone changes what the library makes of such a folder."""
    clean, left = folders("git", tmp_path, LEFTOVERS[part])
    captioner = Captioner.from_pretrained(left, **SEARCH)
    expected = by_library(clean, captioner, tmp_path)
    assert captioner(IMAGES) == expected
    torch.manual_seed(0)
    if part not in ("more", "almost greedy"):  # no encoder, and the first of two; a search in name only
        assert by_library(left, captioner, tmp_path) != expected


def test_a_script_says_the_same_twice(tmp_path):
    _, left = folders("git", tmp_path, LEFTOVERS["sampling"])
    IMAGES[0].save(tmp_path / "photo.png")
    command = ("infer.py", tmp_path / "photo.png", "--model_name_or_path", left, "--num_beams", 3)
    assert tiny.run(*command).stdout == tiny.run(*command).stdout


def test_a_greedy_run_of_a_model_with_beams_saves_and_loads(dataset, tmp_path):
    """Beams' settings in generation_config.json with one beam would be refused by the library, after an epoch."""
    base = tiny.build_folder(tmp_path)
    GenerationConfig(num_beams=3, early_stopping=True, length_penalty=2.0).save_pretrained(base)
    train(base, dataset, tmp_path / "greedy", num_beams=1, num_train_epochs=1)
    assert Captioner.from_pretrained(tmp_path / "greedy").settings["num_beams"] == 1
    train(tmp_path / "greedy", dataset, tmp_path / "beams", num_beams=4, num_train_epochs=1)
    found = Captioner.from_pretrained(tmp_path / "beams").settings
    assert (found["num_beams"], found["early_stopping"], found["length_penalty"]) == (4, True, 0.5)
    tiny.run("export.py", tmp_path / "greedy", "--output_dir", tmp_path / "exported")
    assert GenerationConfig.from_pretrained(tmp_path / "exported").num_beams == 1

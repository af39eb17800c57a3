"""What an upload to the Hub holds: an allow-list of files, no path of this machine, and a person's words in the card."""

import json
import re
import sys

import pytest
import tiny
from conftest import ROOT

from common.errors import UserError
from common.publish import files_to_upload, without_local_paths
from reports.model_card import merge_sections

SECRET = "SecretProject"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose data, model and output lie in a folder that nobody is to know of, with TensorBoard files."""
    import train

    folder = tmp_path_factory.mktemp(SECRET)
    captions = {f"photo{i}": ["a red circle", "the blue square"] for i in range(4)}
    splits = {"photo0": "train", "photo1": "train", "photo2": "validation", "photo3": "test"}
    data = tiny.write_photos(folder / "photos", captions, splits)
    words = ["--dataset_name", data, "--image_dir", folder / "photos", "--output_dir", folder / "out", "--max_steps", 1,
             "--eval_strategy", "steps", "--save_strategy", "steps", "--meteor", "false", "--spice", "false",
             "--bootstrap_samples", 0, "--num_beams", 1, "--max_new_tokens", 3, "--report_to", "tensorboard",
             "--model_name_or_path", tiny.build_folder(folder)]  # fmt: skip
    before, original = sys.argv, sys.orig_argv
    sys.argv = sys.orig_argv = ["train.py", *map(str, words)]
    sys.orig_argv = ["python", *sys.argv]
    try:
        train.main()
    finally:
        sys.argv, sys.orig_argv = before, original
    return folder / "out"


def test_photographs_and_checkpoints_stay_here(trained):
    there = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert any("tfevents" in name for name in there)
    names = files_to_upload(trained).keys()
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "coco_metrics.json",
        "validation/coco_metrics.json",
    } <= names
    assert not [
        name for name in names if re.search("tfevents|checkpoint|report|per_image|predictions|bad_samples", name)
    ]


def test_no_uploaded_text_names_a_path_of_this_machine(trained):
    for name, what in files_to_upload(trained).items():
        if not name.endswith((".safetensors", ".png")):
            text = what.decode() if isinstance(what, bytes) else what.read_text(encoding="utf-8")
            assert SECRET not in text, name
            assert sys.prefix not in text, name
    run = json.loads(files_to_upload(trained)["run.json"])
    assert "data.jsonl" in run["command"]
    assert run["flags"]["image_dir"] == "photos"
    assert SECRET in (trained / "run.json").read_text(encoding="utf-8")  # which says here where the run was


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/photos/cat.jpg", "cat.jpg"),
        (r"C:\Users\me\data.csv", "data.csv"),
        ("~/data/captions.csv", "captions.csv"),
        ("missing: /usr/lib/python3/site-packages/x/meteor.jar, reinstall", "missing: meteor.jar, reinstall"),
        ("https://huggingface.co/user/name", "https://huggingface.co/user/name"),
        ("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-base"),
        ("a dog and/or a cat </s>", "a dog and/or a cat </s>"),
        ("nrefs:all|case:mixed|tok:13a", "nrefs:all|case:mixed|tok:13a"),
    ],
)
def test_paths_are_cut_and_other_words_kept(text, left):
    assert without_local_paths({"a": [text, 1, None]}) == {"a": [left, 1, None]}


def test_a_command_keeps_its_flags_and_loses_its_folders():
    command = "python /home/me/train.py --dataset_name '/data/my photos/x.csv' --output_dir=/out/run --seed 3"
    assert without_local_paths({"command": command}) == {
        "command": "python train.py --dataset_name x.csv --output_dir=run --seed 3"
    }


def test_a_command_keeps_the_recipe_of_this_repo():
    recipe = ROOT / "recipes/quickstart/scenes.yaml"
    assert without_local_paths({"command": f"python train.py {recipe} --output_dir /out/run"}) == {
        "command": "python train.py recipes/quickstart/scenes.yaml --output_dir run"
    }


def test_a_dry_run_lists_files_and_sizes_and_uploads_nothing(trained, monkeypatch, capsys):
    import export

    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["export.py", str(trained), "--push_to_hub", "user/name", "--dry_run"])
    export.main()
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    lines = capsys.readouterr().out.splitlines()
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[:-1]}
    assert sizes["model.safetensors"] == (trained / "model.safetensors").stat().st_size
    assert sizes.keys() == files_to_upload(trained).keys()
    assert "would be uploaded to user/name" in lines[-1]


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        files_to_upload(tmp_path)


def test_a_card_keeps_what_a_person_wrote():
    first = merge_sections("", {"# run": "Old summary.", "## Scores": "CIDEr 0.1", "## Training": "1 step"})
    assert first == merge_sections(first, {"# run": "Old summary.", "## Scores": "CIDEr 0.1", "## Training": "1 step"})
    edited = first.replace("1 step", "1 step, on my bicycle").replace(
        "## Training", "## Thanks\n\nTo all.\n\n## Training"
    )
    second = merge_sections(edited, {"# user/name": "New.", "## Scores": "CIDEr 0.9", "## Training": "2 steps"})
    assert "CIDEr 0.9" in second
    assert "CIDEr 0.1" not in second
    assert "on my bicycle" in second
    assert "2 steps" not in second
    assert "To all." in second
    assert second.startswith("# user/name\n\nNew.")
    assert second.index("## Thanks") < second.index("## Training")


def test_a_card_that_a_person_wrote_alone_is_kept():
    text = merge_sections("---\nlicense: mit\n---\n# Mine\n\nMy words.\n", {"# run": "Summary.", "## Scores": "0.5"})
    assert "My words." in text
    assert "0.5" in text

"""What a model has seen is recognized however the data are named and whatever joined or left them since."""

import json
import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image

import data
from common.errors import UserError
from data import seen

PHOTOS = 1000


def write(folder, numbers, name="captions.csv"):
    """A table of noise pictures, one for each number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        if not (folder / f"{number}.png").exists():
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = ["file_name,caption", *(f"{number}.png,picture {number}" for number in numbers)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(table, {split: ids}, folder of a model) of a run on 1,000 images."""
    folder = tmp_path_factory.mktemp("run")
    table = write(folder / "set", range(PHOTOS))
    splits = data.load(str(table))
    (folder / "model").mkdir()
    seen.begin(folder / "model", splits, "none", None)
    return table, {name: set(rows["image_id"]) for name, rows in splits.items()}, folder / "model"


def scored(source, model, split="test", **options) -> tuple[set, dict]:
    """(ids of the images that are scored, overlap) of a model."""
    record = seen.find(model)
    rows = data.load(str(source), splits=(split,), all_as=split, seen=record, **options)[split]
    return set(rows["image_id"]), record.overlap(rows)


def appended(table, numbers):
    return write(table.parent, [*range(PHOTOS), *numbers])


def removed(table, numbers):
    return write(table.parent, [n for n in range(PHOTOS) if n not in numbers])


def shuffled(table, numbers):
    return write(table.parent, random.Random(numbers[0]).sample(range(PHOTOS), PHOTOS))


@pytest.mark.parametrize("change", [appended, removed, shuffled])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_go_or_move_bring_no_trained_image_to_the_score(trained, tmp_path, change, seed):
    table, ids, model = trained
    shutil.copytree(table.parent, tmp_path / "set")
    numbers = random.Random(seed).sample(
        range(PHOTOS, 2 * PHOTOS) if change is appended else range(PHOTOS), 1 + 40 * seed
    )
    table = change(tmp_path / "set" / table.name, numbers)
    for split in ("test", "validation"):
        images, overlap = scored(table, model, split, split_seed=seed)
        gone = {f"{number}.png" for number in numbers} if change is removed else set()
        assert images == ids[split] - gone
        assert overlap["trained_on"] == 0
        assert overlap["images"] == len(images)


def test_the_name_of_the_source_does_not_matter(trained, tmp_path, monkeypatch):
    table, ids, model = trained
    shutil.copytree(table.parent, tmp_path / "copy")
    os.symlink(table.parent, tmp_path / "link", target_is_directory=True)
    os.symlink(table, tmp_path / "copy" / "other.csv")
    monkeypatch.chdir(table.parent.parent)
    names = ["set/captions.csv", "./set/../set/captions.csv", table, table.parent, tmp_path / "copy" / "captions.csv"]
    for name in [*names, tmp_path / "link" / "captions.csv", tmp_path / "link"]:
        assert scored(name, model)[0] == ids["test"], name
    monkeypatch.chdir(table.parent)
    assert scored("captions.csv", model)[0] == ids["test"]
    (tmp_path / "renamed").mkdir()
    with open(tmp_path / "renamed" / "list.jsonl", "w", encoding="utf-8") as file:
        for number in range(PHOTOS):
            shutil.copy(table.parent / f"{number}.png", tmp_path / "renamed" / f"other{number}.png")
            file.write(json.dumps({"image": f"other{number}.png", "caption": "another caption"}) + "\n")
    assert scored(tmp_path / "renamed" / "list.jsonl", model)[0] == {f"other{name}" for name in ids["test"]}


def test_other_pictures_under_the_same_names_are_other_images_and_a_line_says_how_many(trained, tmp_path, caplog):
    _, ids, model = trained
    table = write(tmp_path / "set", range(2000, 2040))
    for number in range(40):
        (tmp_path / "set" / f"{2000 + number}.png").rename(tmp_path / "set" / f"{number}.png")
    table.write_text("file_name,caption\n" + "".join(f"{n}.png,picture {n}\n" for n in range(40)))
    images, overlap = scored(table, model)
    assert len(images) == 40
    assert overlap == {"images": 40, "trained_on": 0, "validated_on": 0}
    assert f"{len(images & ids['train'])} images have other bytes" in caplog.text


def test_a_source_of_trained_images_is_refused_and_new_ones_are_scored(trained, tmp_path):
    _, ids, model = trained
    numbers = [int(name.removesuffix(".png")) for name in sorted(ids["train"])[:10]]
    with pytest.raises(UserError, match="has seen all of these 10 images"):
        scored(write(tmp_path / "a", numbers), model)
    images, overlap = scored(write(tmp_path / "b", [*numbers, 2400, 2401]), model)
    assert images == {"2400.png", "2401.png"}
    assert overlap["trained_on"] == 0


def test_official_splits_are_counted(trained, tmp_path):
    _, ids, model = trained
    train, validation = (sorted(int(name.removesuffix(".png")) for name in ids[s])[:3] for s in ("train", "validation"))
    write(tmp_path, [*train, *validation, 2500], "test.csv")
    write(tmp_path, range(2600, 2610), "train.csv")
    assert scored(tmp_path, model)[1] == {"images": 7, "trained_on": 3, "validated_on": 3}


def test_a_later_stage_has_seen_what_the_first_one_saw(trained, tmp_path):
    table, ids, model = trained
    splits = data.load(str(write(tmp_path / "set", range(2700, 2760))))
    (tmp_path / "second").mkdir()
    seen.begin(tmp_path / "second", splits, str(model), None)
    rows = data.load(str(table), splits=("test",), all_as="test")["test"]
    assert seen.find(tmp_path / "second").overlap(rows)["trained_on"] == len(ids["train"])


def test_only_the_folder_of_a_model_has_its_record(trained, tmp_path, monkeypatch):
    _, _, model = trained
    (model / "checkpoint-7").mkdir(exist_ok=True)
    (model / "config.json").touch()
    for name in (model, f"{model}/", model / "checkpoint-7"):
        assert seen.find(name) is not None
    monkeypatch.chdir(model)
    assert seen.find(".") is not None
    for name in ("", None, "bert-base", "org/name", "config.json", model / "config.json", model / "nowhere"):
        assert seen.find(name) is None, name
    seen.begin(tmp_path, {}, None, None)
    assert len(seen.find(tmp_path).table) == 0


def test_a_run_is_not_resumed_on_other_data_and_the_line_says_what_changed(trained, tmp_path):
    table, _, model = trained
    shutil.copytree(table.parent, tmp_path / "set")
    folder, checkpoint = tmp_path / "model", tmp_path / "model" / "checkpoint-5"
    shutil.copytree(model, folder)
    checkpoint.mkdir()
    seen.begin(folder, data.load(str(shuffled(tmp_path / "set" / table.name, [3]))), "none", str(checkpoint))
    before = (folder / seen.NAME).read_bytes()
    table = appended(tmp_path / "set" / table.name, range(PHOTOS, PHOTOS + 30))
    splits = data.load(str(table))
    new = sum(
        int(name.removesuffix(".png")) >= PHOTOS for s in ("train", "validation") for name in splits[s]["image_id"]
    )
    with pytest.raises(UserError, match=rf"was begun: {new} images added\. Restore"):
        seen.begin(folder, splits, "none", str(checkpoint))
    table = removed(table, range(5))
    table.write_text(table.read_text().replace("picture 1", "zebra 1"))
    splits = data.load(str(table))
    with pytest.raises(UserError, match=r"was begun: \d images removed, \d+ images with other captions\. Restore"):
        seen.begin(folder, splits, "none", str(checkpoint))
    assert (folder / seen.NAME).read_bytes() == before
    assert not any(name.encode() in before for name in ("1.png", "picture", "captions.csv"))


def test_of_a_stream_it_is_not_known_which_images_were_trained_on(trained, tmp_path):
    table, _, model = trained
    splits = data.load(str(table))
    splits["train"] = splits["train"].to_iterable_dataset()
    seen.begin(tmp_path, splits, str(model), None)
    assert seen.find(tmp_path).overlap(splits["test"])["trained_on"] is None

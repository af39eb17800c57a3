import base64
import hashlib
import io
import json
import logging
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import xxhash
from conftest import ROOT
from PIL import Image

import data
from common.errors import UserError
from data import DataError, ImageError, check_images, fingerprint
from data.rows import SPLITS, Record
from data.splits import SHARES, draw_splits, groups_of, near_pairs, parse_shares


def jpeg(number: int, size=(16, 12)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write_set(folder: Path, rows: list[dict], images: dict[str, bytes]) -> str:
    """A JSONL file and its images. Returns the file's path."""
    for name, content in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    file = folder / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def plain_set(folder: Path, number: int = 40, **columns) -> str:
    names = [f"{i:02d}.jpg" for i in range(number)]
    rows = [{"image": name, "captions": [f"picture {name}", f"once more {name}"]} for name in names]
    for row in rows:
        row.update(columns)
    return write_set(folder, rows, {name: jpeg(i) for i, name in enumerate(names)})


def ids(dataset) -> dict:
    return {split: list(rows["image_id"]) for split, rows in dataset.items()}


def contents(dataset) -> dict:
    return {split: [Path(row["image"]["path"]).read_bytes() for row in rows] for split, rows in dataset.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- one record an image, and splits over images


def test_rows_of_one_image_are_one_record_wherever_they_stand(tmp_path):
    names = [f"{i}.jpg" for i in range(20)]
    rows = [{"image": name, "caption": f"{name} {i}"} for i in range(5) for name in names]  # all first captions first
    dataset = data.load(write_set(tmp_path, rows, {name: jpeg(i) for i, name in enumerate(names)}))
    assert sum(map(len, dataset.values())) == 20
    for split in dataset.values():
        for row in split:
            assert row["captions"] == [f"{row['image_id']} {i}" for i in range(5)]


def drawn(names: list[str], seed: int = 42) -> dict[str, list[str]]:
    """The split as docs/data.md says it: by the hash of each image's key."""
    split = {"train": [], "validation": [], "test": []}
    for name in sorted(names):
        place = xxhash.xxh3_64_intdigest(name.encode(), seed=seed) / 2**64
        split["validation" if place < 0.05 else "test" if place < 0.1 else "train"].append(name)
    return split


def test_a_drawn_split_is_by_the_hash_of_each_key_whatever_the_order_of_rows(tmp_path):
    (tmp_path / "a").mkdir()
    file = Path(plain_set(tmp_path / "a", 60))
    first = data.load(str(file))
    # Pinned, so that a published score stays comparable: every version must draw the same.
    assert ids(first) == drawn([f"{i:02d}.jpg" for i in range(60)])
    assert ids(first)["test"] == ["31.jpg"]
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    assert ids(data.load(str(file))) == ids(first)
    assert ids(data.load(str(file), split_seed=1)) != ids(first)


@pytest.mark.parametrize("number", [3, 4, 10, 200])
def test_a_row_more_or_less_moves_no_other_image_but_where_a_split_would_be_empty(tmp_path, number):
    for folder, count in (("a", number), ("b", number + 1)):
        (tmp_path / folder).mkdir()
        plain_set(tmp_path / folder, count)
    before, after = (ids(data.load(str(tmp_path / folder))) for folder in ("a", "b"))
    assert all(before.values())
    assert all(after.values())
    held_out = {name for split in ("validation", "test") for name in before[split]}
    moved = held_out & set(after["train"])
    assert len(moved) <= (1 if number < 200 else 0)
    if number == 200:
        assert {name: split for split, names in before.items() for name in names}.items() <= {
            name: split for split, names in after.items() for name in names
        }.items()


@pytest.mark.parametrize("official", [False, True])
def test_every_split_with_a_share_has_an_image_however_few_there_are(official):
    draw = random.Random(5)
    for _ in range(300):
        number, seed = draw.randint(3, 8), draw.randrange(-5, 1000)
        shares = draw.choice([SHARES, (0.2, 0.4, 0.4), (0.02, 0.49, 0.49), (0.5, 0.5, 0.0), (0.9, 0.0, 0.1)])
        records = [Record("", f"{i}.jpg", ["a dog"], f"{i}.jpg", image_id=str(i)) for i in range(number)]
        if official:
            records += [
                Record("", f"t{i}.jpg", ["a dog"], f"t{i}.jpg", image_id=f"t{i}", split="test") for i in range(2)
            ]
        draw_splits(records, seed, shares, official, [[record] for record in records])
        expected = {name for name, share in zip(SPLITS, shares, strict=True) if share} | (
            {"test"} if official else set()
        )
        assert {record.split for record in records} == expected, (number, seed, shares)
        assert not official or {r.key for r in records if r.split == "test"} == {"t0.jpg", "t1.jpg"}


@pytest.mark.parametrize(
    "text", ["1,2", "nan,nan,nan", "0.9,nan,0.1", "inf,0,0", "0,0.5,0.5", "1.2,-0.1,-0.1", "50,30,30", "x"]
)
def test_shares_that_are_none_are_refused_before_anything_is_loaded(text):
    with pytest.raises(UserError, match="write the shares of train, validation and test"):
        data.load("nowhere.csv", split_shares=text)
    assert parse_shares("80,10,10") == parse_shares("0.8/0.1/0.1")


def test_shares_and_groups_of_a_drawn_split(tmp_path):
    images = {f"{i:02d}.jpg": jpeg(i) for i in range(60)}
    rows = [{"image": name, "caption": name, "patient": int(name[:2]) % 12} for name in images]
    file = write_set(tmp_path, rows, images)
    dataset = data.load(file, split_shares="0.5,0.2,0.3", group_column="patient")
    patients = [set(rows["patient"]) for rows in dataset.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12
    assert len(dataset["train"]) < 54
    with pytest.raises(DataError, match=r"no column 'scene' \(--group_column\)"):
        data.load(file, group_column="scene")


@pytest.mark.parametrize(
    "form", ["csv", "jsonl", "base64", "coco", "metadata", "parquet_paths", "parquet", "saved", "tar"]
)
def test_a_group_is_in_one_split_in_every_format(form, tmp_path):
    rows = [{"image": f"{i:02d}.jpg", "caption": f"picture {i}", "patient": i % 6} for i in range(36)]
    source = write_set(tmp_path, rows, {row["image"]: jpeg(i) for i, row in enumerate(rows)})
    inside = [{**row, "image": {"bytes": jpeg(i), "path": row["image"]}} for i, row in enumerate(rows)]
    if form != "jsonl":
        os.unlink(source)
        source = str(tmp_path / f"set.{form}")
    if form in ("csv", "parquet_paths"):
        frame = pandas.DataFrame(rows)
        frame.to_csv(source, index=False) if form == "csv" else frame.to_parquet(source := f"{tmp_path}/p.parquet")
    elif form == "base64":
        coded = [{**row, "image": base64.b64encode(row["image"]["bytes"]).decode()} for row in inside]
        source = write_set(tmp_path, coded, {})
    elif form == "coco":
        images = [{"id": i, "file_name": row["image"], "patient": row["patient"]} for i, row in enumerate(rows)]
        notes = [{"image_id": i, "caption": row["caption"]} for i, row in enumerate(rows)]
        source = str(tmp_path / "set.json")
        Path(source).write_text(json.dumps({"images": images, "annotations": notes}), encoding="utf-8")
    elif form == "metadata":
        lines = [json.dumps({"file_name": row.pop("image"), **row}) for row in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        source = str(tmp_path)
    elif form == "tar":
        with tarfile.open(source, "w") as tar:
            for row in inside:
                texts = json.dumps({name: row[name] for name in ("caption", "patient")}).encode()
                for ending, content in (("jpg", row["image"]["bytes"]), ("json", texts)):
                    member = tarfile.TarInfo(f"{row['image']['path'][:2]}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    elif form in ("parquet", "saved"):
        table = datasets.Dataset.from_list(inside).cast_column("image", datasets.Image())
        table.to_parquet(source) if form == "parquet" else table.save_to_disk(source)
    for seed in range(2):
        dataset = data.load(source, split_shares="0.4,0.3,0.3", group_column="patient", split_seed=seed)
        patients = [{int(c.split()[1]) % 6 for row in split["captions"] for c in row} for split in dataset.values()]
        assert sum(map(len, dataset.values())) == 36
        assert sum(map(len, patients)) == len(set.union(*patients)) == 6
    with pytest.raises(DataError, match=r"column 'scene' \(--group_column\)"):
        data.load(source, group_column="scene")


def test_the_same_picture_in_two_files_is_in_one_split(tmp_path, test_data, caplog):
    photos = sorted((test_data / "flickr8k/Flicker8k_Dataset").glob("*.jpg"))[:60]
    for number, photo in enumerate(photos):
        content = photo.read_bytes()
        (tmp_path / f"{number:02d}.jpg").write_bytes(content)
        (tmp_path / f"{number:02d}_comment.jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x06abcd" + content[2:])
        Image.open(photo).save(tmp_path / f"{number:02d}_again.jpg", quality=88)
    names = [f"{number:02d}{kind}.jpg" for number in range(60) for kind in ("", "_comment", "_again")]
    rows = [{"image": name, "caption": name} for name in names]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = data.load(str(tmp_path / "all.jsonl"))
    numbers = [{name[:2] for name in rows["image_id"]} for rows in dataset.values()]
    assert sum(map(len, numbers)) == 60  # no picture is in two splits, and none was taken for another
    assert len(dataset["train"]) > 120
    rows = [row | {"split": "test" if "again" in row["image"] else "train"} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data.load(str(tmp_path / "all.jsonl"))
    assert "look the same and are in two splits of the source" in caplog.text


@pytest.mark.parametrize("cells", [3, 4, 8])
def test_different_drawings_of_few_plain_fields_are_not_taken_for_one(cells, tmp_path):
    """Most gradients of such pictures are zero in all of them, which is nothing that they have in common."""
    draw = np.random.default_rng(cells)
    images = [
        Image.fromarray(draw.integers(0, 256, (cells, cells, 3), np.uint8)).resize((48, 48), Image.Resampling.NEAREST)
        for _ in range(60)
    ]
    near = near_pairs(images, [f"{os.getpid()} {cells}"], tmp_path)
    assert len(near) <= 0.01 * 60 * 59 / 2, "three fields in a row have few directions"
    again = io.BytesIO()
    images[0].save(again, "JPEG", quality=60)
    assert (0, 60) in near_pairs([*images, Image.open(again)], [f"{os.getpid()} {cells} again"], tmp_path)


def test_a_photograph_at_half_its_size_is_the_same_picture(tmp_path, test_data):
    photos = sorted((test_data / "flickr8k/Flicker8k_Dataset").glob("*.jpg"))[60:100]
    images = [Image.open(photo) for photo in photos]
    halves = [image.reduce(2) for image in images]
    near = near_pairs([*images, *halves], [str(os.getpid()), "half"], tmp_path)
    assert near == [(number, number + 40) for number in range(40)]


def test_hundreds_of_frames_of_one_video_are_near_and_other_pictures_are_not(tmp_path):
    """More than a bucket holds, some of them equal in what is compared."""
    draw = np.random.default_rng(0)
    scenes = [draw.integers(0, 255, (16, 17), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(3)]
    frames = []
    for number in range(1100):
        frame = scenes[number % 2].copy()
        frame[4 * draw.integers(16) :][:4] = draw.integers(0, 255)  # one of 16 rows of gradients
        frames.append(frame)
    images = [Image.fromarray(frame) for frame in [*frames, scenes[2], np.full((64, 68), 7, np.uint8)]]
    records = [Record("", index, [], str(index)) for index in range(len(images))]
    near = near_pairs(images, [str(os.getpid())], tmp_path)
    groups = groups_of(records, near)
    assert sorted(map(len, groups)) == [1, 1, 550, 550]
    assert near_pairs(images[-1:], ["plain"], tmp_path) == []
    assert near_pairs([], [str(os.getpid())], tmp_path) == near  # kept by the versions


def test_renamed_copies_are_one_image_and_in_one_split(tmp_path, caplog):
    names = [f"{i:02d}.jpg" for i in range(40)]
    images = {name: jpeg(i) for i, name in enumerate(names)}
    images |= {f"copies/{name}": images[name] for name in names[:20]}
    rows = [{"image": name, "captions": [f"one {Path(name).name}", f"of {name}"]} for name in images]
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(write_set(tmp_path, rows, images))
    found = contents(dataset)
    assert sum(map(len, found.values())) == 40
    assert len({content for split in found.values() for content in split}) == 40
    captions = {row["image_id"]: row["captions"] for rows in dataset.values() for row in rows}
    assert captions["03.jpg"] == ["one 03.jpg", "of 03.jpg", "of copies/03.jpg"]  # the same caption once
    assert "dropped: 20 renamed copies of an image" in caplog.text


def test_equal_size_is_not_equal_content(tmp_path):
    """Files of one size that differ in a byte that no quick look sees."""
    base = bytearray(jpeg(1, (300, 200)) + bytes(40000))
    images = {}
    for i in range(10):
        base[9000 + i] ^= 255
        images[f"{i}.jpg"] = bytes(base)
    assert len({len(content) for content in images.values()}) == 1
    images["same.jpg"] = images["4.jpg"]
    rows = [{"image": name, "caption": f"of {name}"} for name in images]
    dataset = data.load(write_set(tmp_path, rows, images))
    captions = {row["image_id"]: row["captions"] for rows in dataset.values() for row in rows}
    assert len(captions) == 10
    assert captions["4.jpg"] == ["of 4.jpg", "of same.jpg"]


def test_bytes_in_two_official_splits_leave_the_training_side(tmp_path, caplog):
    images = {f"{i}.jpg": jpeg(i) for i in range(6)}
    images |= {"t.jpg": images["0.jpg"], "v.jpg": images["1.jpg"], "w.jpg": images["0.jpg"]}
    images["twin.jpg"] = images["5.jpg"]
    splits = {"t.jpg": "test", "v.jpg": "val", "w.jpg": "val", "4.jpg": "val"}
    rows = [{"image": name, "caption": name, "split": splits.get(name, "train")} for name in images]
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(write_set(tmp_path, rows, images))
    assert ids(dataset) == {
        "train": ["2.jpg", "3.jpg", "5.jpg", "twin.jpg"],  # twins inside a published split stay: its size is known
        "validation": ["4.jpg", "v.jpg"],
        "test": ["t.jpg"],
    }
    for words in (
        "1 train images also in test",
        "1 train images also in validation",
        "1 validation images also in test",
    ):
        assert words in caplog.text


def test_train_and_test_only_get_a_validation_split_out_of_train(tmp_path, caplog):
    images = {f"{i:02d}.jpg": jpeg(i) for i in range(45)}
    rows = [{"image": n, "caption": n, "split": "test" if n < "05" else "train"} for n in images]
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(write_set(tmp_path, rows, images))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 35, "validation": 5, "test": 5}
    assert ids(dataset)["test"] == [f"{i:02d}.jpg" for i in range(5)]
    assert "validation drawn from train" in caplog.text
    assert ids(data.load(str(tmp_path / "all.jsonl"), splits=("validation",))) == {
        "validation": ids(dataset)["validation"]
    }


def test_train_and_validation_stay_as_they_are(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(5)}
    rows = [{"image": n, "caption": n, "split": "val" if n < "2" else "train"} for n in images]
    assert set(data.load(write_set(tmp_path, rows, images))) == {"train", "validation"}


def test_one_image_in_two_splits_and_rows_without_a_split_are_errors(tmp_path):
    images = {"a.jpg": jpeg(0), "b.jpg": jpeg(1)}
    rows = [{"image": "a.jpg", "caption": "x", "split": "train"}, {"image": "a.jpg", "caption": "y", "split": "test"}]
    with pytest.raises(DataError, match=r"line 2: image a.jpg is in split 'test', and in 'train' at all.jsonl line 1"):
        data.load(write_set(tmp_path, rows, images))
    rows[1] = {"image": "b.jpg", "caption": "y"}
    rows.append({"image": "b.jpg", "caption": "y"})
    rows[0]["split"] = "test"
    with pytest.raises(DataError, match=r"image b.jpg has no split, others do"):
        data.load(write_set(tmp_path, rows, images))


def test_too_few_images_to_split(tmp_path):
    with pytest.raises(DataError, match="2 images are too few"):
        data.load(plain_set(tmp_path, 2))
    assert {split: len(rows) for split, rows in data.load(plain_set(tmp_path, 3)).items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


# ---- ids


def test_an_id_of_two_different_images_is_an_error(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(5)}
    rows = [{"image": name, "caption": "x", "image_id": i % 4} for i, name in enumerate(images)]
    with pytest.raises(
        DataError, match=r"image_id '0' names two different images: 0.jpg \(all.jsonl line 1\) and 4.jpg"
    ):
        data.load(write_set(tmp_path, rows, images))
    images["4.jpg"] = images["0.jpg"]  # the same image twice is no contradiction
    assert sum(map(len, data.load(write_set(tmp_path, rows, images)).values())) == 4


# ---- captions


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("", "is empty"),
        (" \n\t ", "is empty"),
        (None, "is empty"),
        (5, "is int, not text"),
        (["fine", ""], "is empty"),
        (["fine", 2.5], "is float, not text"),
        ([{"tokens": "x"}], "is dict, not text"),
        ([], "is empty"),
    ],
)
def test_a_bad_caption_names_image_and_row_unless_it_may_be_skipped(tmp_path, caption, says, caplog):
    images = {f"{i:02d}.jpg": jpeg(i) for i in range(10)}
    rows = [{"image": name, "captions": ["good"]} for name in images]
    rows[3]["captions"] = caption
    file = write_set(tmp_path, rows, images)
    with pytest.raises(DataError, match=says) as error:
        data.load(file)
    for part in ("all.jsonl line 4", "03.jpg", "--skip_bad_samples"):
        assert part in str(error.value)
    bad = []
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(file, skip_bad_samples=True, bad_samples=bad)
    partly = isinstance(caption, list) and "fine" in caption
    assert sum(map(len, dataset.values())) == (10 if partly else 9)
    assert "dropped: 1" in caplog.text
    assert [(sample["image_id"], sample["image"]) for sample in bad] == [("03.jpg", "03.jpg")]
    assert says in bad[0]["reason"]


@pytest.mark.parametrize("fault", ["caption", "image"])
def test_a_scored_split_is_never_cut(tmp_path, fault):
    images = {f"{i}.jpg": jpeg(i) for i in range(6)}
    rows = [{"image": n, "caption": n, "split": ["train", "val", "test"][i // 2]} for i, n in enumerate(images)]
    for broken, allowed in ((0, True), (2, False), (4, False)):
        broken_rows, broken_images = [dict(row) for row in rows], dict(images)
        if fault == "caption":
            broken_rows[broken]["caption"] = " "
        else:
            del broken_images[f"{broken}.jpg"]
        folder = tmp_path / str(broken)
        folder.mkdir()
        file = write_set(folder, broken_rows, broken_images)
        if allowed:
            assert [len(rows) for rows in data.load(file, skip_bad_samples=True).values()] == [1, 2, 2]
        else:
            with pytest.raises(ValueError, match="never out of a split that is scored"):
                data.load(file, skip_bad_samples=True)


def test_empty_files_are_not_one_image(tmp_path):
    images = {f"{i}.jpg": jpeg(i) if i > 3 else b"" for i in range(10)}
    rows = [{"image": name, "caption": name} for name in images]
    dataset = data.load(write_set(tmp_path, rows, images))
    assert sum(map(len, dataset.values())) == 10
    assert len(check_images(datasets.DatasetDict(train=dataset["train"]), skip_bad_samples=True)[1]) >= 2


def test_white_space_in_captions_is_collapsed_and_half_characters_are_replaced(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(3)}
    rows = [{"image": name, "captions": ["\u00a0 A\tdog\r\n runs  . ", "a \ud83d cat \U0001f431"]} for name in images]
    captions = data.load(write_set(tmp_path, rows, images))["test"][0]["captions"]
    assert captions == ["A dog runs .", "a ? cat \U0001f431"]


# ---- fingerprint


def test_the_fingerprint_is_of_ids_and_captions_and_the_same_everywhere(tmp_path):
    file = plain_set(tmp_path, 60)
    first = data.load(file)
    assert fingerprint(first) == fingerprint(data.load(file))
    assert fingerprint(first["validation"]) == fingerprint(
        data.load(file)["validation"].select([5, 4, 3, 2, 1, 0])
    )  # the order says nothing
    assert len({fingerprint(first), *(fingerprint(rows) for rows in first.values())}) == 4
    code = f"import data; print(data.fingerprint(data.load({file!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == fingerprint(first)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert fingerprint(data.load(plain_set(moved, 60))) == fingerprint(first)
    rows = Path(file).read_text(encoding="utf-8").replace("once more 07", "once  more 08")
    Path(file).write_text(rows, encoding="utf-8")
    assert fingerprint(data.load(file)) != fingerprint(first)


def test_the_fingerprint_is_a_fixed_function_of_the_content():
    records = datasets.Dataset.from_dict({"image_id": ["b", "a"], "captions": [["x", "ÿ"], ["z"]]})
    content = '["test", 2]' + '["a", ["z"]]' + '["b", ["x", "ÿ"]]'
    expected = hashlib.sha256(content.encode()).hexdigest()[:16]
    assert fingerprint(datasets.DatasetDict(test=records)) == expected == "db044653eb962657"
    assert fingerprint(records) != fingerprint(datasets.DatasetDict(test=records))


# ---- scanning images

BAD = {
    "03.jpg": (b"", "empty"),
    "05.jpg": (b"not an image", "not an image"),
    "07.jpg": (jpeg(7, (64, 64))[:1500], "truncated"),
}


def damage(folder: Path) -> None:
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)


def test_unreadable_images_are_found_before_training(tmp_path):
    file = plain_set(tmp_path, split="train")
    damage(tmp_path)
    dataset = datasets.DatasetDict(train=data.load(file, data_format="annotations", splits=None)["train"])
    broken = sorted(set(BAD) & set(dataset["train"]["image_id"]))
    assert broken
    with pytest.raises(ImageError, match=rf"{len(broken)} of {len(dataset['train'])} images cannot be read") as error:
        check_images(dataset)
    assert "--skip_bad_samples" in str(error.value)
    assert all(str(tmp_path / name) in str(error.value) for name in broken)
    for num_proc in (1, 4):
        clean, bad = check_images(dataset, num_proc=num_proc, skip_bad_samples=True)
        assert [sample["image_id"] for sample in bad] == broken
        assert len(clean["train"]) == len(dataset["train"]) - len(broken)
        assert not set(broken) & set(clean["train"]["image_id"])
        for sample in bad:
            assert sample["split"] == "train"
            assert BAD[sample["image_id"]][1] in sample["reason"]
            assert json.dumps(sample)


def test_the_scan_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    dataset = data.load(plain_set(tmp_path))
    victim = dataset["train"][0]["image"]["path"]
    opened = []
    real = data.checks.open_image
    monkeypatch.setattr(
        data.checks, "open_image", lambda value, **options: (opened.append(value), real(value, **options))
    )
    assert check_images(dataset)[1] == []
    assert len(opened) == 40
    assert check_images(data.load(str(tmp_path / "all.jsonl")))[1] == []
    assert len(opened) == 40
    before = os.stat(victim)
    Path(victim).write_bytes(b"x" * before.st_size)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ImageError, match="not an image"):
        check_images(dataset)


def test_unreadable_images_inside_a_table(tmp_path):
    values = [jpeg(i) if i != 4 else b"broken" for i in range(10)]
    rows = [{"image": {"bytes": content, "path": None}, "caption": f"c {i}"} for i, content in enumerate(values)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    dataset = data.load(str(tmp_path / "a.parquet"))
    with pytest.raises(
        ImageError, match=r"1 of 10 images cannot be read:\n  \w+: image 00000004: image bytes: not an image"
    ):
        check_images(dataset)


def test_a_split_without_a_readable_image_is_an_error_even_when_skipping(tmp_path):
    file = plain_set(tmp_path, 5)
    for name in tmp_path.glob("*.jpg"):
        name.write_bytes(b"no " + name.name.encode())
    with pytest.raises(ImageError, match="no image of split"):
        check_images(data.load(file), skip_bad_samples=True)


def test_all_images_missing_is_an_error_even_when_skipping(tmp_path):
    file = plain_set(tmp_path, 5)
    for name in tmp_path.glob("*.jpg"):
        name.unlink()
    with pytest.raises(ImageError, match="5 of 5 images are missing"):
        data.load(file, skip_bad_samples=True)


# ---- scale


def test_images_of_equal_size_are_told_apart_by_short_pieces(tmp_path, monkeypatch):
    """1,000 images of one size: no more than a look at three pieces of each."""
    block = os.urandom(20000)
    os.makedirs(tmp_path / "images")
    rows = []
    for i in range(1000):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(i.to_bytes(4, "little") + block[4:])
        rows.append({"image": f"images/{i}.jpg", "captions": [f"caption {j} of {i}" for j in range(5)]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    real = data.records.read_file
    monkeypatch.setattr(
        data.records, "read_file", lambda path, start, stop: (read.append(stop - start), real(path, start, stop))[1]
    )
    dataset = data.load(str(tmp_path / "a.jsonl"))
    assert sum(map(len, dataset.values())) == 1000
    assert sum(read) == 1000 * 3 * 4096  # of 20,000 bytes each

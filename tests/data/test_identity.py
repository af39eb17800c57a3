"""An image is one image however it is named: random trees of pictures through every form of data set and every reader."""

import json
import os
import random
import unicodedata
from pathlib import Path

import datasets
import pytest
from random_trees import FORMS, picture, tree, write

import data
from captioning.sources import image_rows
from common.errors import UserError
from data.reader import Source
from data.rows import Options

TREES = int(os.environ.get("RANDOM_TREES", "12"))  # for each form; benchmarks/quality/identity.py runs 1,000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def captions_of(files: dict[str, bytes], form: str) -> dict[str, list[str]]:
    number = 1 if form in ("sidecar", "tar") else 2  # these hold one caption per image
    return {name: [f"caption {place} of picture {n}" for place in range(number)] for n, name in enumerate(files)}


def content_of(image) -> bytes:
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
    return Path(image).read_bytes()


def loaded(source, **options) -> dict[bytes, list[str]]:
    splits = data.load(str(source), all_as="test", **options)
    return {content_of(row["image"]): sorted(row["captions"]) for rows in splits.values() for row in rows}


@pytest.mark.parametrize("form", FORMS)
def test_each_caption_is_on_its_own_image(form, tmp_path):
    for seed in range(TREES):
        folder = tmp_path / f"tree{seed}"
        files = tree(seed, folder)
        captions = captions_of(files, form)
        source = write(form, folder, files, captions)
        expected = {content: sorted(captions[name]) for name, content in files.items()}
        assert loaded(source) == expected, (form, seed)
        images = [content_of(row["image"]) for row in image_rows([str(source)], Options())]
        assert sorted(images) == sorted(expected), (form, seed)  # infer.py: each image once


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "coco", "parquet_paths", "metadata"])
def test_a_name_that_is_not_exact_or_a_file_that_is_missing_gives_no_other_image(form, tmp_path):
    """Names in another case, Unicode form, with \\, without folder or ending; files taken away: the right image, or a
    refusal. Never another one's."""
    for seed in range(TREES):
        folder, draw = tmp_path / f"tree{seed}", random.Random(seed)
        files = tree(seed, folder)
        changed = {}
        for name in files:
            change = draw.choice(
                [
                    str.upper,
                    lambda text: unicodedata.normalize("NFD", text),
                    lambda text: text.replace("/", "\\"),
                    os.path.basename,
                    lambda text: os.path.splitext(text)[0],
                    lambda text: f"/home/me/{text}",
                    *[str] * 4,
                ]
            )
            changed.setdefault(change(name), name)
        captions = {written: [f"caption of {written}"] for written in changed}
        for written in draw.sample(sorted(changed), 1):
            (folder / changed[written]).unlink()
        source = write(form, folder, {written: files[name] for written, name in changed.items()}, captions)
        try:
            found = loaded(source, skip_bad_samples=True)
        except UserError:
            continue
        rightly = {files[name]: captions[written] for written, name in changed.items()}
        for content, texts in found.items():
            assert rightly.get(content) == texts, (form, seed)


def keys(name: str) -> dict[str, str]:
    """{caption: key} of the rows of a source."""
    return {row.captions[0]: row.key for row in Source(name, Options()).rows()}


@pytest.mark.parametrize(
    "form", ["csv", "jsonl", "json", "coco", "parquet_paths", "parquet_bytes", "saved", "tar", "metadata"]
)
def test_a_key_depends_neither_on_how_the_source_is_named_nor_on_other_rows(form, tmp_path, monkeypatch):
    files = tree(3, tmp_path / "set")
    captions = captions_of(files, form)
    source = write(form, tmp_path / "set", files, captions)
    expected = keys(str(source))
    assert len(set(expected.values())) == len(files)
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    monkeypatch.chdir(source.parent)
    for name in (
        source.name,
        f"./{source.name}",
        f"../{source.parent.name}/{source.name}",
        str(tmp_path / "link" / source.name),
    ):
        if form != "metadata" or name not in (source.name,):
            assert keys(name) == expected, name
    monkeypatch.chdir(tmp_path)
    assert keys(os.path.relpath(source)) == expected

    order = sorted(files)
    random.Random(0).shuffle(order)
    shorter = {name: files[name] for name in order[1:]}  # a row less, in another order
    if source.is_file():
        source.unlink()
    again = write(form, tmp_path / "set", shorter, captions)
    for caption, key in keys(str(again)).items():
        assert expected[caption] == key


def test_a_file_that_a_row_names_is_never_anothers_and_two_that_fit_are_both_named(tmp_path):
    for name in ("cam1/1.jpg", "cam2/1.jpg", "cam3/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(hash(name) % 1000, ".jpg"))
    rows = [{"image": "1.jpg", "caption": "which?"}, {"image": "cam3/2.jpg", "caption": "two"}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"1.jpg: found in 2 places: .*cam1/1.jpg and .*cam2/1.jpg.*--image_dir"):
        data.load(str(tmp_path / "set.json"))
    rows = [{"image": "cam1/1.jpg", "caption": "one"}, {"image": "1.jpg", "caption": "the other"}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    assert sorted(loaded(tmp_path / "set.json").values()) == [["one"], ["the other"]]
    rows = [{"image": f"cam{n}/2.jpg", "caption": f"camera {n}"} for n in (1, 3)]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"1 of 2 images are missing, the first: .*cam1/2.jpg"):
        data.load(str(tmp_path / "set.json"))


def test_the_tables_of_a_source_are_opened_once_for_all_its_splits(tmp_path, monkeypatch):
    rows = {"image": [{"bytes": picture(n, ".png"), "path": None} for n in range(3)], "caption": ["a", "b", "c"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    datasets.DatasetDict({name: table.select([n]) for n, name in enumerate(("train", "val", "test"))}).save_to_disk(
        tmp_path / "set"
    )
    opened = []
    load_from_disk = datasets.load_from_disk
    monkeypatch.setattr(datasets, "load_from_disk", lambda *args: opened.append(args) or load_from_disk(*args))
    read = [(row.split, row.captions) for row in Source(str(tmp_path / "set"), Options()).rows()]
    assert read == [("train", ["a"]), ("validation", ["b"]), ("test", ["c"])]
    assert len(opened) == 1

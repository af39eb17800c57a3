"""Captions of infer.py as a data set of the Hub: what would be uploaded, read back by huggingface_hub and datasets."""

import csv
import re

import pytest
import tiny
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from captioning.dataset import public_names, write_dataset
from common.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that nobody is to know of, with pictures, a column of people, and a model."""
    folder = tmp_path_factory.mktemp("private-client")
    tiny.build_folder(folder)
    rows = [["image", "photographer"]]
    for number in range(5):
        name = f"{'ab'[number % 2]}/{number}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (40 * number, 90, 30)).save(folder / name)
        rows.append([name, "Ms Secret"])
    (folder / "b/1.png").write_bytes(b"no picture")
    with open(folder / "list.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["out.jsonl", pytest.param("folder", marks=pytest.mark.slow)])
def test_captions_are_read_back_and_nothing_private_is_in_them(number, name, place, tmp_path):
    flags = ["--num_return_sequences", number, "--num_beams", 2, "--shard_size", 2]
    words = [place / "list.csv", "--model_name_or_path", place / "model", "--output", tmp_path / name, *flags]
    tiny.run("infer.py", *words, "--skip_bad_images", *(["--output_format", "parquet"] if name == "folder" else []))
    (tmp_path / "data").mkdir()
    write_dataset(str(tmp_path / name), "me/captions", tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["README.md", "captions.parquet"]
    rows = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    column = "caption" if number == 1 else "captions"
    assert rows.column_names == ["image", column]
    assert rows["image"][:] == ["a/0.png", "a/2.png", "b/3.png", "a/4.png"]  # one has no caption
    assert all(len(texts) == number for texts in rows[column]) if number > 1 else all(rows[column])
    card = DatasetCard.load(tmp_path / "data/README.md")
    assert card.data.task_categories == ["image-to-text"]
    assert (card.data.size_categories, card.data.license) == (["n<1K"], "other")
    assert f"{4 * number} captions of 4 images" in card.text
    assert "| model | model |" in card.text
    everything = (tmp_path / "data/README.md").read_text(encoding="utf-8") + str(rows.to_list())
    assert not re.search(r"private|Secret|photographer|/tmp|no picture", everything)


def test_export_lists_what_it_would_upload_and_refuses_what_is_no_output(place, tmp_path):
    words = [place / "a", "--model_name_or_path", place / "model", "--output", tmp_path / "out.csv"]
    tiny.run("infer.py", *words)
    listed = tiny.run("export.py", tmp_path / "out.csv", "--push_to_hub", "me/captions", "--dry_run").stdout
    assert "bytes in 2 files would be uploaded to me/captions" in listed
    refused = tiny.run("export.py", tmp_path / "out.csv", fails=True)
    assert (refused.returncode, "with --push_to_hub user/name" in refused.stderr) == (2, True)
    (tmp_path / "out.csv.shards/_report.json").unlink()  # as while it is running
    with pytest.raises(UserError, match="finish it with the same"):
        write_dataset(str(tmp_path / "out.csv"), "me/captions", tmp_path)


def test_names_lose_the_folder_that_all_are_in():
    assert public_names(["/home/me/x/a/1.png", "/home/me/x/b/1.png"]) == ["a/1.png", "b/1.png"]
    assert public_names(["s3://bucket/x/1.png", "s3://bucket/x/2.png"]) == ["1.png", "2.png"]
    assert public_names(["/home/me/1.png", "/home/you/2.png"]) == ["1.png", "2.png"]
    assert public_names(["/home/me/1.png", "/data/2.png"]) == ["1.png", "2.png"]
    assert public_names([r"C:\me\1.png", r"D:\2.png"]) == ["1.png", "2.png"]
    assert public_names(["photos/1.png"]) == ["1.png"]
    assert public_names(["a/1.png", "b/1.png"]) == ["a/1.png", "b/1.png"]

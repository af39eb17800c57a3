"""evaluate.py's references, from each format that data sets come in, are what train.py reads there: same images, same captions."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

import data
from common.errors import DataError
from data.caption_files import load_predictions, read_references

NAMES = [f"a/{number}.jpg" for number in range(6)] + [f"b/{number}.jpg" for number in range(4)]
CAPTIONS = {name: [f"{name[0]} {name[2]}, a dog", f"the {name[2]} of {name[0]}"] for name in NAMES}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9 + number, 3), 20 * number, np.uint8)).save(file, "JPEG")
    return file.getvalue()


PICTURES = {name: picture(number) for number, name in enumerate(NAMES)}


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(separator: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerows([["image", "caption"], *([name, text] for name in NAMES for text in CAPTIONS[name])])
    return file.getvalue()


def coco() -> dict:
    images = [{"id": number + 7, "file_name": name} for number, name in enumerate(NAMES)]
    notes = [{"image_id": image["id"], "caption": c} for image in images for c in CAPTIONS[image["file_name"]]]
    return {"images": images, "annotations": notes}


def karpathy() -> dict:
    sentences = {name: [{"raw": text, "sentid": 1} for text in CAPTIONS[name]] for name in NAMES}
    images = [{"filepath": n[0], "filename": n[2:], "cocoid": 7 + i, "split": ("train", "test")[i % 2], "sentids": [],
               "sentences": sentences[n]} for i, n in enumerate(NAMES)]  # fmt: skip
    return {"images": images}


ROWS = [{"image": name, "captions": CAPTIONS[name], "split": ("val", "test")[name[0] == "b"]} for name in NAMES]
TEXTS = {
    "metadata.jsonl": lines([{"file_name": name, "captions": CAPTIONS[name]} for name in NAMES]),
    "x.jsonl": lines(ROWS),
    "x.csv": table(","),
    "x.tsv": table("\t"),
    "list.json": json.dumps(ROWS),
    "map.json": json.dumps(CAPTIONS),
    "captions_val2014.json": json.dumps(coco()),
    "dataset_flickr8k.json": json.dumps(karpathy()),
    "Flickr8k.token.txt": "".join(f"{n}#{i}\t{text}\n" for n in NAMES for i, text in enumerate(CAPTIONS[n])),
}
FORMATS = [*TEXTS, "x.parquet", "x.tar", "saved"]


def make(folder: Path, name: str) -> Path:
    for image, content in PICTURES.items():
        file = folder / image
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(content)
    path = folder / name
    if name in TEXTS:
        path.write_text(TEXTS[name], encoding="utf-8")
    elif name == "x.parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    elif name == "x.tar":
        with tarfile.open(path, "w") as tar:
            for image in NAMES:
                for ending, content in (("jpg", PICTURES[image]), ("json", json.dumps({"captions": CAPTIONS[image]}))):
                    content = content.encode() if isinstance(content, str) else content
                    member = tarfile.TarInfo(f"{image[:-4]}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    else:
        images = [{"path": image, "bytes": PICTURES[image]} for image in NAMES]
        rows = {"image": images, "image_id": NAMES, "captions": list(CAPTIONS.values())}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
        datasets.DatasetDict(train=table.select(range(5)), test=table.select(range(5, 10))).save_to_disk(path)
    return folder if name == "metadata.jsonl" else path


def said_by(references: dict) -> list:
    return sorted(sorted(captions) for captions in references.values())


@pytest.mark.parametrize("name", FORMATS)
def test_references_are_what_a_data_set_says(name, tmp_path):
    source = make(tmp_path, name)
    loaded = data.load(str(source), cache_dir=tmp_path / "cache", all_as="test")
    references = read_references(source, "test")
    assert said_by(references.captions) == said_by(
        dict(enumerate(loaded["test" if "test" in loaded else "validation"]["captions"][:]))
    )
    everything = read_references(source)
    assert said_by(everything.captions) == sorted(map(sorted, CAPTIONS.values()))
    # What infer.py would write, by whole names, is each image's own prediction.
    (tmp_path / "p.jsonl").write_text(lines([{"image": f"/photos/{n}", "caption": CAPTIONS[n][0]} for n in NAMES]))
    predictions = load_predictions(tmp_path / "p.jsonl", everything)
    assert all(caption in everything.captions[image] for image, caption in predictions.items())


def test_references_of_a_folder_with_a_file_per_split_obey_the_split(tmp_path):
    notes = coco()
    for split, first, last in (("train", 0, 6), ("val", 6, 10)):
        images = notes["images"][first:last]
        ids = {image["id"] for image in images}
        content = {"images": images, "annotations": [n for n in notes["annotations"] if n["image_id"] in ids]}
        (tmp_path / f"captions_{split}2014.json").write_text(json.dumps(content))
    assert said_by(read_references(tmp_path, "validation").captions) == sorted(sorted(CAPTIONS[n]) for n in NAMES[6:])
    with pytest.raises(DataError, match="no image of split 'test'; it has train, validation: pass --split"):
        read_references(tmp_path, "test")


@pytest.mark.skipif("CAPTION_TEST_DATA" not in os.environ, reason="needs CAPTION_TEST_DATA")
def test_references_of_the_photographs(tmp_path):
    source = Path(os.environ["CAPTION_TEST_DATA"], "flickr8k")
    rows = data.load(str(source), cache_dir=tmp_path, all_as="test")["test"]
    assert said_by(read_references(source, "test").captions) == said_by(dict(enumerate(rows["captions"][:])))

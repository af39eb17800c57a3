"""Random folders of captioned pictures, and every form in which such a set comes: the inputs of the identity tests."""

import csv
import io
import json
import os
import random
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STEMS = ("a", "A", "0003", "3", "a.b", "a_b", "é", "e\u0301", "x y", "k#1", "100%", "b", "ünï", "photo (1)", "-", "_x")
FOLDERS = ("", "cam1", "cam2", "cam1/deep", "train2014", "Ä", "with space", "x.y")
ENDINGS = (".jpg", ".png", ".JPG", ".jpeg", ".webp")
JUNK = (".ipynb_checkpoints", "@eaDir", ".git", "__MACOSX")
FORMS = (
    "csv",
    "tsv",
    "json",
    "jsonl",
    "map",
    "coco",
    "parquet_paths",
    "parquet_bytes",
    "saved",
    "tar",
    "sidecar",
    "metadata",
)


def picture(number: int, ending: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    content = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending.lower().lstrip(".")]
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def tree(seed: int, folder: Path, most: int = 14) -> dict[str, bytes]:
    """Make a random folder of pictures; {name below it: content}. Also what other programs leave, copies of some pictures
    there, and a linked folder."""
    draw = random.Random(seed)
    names = {f"{draw.choice(FOLDERS)}/{draw.choice(STEMS)}{draw.choice(ENDINGS)}".lstrip("/") for _ in range(most)}
    unique = {
        unicodedata.normalize("NFC", name): name for name in sorted(names)
    }  # some file systems hold one form only
    files = {}
    for number, name in enumerate(sorted(unique.values())):
        content = picture(1000 * seed + number, os.path.splitext(name)[1])
        place = folder / name
        if draw.random() < 0.1 and "/" in name:
            place = folder.parent / f"{folder.name}_elsewhere" / name
            link = folder / name.split("/")[0]
            if not link.exists():
                (folder.parent / f"{folder.name}_elsewhere" / name.split("/")[0]).mkdir(parents=True, exist_ok=True)
                os.symlink(folder.parent / f"{folder.name}_elsewhere" / name.split("/")[0], link)
            place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        files[name] = content
    for junk in draw.sample(JUNK, 2):
        (folder / junk).mkdir(exist_ok=True)
        (folder / junk / os.path.basename(draw.choice(sorted(files)))).write_bytes(picture(77, "png"))
    return files


def write(form: str, folder: Path, files: dict[str, bytes], captions: dict[str, list[str]]) -> Path:
    """Write the set in this form; returns what a person would give as its name."""
    rows = [{"file_name": name, "captions": captions[name]} for name in files]
    flat = [{"file_name": name, "caption": caption} for name in files for caption in captions[name]]
    if form in ("csv", "tsv"):
        with open(folder / f"set.{form}", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", "caption"], delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(flat)
        return folder / f"set.{form}"
    if form == "jsonl":
        pandas.DataFrame(flat).to_json(folder / "set.jsonl", orient="records", lines=True, force_ascii=False)
        return folder / "set.jsonl"
    if form in ("json", "map"):
        content = rows if form == "json" else captions
        (folder / f"{form}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder / f"{form}.json"
    if form == "coco":
        images = [{"id": number, "file_name": name} for number, name in enumerate(files)]
        annotations = [{"image_id": n, "caption": text} for n, name in enumerate(files) for text in captions[name]]
        (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
        return folder / "coco.json"
    if form == "parquet_paths":
        pq.write_table(
            pa.table({"image": list(files), "captions": [captions[name] for name in files]}), folder / "p.parquet"
        )
        return folder / "p.parquet"
    if form == "metadata":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder
    if form == "sidecar":
        for name in files:
            (folder / f"{name}.txt").write_text(captions[name][0], encoding="utf-8")
        return folder
    inside = folder.parent / f"{folder.name}_{form}"
    inside.mkdir(exist_ok=True)
    structs = [{"bytes": content, "path": os.path.basename(name)} for name, content in files.items()]
    texts = [captions[name] for name in files]
    if form == "parquet_bytes":
        pq.write_table(pa.table({"image": structs, "captions": texts}), inside / "p.parquet", row_group_size=3)
        return inside / "p.parquet"
    if form == "saved":
        kind = datasets.Features(
            {"image": datasets.Image(decode=False), "captions": datasets.List(datasets.Value("string"))}
        )
        datasets.Dataset.from_dict({"image": structs, "captions": texts}, features=kind).save_to_disk(
            str(inside / "set")
        )
        return inside / "set"
    with tarfile.open(inside / "set.tar", "w") as archive:
        for number, (name, content) in enumerate(files.items()):
            for ending, member in ((os.path.splitext(name)[1], content), (".txt", captions[name][0].encode())):
                info = tarfile.TarInfo(f"{number:05d}{ending.lower()}")
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))
    return inside / "set.tar"

"""The same photographs from every kind of source to every output format: are the captions equal and readable by others?

    CAPTION_TEST_DATA=... python -m benchmarks.quality.formats [--photos 800]

infer.py captions the 800 Flickr8k photographs as a folder, tars, Parquet files, a save_to_disk folder and a list in a CSV
file, each to every output format. pandas, tarfile and `load_dataset("imagefolder")` read these back, and evaluate.py
scores those that it supports. The captions come from a small untrained model: what they say does not matter.
"""

import argparse
import importlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import pandas
import torch
from PIL import Image

from benchmarks.harness import RESULTS, write_result
from models.loading import build_model

CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "initializer_range": 0.02,
    },
    "text_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}  # fmt: skip
FORMS = ("o.jsonl", "o.csv", "o.parquet", "folder", "metadata.jsonl", "metadata.csv", "results.json", "o.tar", "txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=800)
    parser.add_argument("--output", default=str(RESULTS / "formats.json"))
    arguments = parser.parse_args()
    data = Path(os.environ["CAPTION_TEST_DATA"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        photos = sorted((data / "flickr8k/Flicker8k_Dataset").glob("*.jpg"))[: arguments.photos]
        model = build(folder / "model", data)
        sources, references = write_sources(folder / "sources", photos, data)
        expected: dict[str, str] = {}
        record: dict[str, dict] = {}
        for source in sources:
            record[source.name] = {}
            for form in FORMS:
                place = folder / "out" / source.name / form
                written, scores = caption(model, source, place, references)
                expected = expected or written
                equal = sum(written.get(name) == text for name, text in expected.items())
                record[source.name][form] = {"equal": f"{equal} of {len(expected)}", **scores}
                print(source.name, form, record[source.name][form], f"{time.perf_counter() - start:.0f} s", flush=True)
                assert written == expected, (source, form)
    scores = {json.dumps(cell["scores"]) for cells in record.values() for cell in cells.values() if "scores" in cell}
    assert len(scores) == 1, scores
    distinct = len(set(expected.values()))
    write_result(Path(arguments.output), {"photos": len(expected), "distinct_captions": distinct, "sources": record})


def build(folder: Path, data: Path) -> Path:
    """A small untrained BLIP whose captions depend on the picture, in the references' most frequent words."""
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    text = (data / "flickr8k/Flickr8k.token.txt").read_text(encoding="utf-8").lower()
    usual = [word for word, _ in Counter(text.split()).most_common(300) if word.isalpha()]
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *usual]), encoding="utf-8")
    torch.manual_seed(0)
    model, processor = build_model(str(folder / "small.json"), str(vocabulary), [])
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1 and ("crossattention" in name or "vision" in name):
                weights.mul_(8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_sources(folder: Path, photos: list[Path], data: Path) -> tuple[list[Path], Path]:
    """The five sources, and a file of references."""
    (folder / "photos").mkdir(parents=True)
    (folder / "tars").mkdir()
    (folder / "parquet").mkdir()
    for photo in photos:
        (folder / "photos" / photo.name).write_bytes(photo.read_bytes())
    for number in range(4):
        with tarfile.open(folder / "tars" / f"{number:05}.tar", "w") as tar:
            for photo in photos[number * len(photos) // 4 : (number + 1) * len(photos) // 4]:
                tar.add(photo, photo.name)
    rows = [{"image": {"bytes": photo.read_bytes(), "path": photo.name}} for photo in photos]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for number in range(4):
        table.shard(4, number, contiguous=True).to_parquet(folder / "parquet" / f"{number}.parquet")
    table.save_to_disk(folder / "saved")
    pandas.DataFrame({"file": [f"photos/{photo.name}" for photo in photos]}).to_csv(folder / "list.csv", index=False)
    captions: dict[str, list[str]] = {}
    for line in (data / "flickr8k/Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(caption)
    references = folder / "references.json"
    references.write_text(json.dumps({photo.name: captions[photo.name] for photo in photos}), encoding="utf-8")
    return [folder / name for name in ("photos", "tars", "parquet", "saved", "list.csv")], references


def caption(model: Path, source: Path, place: Path, references: Path) -> tuple[dict[str, str], dict]:
    """({file name: caption} as others read them back, {"scores": ...} if evaluate.py reads the format)."""
    place.parent.mkdir(parents=True, exist_ok=True)
    output = ["--output", place]
    if place.name == "txt":
        output += ["--output_format", "txt"]
    elif place.name.startswith(
        "metadata"
    ):  # in the images' folder, which has copies of images that are inside a source
        folder = source if source.name == "photos" else source.parent if source.name == "list.csv" else place.parent
        place = folder / place.name
        output = ["--output", place]
    run("infer", source, *output, "--model_name_or_path", model, "--num_beams", 1, "--max_new_tokens", 6)
    found = read_back(place, source)
    scores = {}
    if place.name in ("o.jsonl", "o.csv", "o.parquet", "results.json"):
        quick = ["--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--report", "false"]
        scored = place.parent / f"scores-{place.name}"
        run("evaluate", "--predictions", place, "--references", references, "--output_dir", scored, *quick)
        metrics = json.loads((scored / "coco_metrics.json").read_text(encoding="utf-8"))
        scores = {"scores": {name: metrics[name] for name in ("Bleu_1", "ROUGE_L", "CIDEr")}}
    if place.name.startswith("metadata"):
        place.unlink()
    return found, scores


def run(script: str, *words) -> None:
    """Run the script's main in this process, with these words as its command line."""
    sys.argv = [f"{script}.py", *map(str, words)]
    importlib.import_module(script).main()


def read_back(place: Path, source: Path) -> dict[str, str]:
    readers = {".jsonl": lambda path: pandas.read_json(path, lines=True), ".csv": pandas.read_csv}
    readers |= {".parquet": pandas.read_parquet, "": pandas.read_parquet}
    if place.name == "txt":
        files = sorted(place.rglob("*.txt"))
        return {f"{file.stem}.jpg": file.read_text(encoding="utf-8").rstrip("\n") for file in files}
    if place.name == "o.tar":
        with tarfile.open(place) as tar:
            texts = {m.name: tar.extractfile(m).read() for m in tar}
        images = {name for name in texts if name.endswith(".jpg")}
        assert all(Image.open(io.BytesIO(texts[name])).size for name in images)
        return {Path(name).name: texts[name.replace(".jpg", ".txt")].decode() for name in images}
    if place.name == "results.json":
        return {row["image_id"]: row["caption"] for row in json.loads(place.read_text(encoding="utf-8"))}
    if place.name.startswith("metadata"):
        load = datasets.load_dataset("imagefolder", data_dir=str(place.parent), split="train")
        load = load.cast_column("image", datasets.Image(decode=False))
        listed = readers[place.suffix](place).file_name
        names = [Path(row["image"]["path"]).name for row in load]
        assert sorted(names) == sorted(Path(name).name for name in listed)
        return dict(zip(names, load["caption"], strict=True))
    frame = readers[place.suffix](place)
    return {Path(name).name: text for name, text in zip(frame.image, frame.caption, strict=True)}


if __name__ == "__main__":
    main()

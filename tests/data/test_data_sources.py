"""Every format of `data.load`, from small folders of the very shape of the published sets."""

import http.server
import io
import json
import logging
import os
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import data
from data import DataError, ImageError
from data.formats import karpathy

FLICKR_NAMES = [f"{1000 + i}_{i:010x}.jpg" for i in range(40)]


def jpeg(number: int) -> bytes:
    """A small photo, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def put(folder: Path, names) -> None:
    """Image files; a name's place in the list says what is in it."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


def write_jsonl(file: Path, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def image_set(number: int) -> tuple[list[str], list[dict]]:
    names = [f"{i}.jpg" for i in range(number)]
    return names, [{"image": name, "captions": [f"picture {name}", f"again {name}"]} for name in names]


def ids(dataset) -> dict:
    return {split: list(rows["image_id"]) for split, rows in dataset.items()}


def sizes(dataset) -> dict:
    return {split: len(rows) for split, rows in dataset.items()}


def check(dataset) -> None:
    """What holds for every source: the three columns, readable images, clean captions, no image in two splits."""
    seen = set()
    for rows in dataset.values():
        assert rows.column_names[:3] == ["image_id", "image", "captions"]
        for row in rows:
            assert data.open_image(row["image"]).size == (16, 12)
            assert row["captions"]
            assert all(caption == " ".join(caption.split()) != "" for caption in row["captions"])
            content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
            assert content not in seen
            seen.add(content)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- Flickr8k


def flickr_token_file(folder: Path, names=FLICKR_NAMES) -> None:
    lines = [f"{name}#{i}\tCaption  {i} of {name} , with a comma .\n" for name in names for i in range(5)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))


def test_flickr8k_as_published(test_data, caplog):
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(test_data / "flickr8k"))
    assert sizes(dataset) == {"train": 718, "validation": 50, "test": 32}  # 90/5/5 by hash: pinned
    assert all(len(captions) == 5 for rows in dataset.values() for captions in rows["captions"])
    assert len({name for names in ids(dataset).values() for name in names}) == 800
    row = dataset["train"][0]
    assert row["image_id"] == Path(row["image"]["path"]).name
    assert row["image"]["bytes"] is None
    assert data.open_image(row["image"]).mode == "RGB"
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("data")]
    assert len(messages) == 1
    for part in ("flickr8k detected", "800 images", "4,000 captions", "train 718 / 3,590", "seed 42"):
        assert part in messages[0]
    captions = {row["image_id"]: row["captions"] for rows in dataset.values() for row in rows}
    assert captions["1000268201_693b08cb0e.jpg"][1] == "A girl going into a wooden building ."


@pytest.mark.parametrize("images", ["Flicker8k_Dataset", "Images", "images", "Flickr8k_Dataset/Flicker8k_Dataset"])
def test_flickr8k_image_folders(tmp_path, images):
    put(tmp_path / images, FLICKR_NAMES)
    flickr_token_file(tmp_path)
    dataset = data.load(str(tmp_path))
    assert sizes(dataset) == {"train": 32, "validation": 3, "test": 5}  # wherever the images are
    check(dataset)


def test_flickr8k_text_in_a_folder_of_its_own(tmp_path):
    put(tmp_path / "Flicker8k_Dataset", FLICKR_NAMES)
    (tmp_path / "Flickr8k_text").mkdir()
    flickr_token_file(tmp_path / "Flickr8k_text")
    by_folder, by_file = data.load(str(tmp_path)), data.load(str(tmp_path / "Flickr8k_text" / "Flickr8k.token.txt"))
    check(by_folder)
    assert ids(by_folder) == ids(by_file)


def test_flickr8k_official_split_files_are_used(tmp_path, caplog):
    put(tmp_path / "Flicker8k_Dataset", FLICKR_NAMES)
    flickr_token_file(tmp_path)
    official = {"train": FLICKR_NAMES[10:], "dev": FLICKR_NAMES[1:6], "test": FLICKR_NAMES[6:10]}
    for word, names in official.items():
        (tmp_path / f"Flickr_8k.{word}Images.txt").write_text("\n".join(names) + "\n")
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(tmp_path))
    assert ids(dataset) == {"train": official["train"], "validation": official["dev"], "test": official["test"]}
    assert "1 images in none of the official split lists" in caplog.text
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(DataError, match=r"devImages.txt: missing"):
        data.load(str(tmp_path))


def test_flickr8k_of_kaggle(tmp_path):
    put(tmp_path / "Images", FLICKR_NAMES)
    rows = ["image,caption"]
    for name in FLICKR_NAMES:
        rows += [f'{name},"A dog , a ""big"" one , runs ."', f"{name},Two dogs ."]
    (tmp_path / "captions.txt").write_text("\r\n".join(rows) + "\r\n")
    dataset = data.load(str(tmp_path))
    check(dataset)
    assert dataset["test"][0]["captions"] == ['A dog , a "big" one , runs .', "Two dogs ."]


def test_flickr8ks_stray_name_is_dropped_and_said(tmp_path, caplog):
    put(tmp_path / "Images", FLICKR_NAMES)
    flickr_token_file(tmp_path, [*FLICKR_NAMES, "2258277193_586949ec62.jpg.1"])
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(tmp_path))
    assert sum(sizes(dataset).values()) == 40
    assert "2258277193_586949ec62.jpg.1" in caplog.text


def test_flickr8k_missing_image_and_broken_line(tmp_path):
    put(tmp_path / "Images", FLICKR_NAMES[:-1])
    flickr_token_file(tmp_path)
    with pytest.raises(ImageError, match=rf"1 of 40 images are missing.*{FLICKR_NAMES[-1]}.*skip_bad_samples"):
        data.load(str(tmp_path))
    bad = []
    assert sum(sizes(data.load(str(tmp_path), skip_bad_samples=True, bad_samples=bad)).values()) == 39
    assert [sample["image_id"] for sample in bad] == [FLICKR_NAMES[-1]]
    with (tmp_path / "Flickr8k.token.txt").open("a") as file:
        file.write("a line without a tab\n")
    with pytest.raises(DataError, match="line 201: no tab"):
        data.load(str(tmp_path))


# ---- the Hub sets, as local folders of the same shape

PARQUET = "data/{split}-00000-of-00001.parquet"


def hub_folder(folder: Path, **splits: datasets.Dataset) -> str:
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / PARQUET.format(split=split))
    return str(folder)


def pairs(numbers, named: bool) -> datasets.Dataset:
    """The shape of ariG23498/flickr8k: one row an (image, caption) pair, five in a row."""
    rows = [
        {
            "image": {"bytes": jpeg(number), "path": FLICKR_NAMES[number] if named else None},
            "caption": f"caption {i} of {number}",
        }
        for number in numbers
        for i in range(5)
    ]
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("scattered", [True, False])
def test_the_hubs_flickr8k_one_row_a_pair_becomes_one_record_an_image(tmp_path, named, scattered):
    rows = pairs(range(40), named)
    dataset = data.load(hub_folder(tmp_path, train=rows.shuffle(seed=1) if scattered else rows))
    assert sizes(dataset) == {"train": 37, "validation": 2, "test": 1}
    check(dataset)
    for split in dataset.values():
        assert split.column_names == ["image_id", "image", "captions"]
        for row in split:
            number = row["captions"][0].split()[-1]
            assert sorted(row["captions"]) == [f"caption {i} of {number}" for i in range(5)]
            assert row["image"]["bytes"] == jpeg(int(number))
            assert not named or row["image_id"] == FLICKR_NAMES[int(number)]


def test_images_that_share_a_name_but_not_their_bytes_stay_apart(tmp_path):
    rows = [{"image": {"bytes": jpeg(i), "path": "image.jpg"}, "caption": f"c {i}"} for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = data.load(hub_folder(tmp_path, train=datasets.Dataset.from_list(rows, features=features)))
    check(dataset)
    assert sum(sizes(dataset).values()) == 20
    assert sorted(name for names in ids(dataset).values() for name in names) == [f"{i:08d}" for i in range(20)]


KARPATHY = {  # split -> (cocoid, folder)
    "train": [(1, "train2014"), (2, "train2014")],
    "restval": [(3, "val2014")],
    "val": [(4, "val2014")],
    "test": [(5, "val2014"), (6, "val2014")],
}


def coco_name(folder: str, number: int) -> str:
    return f"COCO_{folder}_{number:012d}.jpg"


def karpathy_rows() -> list[dict]:
    """The columns of yerevann/coco-karpathy."""
    return [
        {
            "filepath": folder,
            "sentids": [number * 10 + i for i in range(5)],
            "filename": coco_name(folder, number),
            "imgid": number - 1,
            "split": split,
            "sentences": [f"Sentence {i} of {number}." for i in range(5)],
            "cocoid": number,
            "url": f"http://images.cocodataset.org/{folder}/{coco_name(folder, number)}",
        }
        for split, images in KARPATHY.items()
        for number, folder in images
    ]


KARPATHY_IDS = {"train": ["1", "2", "3"], "validation": ["4"], "test": ["5", "6"]}


def karpathy_hub_folder(folder: Path) -> str:
    rows = karpathy_rows()
    by_split = {split: [row for row in rows if row["split"] == split] for split in KARPATHY}
    return hub_folder(
        folder,
        train=datasets.Dataset.from_list(by_split["train"]),
        restval=datasets.Dataset.from_list(by_split["restval"]),
        validation=datasets.Dataset.from_list(by_split["val"]),
        test=datasets.Dataset.from_list(by_split["test"]),
    )


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_the_hubs_coco_karpathy_with_a_local_image_folder(tmp_path, layout):
    source = karpathy_hub_folder(tmp_path / "set")
    for row in karpathy_rows():
        name = row["filename"] if layout == "flat" else f"{row['filepath']}/{row['filename']}"
        (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / name).write_bytes(jpeg(row["cocoid"]))
    dataset = data.load(source, image_dir=str(tmp_path / "coco"))
    assert {split: sorted(rows) for split, rows in ids(dataset).items()} == KARPATHY_IDS
    check(dataset)
    assert dataset["train"][2]["captions"] == [f"Sentence {i} of 3." for i in range(5)]
    assert next(iter(data.load(source, image_dir=str(tmp_path / "coco"), streaming=True)["test"]))["image_id"] == "5"


@pytest.mark.parametrize("by_file", [True, False])
def test_dataset_coco_json(tmp_path, by_file):
    images = [
        row | {"sentences": [{"raw": text + " ", "tokens": text.split()} for text in row["sentences"]]}
        for row in karpathy_rows()
    ]
    for row in images:
        file = tmp_path / row["filepath"] / row["filename"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jpeg(row["cocoid"]))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    dataset = data.load(str(tmp_path / "dataset_coco.json" if by_file else tmp_path))
    assert {split: sorted(rows) for split, rows in ids(dataset).items()} == KARPATHY_IDS
    check(dataset)


@pytest.fixture
def coco_server(monkeypatch):
    """A server that stands in for images.cocodataset.org; `.asked` lists the paths asked for, `.faults` what goes wrong."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            fault = server.faults.get(self.path, [])
            status = fault.pop(0) if fault else 200
            content = jpeg(int(self.path[-16:-4]))
            self.send_response(200 if status == "half" else status)
            self.send_header("Content-Length", str(len(content) if status in (200, "half") else 0))
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere.jpg")
            self.end_headers()
            if status in (200, "half"):
                self.wfile.write(content if status == 200 else content[:50])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.faults = [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(karpathy, "COCO_HOST", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_coco_images_are_fetched_once_and_only_those_wanted(tmp_path, coco_server):
    source, cache = karpathy_hub_folder(tmp_path / "set"), str(tmp_path / "cache")
    dataset = data.load(source, cache_dir=cache, splits=("test",), max_samples={"test": 1})
    assert ids(dataset) == {"test": ["5"]}
    assert coco_server.asked == ["/val2014/COCO_val2014_000000000005.jpg"]
    dataset = data.load(source, cache_dir=cache)
    assert {split: sorted(rows) for split, rows in ids(dataset).items()} == KARPATHY_IDS
    check(dataset)
    assert len(coco_server.asked) == 6  # the one that was there was not asked for again
    data.load(source, cache_dir=cache)
    assert len(coco_server.asked) == 6
    assert not [path for path in Path(cache).rglob("*") if path.name.startswith(".") or path.suffix == ".part"]


def test_a_broken_fetch_is_retried_and_a_stopped_one_continues(tmp_path, coco_server):
    source, cache = karpathy_hub_folder(tmp_path / "set"), str(tmp_path / "cache")
    coco_server.faults = {
        "/train2014/COCO_train2014_000000000001.jpg": [503],
        "/train2014/COCO_train2014_000000000002.jpg": ["half"],
        "/val2014/COCO_val2014_000000000006.jpg": [404],
    }
    with pytest.raises(DataError, match=r"000000000006.jpg: the server returned 404"):
        data.load(source, cache_dir=cache)
    fetched = {path.name for path in Path(cache).rglob("COCO_*.jpg")}
    assert len(fetched) >= 4  # those that were begun before the fault are kept
    asked = len(coco_server.asked)
    check(data.load(source, cache_dir=cache))
    asked_again = {name.rsplit("/", 1)[1] for name in coco_server.asked[asked:]}
    assert "COCO_val2014_000000000006.jpg" in asked_again
    assert not asked_again & fetched


def test_a_redirect_to_another_host_is_not_followed(tmp_path, coco_server):
    coco_server.faults = {"/train2014/COCO_train2014_000000000001.jpg": [302]}
    with pytest.raises(DataError, match="returned 302"):
        data.load(karpathy_hub_folder(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


def test_without_a_network_the_message_names_image_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(karpathy, "COCO_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(karpathy.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="image_dir"):
        data.load(karpathy_hub_folder(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


def test_only_coco_names_are_ever_asked_for(tmp_path, coco_server):
    rows = [row | {"filename": "../../etc/passwd.jpg"} for row in karpathy_rows()[:1]]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": rows}))
    with pytest.raises(ImageError, match="missing"):
        data.load(str(tmp_path), data_format="karpathy", cache_dir=str(tmp_path / "cache"))
    assert coco_server.asked == []


# ---- annotation files


def test_coco_annotations_of_two_splits(tmp_path, caplog):
    (tmp_path / "annotations").mkdir()
    for folder, numbers in (("train2014", (1, 2, 3)), ("val2014", (4, 5))):
        images = [{"id": i, "file_name": coco_name(folder, i), "coco_url": "http://x"} for i in numbers]
        annotations = [{"id": i * 9 + j, "image_id": i, "caption": f"{i} {j}\n"} for i in numbers for j in range(5)]
        content = {"images": [*images, {"id": 99, "file_name": "bare.jpg"}], "annotations": annotations, "info": {}}
        (tmp_path / "annotations" / f"captions_{folder}.json").write_text(json.dumps(content))
        (tmp_path / "annotations" / f"instances_{folder}.json").write_text("{}")
        put(tmp_path / folder, [coco_name(folder, i) for i in range(6)])
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(tmp_path))
    assert ids(dataset) == {"train": ["1", "2", "3"], "validation": ["4", "5"]}
    assert dataset["validation"][1]["captions"] == [f"5 {j}" for j in range(5)]
    assert "2 images without captions" in caplog.text
    check(dataset)


def test_a_file_of_coco_annotations_with_image_dir(test_data, tmp_path):
    file = test_data / "coco_karpathy_test" / "captions_karpathy_test.json"
    with pytest.raises(ImageError, match=r"5000 of 5000 images are missing.*image_dir"):
        data.load(str(file))
    names = [image["file_name"] for image in json.loads(file.read_text())["images"]]
    for number, name in enumerate(names):  # the photos are not in the test data: their names are
        (tmp_path / name).write_bytes(f"{number}".encode())
    dataset = data.load(str(file), image_dir=str(tmp_path))
    assert sizes(dataset) == {"test": 5000}
    assert sum(map(len, dataset["test"]["captions"])) == 25010


def test_vizwiz_processed_file(test_data, tmp_path):
    file = test_data / "vizwiz" / "processed_val.json"
    rows = json.loads(file.read_text())
    (tmp_path / "val").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / row["image"]).write_bytes(f"{number}".encode())
    dataset = data.load(str(file), image_dir=str(tmp_path))
    assert sizes(dataset) == {"validation": 4000}
    first = dataset["validation"][0]
    assert first["image_id"] == "23431"
    assert first["text_detected"] is True
    assert first["captions"] == rows[0]["captions"]
    assert list(dataset["validation"]["text_detected"]) == [row["text_detected"] for row in rows]


def test_vizwiz_official_annotations_without_rejected_and_precanned(tmp_path, caplog):
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        names = [f"VizWiz_{split}_{i:08d}.jpg" for i in numbers]
        for name, number in zip(names, numbers, strict=True):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / name).write_bytes(jpeg(number))
        images = [
            {"file_name": name, "vizwiz_url": "https://x", "id": number, "text_detected": number == 0}
            for name, number in zip(names, numbers, strict=True)
        ]
        kinds = [(False, False), (True, False), (False, True), (False, False)]
        annotations = [
            {"caption": f"{i} {j}", "image_id": i, "is_precanned": precanned, "is_rejected": rejected, "id": i * 9 + j}
            for i in numbers
            for j, (precanned, rejected) in enumerate(kinds)
        ]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {"info": {}, "images": images, "annotations": annotations}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(tmp_path))
    assert ids(dataset) == {"train": ["0", "1"], "validation": ["2"]}
    assert list(dataset["train"]["captions"]) == [["0 0", "0 3"], ["1 0", "1 3"]]
    assert list(dataset["train"]["text_detected"]) == [True, False]
    assert "6 rejected or precanned captions" in caplog.text
    check(dataset)


def test_jsonl_with_ids_splits_and_extra_columns(tmp_path):
    put(tmp_path, ["a.jpg", "b.jpg", "sub/c.jpg"])
    rows = [
        {"image": "a.jpg", "captions": ["one", "two"], "image_id": 7, "split": "train", "source": "web", "n": 1},
        {"image": "b.jpg", "caption": " three\n four ", "captions": ["three four"], "image_id": 8, "split": "val"},
        {"image": str(tmp_path / "sub/c.jpg"), "captions": "five", "image_id": "x", "split": "test", "source": None},
    ]
    write_jsonl(tmp_path / "all.jsonl", rows)
    dataset = data.load(str(tmp_path / "all.jsonl"))
    assert ids(dataset) == {"train": ["7"], "validation": ["8"], "test": ["x"]}
    assert [rows["captions"][0] for rows in dataset.values()] == [["one", "two"], ["three four"], ["five"]]
    assert dataset["train"][0]["source"] == "web"
    assert dataset["test"][0]["source"] is None
    check(dataset)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_one_file_a_split_in_a_folder(tmp_path, kind):
    for split, numbers in (("train", range(5)), ("validation", range(5, 7)), ("test", range(7, 9))):
        rows = [{"image": f"{i}.jpg", "caption": f"a, {split} {i}"} for i in numbers for _ in range(2)]
        file = tmp_path / f"{split}.{kind}"
        if kind == "jsonl":
            write_jsonl(file, rows)
        elif kind == "json":
            file.write_text(json.dumps(rows))
        else:
            datasets.Dataset.from_list(rows).to_csv(file, sep="\t" if kind == "tsv" else ",")
    put(tmp_path, [f"{i}.jpg" for i in range(9)])
    dataset = data.load(str(tmp_path))
    assert sizes(dataset) == {"train": 5, "validation": 2, "test": 2}
    assert dataset["test"][1]["captions"] == ["a, test 8"] * 2
    assert ids(dataset)["validation"] == ["5.jpg", "6.jpg"]
    check(dataset)


def test_csv_with_a_list_of_captions_and_unusual_columns(tmp_path):
    put(tmp_path, [f"{i}.jpg" for i in range(4)])
    rows = [f'"[""one {i}"", ""two""]",{i}.jpg' for i in range(4)]
    (tmp_path / "a.csv").write_text("captions,photo\n" + "\n".join(rows))
    dataset = data.load(str(tmp_path / "a.csv"), image_column="photo")
    assert dataset["test"][0]["captions"][1] == "two"
    assert data.load(str(tmp_path / "a.csv"))["test"][0] == dataset["test"][0]  # its names are those of files
    for i in range(4):
        (tmp_path / f"{i}.jpg").rename(tmp_path / f"other {i}.jpg")
    with pytest.raises(
        DataError,
        match=r"no image column. Columns present: captions, photo. Name it with --image_column.*photo \('0.jpg'\)",
    ):
        data.load(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"no column 'text' \(--caption_column\). Columns present: captions, photo"):
        data.load(str(tmp_path / "a.csv"), image_column="photo", caption_column="text")


def test_captions_in_numbered_columns(tmp_path):
    put(tmp_path, [f"{i}.jpg" for i in range(3)])
    rows = [{"file_name": f"{i}.jpg", "caption_1": f"second {i}", "caption_0": f"first {i}"} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert data.load(str(tmp_path / "a.jsonl"))["train"][0]["captions"][0].startswith("first")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": \n', "line 2: not valid JSON"),
        ("a.jsonl", "[1, 2]\n", "expected an object"),
        ("a.jsonl", "", "no captioned image found"),
        ("a.json", '{"image": "a.jpg"}', "no caption column. Columns present: image"),
        ("a.json", '[{"image": "a.jpg", "caption": "x"},', "not valid JSON"),
        ("a.json", '{"images": [], "annotations": [{"id": 1}]}', "no caption or image_id"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "image id 1, which is not"),
        ("a.csv", "image,caption\na.jpg,one,two\n", "line 2: more fields"),
        ("a.jsonl", '{"image": "http://x.org/a.jpg", "caption": "x"}\n', "not fetched"),
        ("a.jsonl", '{"image": "a.jpg", "caption": "x", "split": "dogs"}\n', "unknown split 'dogs'"),
        ("a.jsonl", "\x81\xfe".encode("latin-1"), "not UTF-8"),
        ("a.txt", "a.jpg a dog", "cannot tell the format"),
    ],
)
def test_a_broken_file_is_named_with_line_and_fault(tmp_path, name, content, says):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as error:
        data.load(str(file))
    assert name in str(error.value)


# ---- image folder


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_rewritten_file_of_equal_size_is_read_anew(tmp_path, form):
    names = [f"{n}.png" for n in range(20)]
    for n, name in enumerate(names):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / name)
    file, sizes = tmp_path / f"data.{form}", []
    for time, caption in enumerate(("a red square", "the red roof")):
        rows = [{"image": name, "caption": caption} for name in names]
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif form == "csv":
            file.write_text("image,caption\n" + "".join(f"{name},{caption}\n" for name in names))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(file, ns=(time, time))  # one after the other, also by a coarse clock
        sizes.append(file.stat().st_size)
        read = [text for split in data.load(str(file)).values() for texts in split["captions"] for text in texts]
        assert read == [caption] * 20
    assert sizes[0] == sizes[1]


def test_an_image_folder_with_one_metadata_file(tmp_path):
    names, rows = image_set(20)
    put(tmp_path, names)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": row["image"], "text": row["captions"][0]} for row in rows])
    dataset = data.load(str(tmp_path))
    assert sizes(dataset) == {"train": 18, "validation": 1, "test": 1}
    check(dataset)


@pytest.mark.parametrize("place", ["each split", "root"])
def test_an_image_folder_with_splits(tmp_path, place):
    numbers = {"train": range(4), "validation": range(4, 6), "test": range(6, 8)}
    put(tmp_path, [f"{split}/{i % 4}.jpg" for split in numbers for i in numbers[split]])  # the same names in each
    rows = {split: [(f"{i % 4}.jpg", f"caption, {i}") for i in numbers[split]] for split in numbers}
    if place == "each split":
        for split in numbers:
            lines = [f'{name},"{caption}"' for name, caption in rows[split]]
            (tmp_path / split / "metadata.csv").write_text("file_name,caption\n" + "\n".join(lines))
    else:
        lines = [
            {"file_name": f"{split}/{name}", "caption": caption} for split in rows for name, caption in rows[split]
        ]
        write_jsonl(tmp_path / "metadata.jsonl", lines)
    dataset = data.load(str(tmp_path))
    assert ids(dataset) == {split: [f"{split}/{name}" for name, _ in rows[split]] for split in rows}
    check(dataset)


# ---- WebDataset


def write_tar(file: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shard(numbers, kind: str) -> dict[str, bytes]:
    samples = {}
    for i in numbers:
        samples[f"{i:06d}.jpg"] = jpeg(i)
        caption = f"caption {i}"
        samples[f"{i:06d}.{kind}"] = caption.encode() if kind == "txt" else json.dumps({"caption": caption}).encode()
    return samples


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_webdataset_shards(tmp_path, kind):
    for number in range(2):
        write_tar(tmp_path / f"shard-{number:04d}.tar", shard(range(number * 10, number * 10 + 10), kind))
    for name in (str(tmp_path), str(tmp_path / "shard-*.tar")):
        dataset = data.load(name)
        assert sizes(dataset) == {"train": 18, "validation": 1, "test": 1}
        check(dataset)
        row = dataset["test"][0]
        assert row["captions"] == [f"caption {int(row['image_id'][:6])}"]


def test_webdataset_shards_with_splits(tmp_path):
    for split, numbers in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 8))):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "00000.tar", shard(numbers, "txt"))
    assert sizes(data.load(str(tmp_path))) == {"train": 4, "validation": 2, "test": 2}


def test_webdataset_json_without_a_caption(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.json": b'{"url": "x"}'})
    with pytest.raises(DataError, match=r"no caption. Its keys: url"):
        data.load(str(tmp_path / "a.tar"))


# ---- Parquet, save_to_disk


def test_parquet_file_with_images_inside_and_saved_folder(tmp_path):
    rows = pairs(range(20), named=True).add_column("source", ["web"] * 100)
    rows.to_parquet(tmp_path / "a.parquet")
    dataset = data.load(str(tmp_path / "a.parquet"))
    check(dataset)
    assert dataset["train"].column_names == ["image_id", "image", "captions", "source"]
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    assert ids(data.load(str(tmp_path / "saved"))) == ids(dataset)


def test_what_load_gave_can_be_saved_and_loaded_again(tmp_path):
    put(tmp_path, FLICKR_NAMES)
    write_jsonl(tmp_path / "a.jsonl", [{"image": name, "captions": ["x", name]} for name in FLICKR_NAMES])
    dataset = data.load(str(tmp_path / "a.jsonl"))
    dataset.save_to_disk(tmp_path / "saved")
    again = data.load(str(tmp_path / "saved"))
    assert ids(again) == ids(dataset)
    assert data.fingerprint(again) == data.fingerprint(dataset)
    check(again)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_paths_of_images(tmp_path, streaming):
    put(tmp_path / "photos", [f"{i}.jpg" for i in range(6)])
    rows = [{"file": f"{i}.jpg", "caption": f"c {i}"} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "all.parquet")
    dataset = data.load(
        str(tmp_path / "all.parquet"), image_dir=str(tmp_path / "photos"), image_column="file", streaming=streaming
    )
    check({split: datasets.Dataset.from_list(list(rows)) for split, rows in dataset.items()})
    assert set(dataset) == {"train", "validation", "test"}


def test_image_column_of_another_name_and_of_plain_bytes(tmp_path):
    rows = [{"photo": jpeg(i), "words": f"c {i}", "image": "not this", "captions": "nor this"} for i in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    dataset = data.load(str(tmp_path / "a.parquet"), image_column="photo", caption_column="words")
    check(dataset)
    assert dataset["test"][0]["captions"][0].startswith("c ")


def test_a_table_row_without_an_image(tmp_path):
    rows = pairs(range(4), named=True)
    rows = datasets.concatenate_datasets(
        [rows, datasets.Dataset.from_list([{"image": None, "caption": "x"}], rows.features)]
    )
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"1 of 21 images are missing.*row 20"):
        data.load(str(tmp_path / "a.parquet"))
    dataset = data.load(str(tmp_path / "a.parquet"), skip_bad_samples=True)
    assert sum(sizes(dataset).values()) == 4


# ---- streams


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_streams_have_the_same_columns_and_no_image_in_two_splits(tmp_path, kind, caplog):
    if kind == "parquet":
        for part in range(3):
            pairs(range(part * 10, part * 10 + 10), named=False).to_parquet(
                tmp_path / f"train-{part:05d}-of-00003.parquet"
            )
    else:
        for part in range(3):
            write_tar(tmp_path / f"{part:05d}.tar", shard(range(part * 10, part * 10 + 10), "txt"))
        write_tar(
            tmp_path / "00003.tar", {f"copy{i}.{e}": c for i in range(10) for e, c in (("jpg", jpeg(i)), ("txt", b"x"))}
        )
    with caplog.at_level(logging.INFO, "data"):
        dataset = data.load(str(tmp_path), streaming=True)
    assert "not checked in a stream" in caplog.text
    assert isinstance(dataset, datasets.IterableDatasetDict)
    assert dataset["train"].num_shards == (3 if kind == "parquet" else 4)
    found = {split: list(rows) for split, rows in dataset.items()}
    assert set(found) == {"train", "validation", "test"}
    contents = {split: {row["image"]["bytes"] for row in rows} for split, rows in found.items()}
    assert sum(map(len, contents.values())) == len(set().union(*contents.values())) == 30
    assert len(contents["train"]) > 20
    row = found["train"][0]
    assert list(row)[:3] == ["image_id", "image", "captions"]
    assert data.open_image(row["image"]).size == (16, 12)
    if kind == "parquet":  # neighbouring rows of one image are one record
        assert all(len(row["captions"]) == 5 for rows in found.values() for row in rows)
    assert found == {split: list(rows) for split, rows in data.load(str(tmp_path), streaming=True).items()}
    assert data.fingerprint(dataset) is None


def test_streams_of_official_splits_and_bad_captions(tmp_path):
    rows = pairs(range(4), named=True)
    blank = rows.map(lambda row, i: {"caption": " " if i < 5 else row["caption"]}, with_indices=True)
    source = hub_folder(tmp_path, train=blank, validation=pairs([5], True), test=pairs([6, 7], True))
    with pytest.raises(DataError, match="row 0: a caption of image"):
        list(data.load(source, streaming=True)["train"])
    dataset = data.load(source, streaming=True, skip_bad_samples=True)
    assert {split: [row["image_id"] for row in rows] for split, rows in dataset.items()} == {
        "train": FLICKR_NAMES[1:4],
        "validation": FLICKR_NAMES[5:6],
        "test": FLICKR_NAMES[6:8],
    }
    assert len(list(data.load(source, streaming=True, max_samples={"test": 1})["test"])) == 1


def test_rows_with_a_split_of_their_own_load_but_do_not_stream(tmp_path):
    """The shape of nlphuji/flickr30k: one split, called test, whose rows say the real one."""
    rows = pairs(range(6), named=True)
    rows = rows.add_column("split", [split for split in ("train",) * 4 + ("val", "test") for _ in range(5)])
    source = hub_folder(tmp_path, test=rows)
    assert sizes(data.load(source)) == {"train": 4, "validation": 1, "test": 1}
    with pytest.raises(DataError, match="Leave out --streaming"):
        data.load(source, streaming=True)


def test_a_local_source_streams_with_every_check(tmp_path):
    names, rows = image_set(20)
    put(tmp_path, names)
    write_jsonl(tmp_path / "a.jsonl", rows)
    streamed = data.load(str(tmp_path / "a.jsonl"), streaming=True)
    whole = data.load(str(tmp_path / "a.jsonl"))
    assert {split: list(rows) for split, rows in streamed.items()} == {
        split: list(rows) for split, rows in whole.items()
    }


# ---- choosing the source and the splits


def test_scenes_are_a_source():
    dataset = data.load("scenes", max_samples={"train": 3}, splits=("train", "test"))
    assert set(dataset) == {"train", "test"}
    assert len(dataset["train"]) == 3
    assert data.open_image(dataset["train"][0]["image"]).mode == "RGB"


def test_an_ambiguous_folder_names_the_choices(tmp_path):
    put(tmp_path / "Images", FLICKR_NAMES)
    flickr_token_file(tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"Images/{name}", "caption": "x"} for name in FLICKR_NAMES])
    with pytest.raises(DataError, match=r"could be flickr8k or imagefolder. Say which with --data_format"):
        data.load(str(tmp_path))
    assert dataset_words(data.load(str(tmp_path), data_format="imagefolder")) == {"x"}
    assert "x" not in dataset_words(data.load(str(tmp_path), data_format="flickr8k"))


def dataset_words(dataset) -> set:
    return {caption for rows in dataset.values() for captions in rows["captions"] for caption in captions}


def test_two_files_for_one_split_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [])
    (tmp_path / "train.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="both for train"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("./nowhere", {}, "no such file or folder"),
        ("nowhere/captions.jsonl", {}, "no such file or folder"),
        ("nobody/nothing-here", {}, "could not be loaded as hub.*HF_HUB_OFFLINE"),
        ("nowhere", {"data_format": "flickr8k"}, "no such file or folder"),
        ("nowhere-*.tar", {}, "no tar file matches"),
        ("scenes", {"data_format": "papyrus"}, "unknown. Known: auto, hub"),
        ("scenes", {"splits": ("dev",)}, "no split 'dev'"),
    ],
)
def test_a_wrong_name_gives_one_clear_message(name, options, says):
    with pytest.raises(DataError, match=says) as error:
        data.load(name, **options)
    assert "\n" not in str(error.value)


def test_a_folder_without_captions(tmp_path):
    put(tmp_path, ["a.jpg"])
    with pytest.raises(DataError, match="no captions of a known format"):
        data.load(str(tmp_path))


def test_an_absent_split_lists_those_present(tmp_path):
    source = hub_folder(tmp_path / "a", train=pairs(range(5), True), validation=pairs([5], True))
    with pytest.raises(DataError, match=r"no test split. Splits present: train, validation"):
        data.load(source, splits=("train", "test"))
    odd = hub_folder(tmp_path / "b", train=pairs(range(5), True))
    datasets.DatasetDict(dogs=pairs(range(5), True), test=pairs([6], True)).save_to_disk(tmp_path / "c")
    with pytest.raises(DataError, match=r"'dogs' is not one of.*Splits present: dogs, test"):
        data.load(str(tmp_path / "c"))
    assert sizes(data.load(odd)) == {"train": 3, "validation": 1, "test": 1}


def test_a_hub_set_without_captions_lists_its_columns(tmp_path):
    rows = pairs(range(5), True).rename_column("caption", "label")
    with pytest.raises(DataError, match=r"no caption column. Columns present: image, label"):
        data.load(hub_folder(tmp_path / "a", train=rows))
    with pytest.raises(DataError, match=r"no column 'words'.*Columns present: image, label"):
        data.load(str(tmp_path / "a"), caption_column="words")


def test_a_stream_of_few_images_says_which_split_has_none(tmp_path):
    """5 % by the images' own bytes: of four images, most draws leave validation or test without one."""
    rows = [{"image": {"bytes": b"picture %d" % number, "path": None}, "caption": "a dog"} for number in range(4)]
    table = pyarrow.table({name: [row[name] for row in rows] for name in ("image", "caption")})
    pyarrow.parquet.write_table(table, tmp_path / "few.parquet")
    splits = data.load(tmp_path / "few.parquet", streaming=True)
    numbers = {name: len(list(rows)) for name, rows in splits.items()}
    assert sum(numbers.values()) == 4
    assert 0 in numbers.values()
    for name, number in numbers.items():
        if number:
            assert len(data.in_memory(splits[name], name)) == number
        else:
            with pytest.raises(DataError, match=f"no image of the stream is in the {name} split"):
                data.in_memory(splits[name], name)

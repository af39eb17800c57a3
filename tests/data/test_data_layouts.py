"""Layouts of captioned images that people have, each loaded and compared with what was put into it."""

import base64
import io
import json
import os
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data
from data import DataError
from data.caption_files import load_predictions, read_references
from metrics.coco_caption.cider import CiderD
from metrics.coco_caption.tokenizer import tokenize

NUMBER = 8
CAPTIONS = [[f"a dog {i}", f"two cats, {i}", f'he says "{i}"'] for i in range(NUMBER)]


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def put(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


NAMES = [f"{i}.jpg" for i in range(NUMBER)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def found(source, **options) -> dict[bytes, list[str]]:
    """{image bytes: captions} of all splits, in every way that a source loads: whole, and as a stream where it is one."""
    loaded = data.load(str(source), **options)
    return {
        row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes(): sorted(row["captions"])
        for rows in loaded.values()
        for row in rows
    }


EXPECTED = {jpeg(i): sorted(captions) for i, captions in enumerate(CAPTIONS)}
FIRST = {jpeg(i): captions[:1] for i, captions in enumerate(CAPTIONS)}


# ---- annotation files


def test_an_own_csv_with_photos_in_a_folder_beside_it(tmp_path):
    put(tmp_path / "photos of mine", NAMES)
    rows = [{"File": name, "Text": captions[0]} for name, captions in zip(NAMES, CAPTIONS, strict=True)]
    pandas.DataFrame(rows).to_csv(tmp_path / "my captions.csv", index=False)
    assert found(tmp_path / "my captions.csv") == FIRST
    assert found(tmp_path) == FIRST  # the only table of the folder


def test_names_written_on_windows_in_another_unicode_form_and_from_another_machine(tmp_path):
    names = [f"bilder/é{i}.jpg" for i in range(NUMBER)]
    put(tmp_path, [unicodedata.normalize("NFC", name) for name in names])
    for form in (
        lambda name: name.replace("/", "\\"),
        lambda name: unicodedata.normalize("NFD", name),
        lambda name: f"C:\\users\\me\\{name}".replace("/", "\\"),
        lambda name: f"/home/me/sets/{name}",
        str.upper,
    ):
        rows = [{"image": form(name), "captions": c} for name, c in zip(names, CAPTIONS, strict=True)]
        (tmp_path / "all.json").write_text(json.dumps(rows))
        assert found(tmp_path / "all.json") == EXPECTED


def test_two_names_for_one_file_are_refused(tmp_path):
    put(tmp_path / "x", NAMES)
    rows = [{"image": f"/mnt/{part}/0.jpg", "caption": f"c {part}"} for part in ("a", "b")]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"/mnt/a/0.jpg and /mnt/b/0.jpg would both be .*0.jpg.*--image_dir"):
        data.load(str(tmp_path / "all.json"))


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX alone")
def test_file_names_that_are_not_utf8(tmp_path):
    names = [f"é{i}.jpg".encode("cp1252") for i in range(NUMBER)]
    for number, name in enumerate(names):
        try:
            Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(jpeg(number))
        except OSError:
            pytest.skip("this file system has names in UTF-8 only")
    lines = [f"é{i}.jpg,{captions[0]}" for i, captions in enumerate(CAPTIONS)]
    (tmp_path / "all.csv").write_bytes(("image,caption\n" + "\n".join(lines)).encode("cp1252"))
    assert found(tmp_path / "all.csv") == FIRST


def test_blips_gt_files_have_no_file_names(tmp_path):
    put(tmp_path / "val2014", [f"COCO_val2014_{i:012d}.jpg" for i in range(NUMBER)])
    annotations = [{"image_id": i, "caption": c, "id": 9} for i, captions in enumerate(CAPTIONS) for c in captions]
    content = {"annotations": annotations, "images": [{"id": i} for i in range(NUMBER)]}
    (tmp_path / "coco_karpathy_val_gt.json").write_text(json.dumps(content))
    assert found(tmp_path / "coco_karpathy_val_gt.json") == EXPECTED
    loaded = data.load(str(tmp_path / "coco_karpathy_val_gt.json"))
    assert sorted(loaded["validation"]["image_id"]) == [str(i) for i in range(NUMBER)]
    for without in ({"annotations": annotations}, {"annotations": annotations, "images": None}):
        (tmp_path / "coco_karpathy_val_gt.json").write_text(json.dumps(without))
        assert found(tmp_path / "coco_karpathy_val_gt.json") == EXPECTED


@pytest.mark.parametrize(("ids", "names"), [(str, int), (int, str), (float, int)])
def test_ids_are_numbers_in_one_place_and_text_in_another(tmp_path, ids, names):
    put(tmp_path, NAMES)
    annotations = [{"image_id": ids(i), "caption": c} for i, captions in enumerate(CAPTIONS) for c in captions]
    images = [{"id": names(i), "file_name": name} for i, name in enumerate(NAMES)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert found(tmp_path / "a.json") == EXPECTED


def test_textcaps_llava_and_a_map_of_names(tmp_path):
    put(tmp_path / "images", NAMES)
    textcaps = [
        {"image_id": name[:-4], "image_path": name, "caption_str": c, "reference_strs": captions, "set_name": "val"}
        for name, captions in zip(NAMES, CAPTIONS, strict=True)
        for c in captions
    ]
    (tmp_path / "TextCaps.json").write_text(json.dumps({"dataset_type": "val", "data": textcaps}))
    assert found(tmp_path / "TextCaps.json") == EXPECTED
    llava = [
        {"id": name, "image": name, "conversations": [{"from": "human", "value": "<image>\nSay."},
                                                      {"from": "gpt", "value": captions[0]}]}
        for name, captions in zip(NAMES, CAPTIONS, strict=True)
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    assert found(tmp_path / "llava.json") == FIRST
    (tmp_path / "map.json").write_text(json.dumps(dict(zip(NAMES, CAPTIONS, strict=True))))
    assert found(tmp_path / "map.json") == EXPECTED


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parquet"])
def test_images_in_base64(tmp_path, kind):
    rows = [
        {"id": str(i), "image_base64": base64.b64encode(jpeg(i)).decode(), "caption": captions[0]}
        for i, captions in enumerate(CAPTIONS)
    ]
    frame = pandas.DataFrame(rows)
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif kind == "tsv":
        frame.to_csv(file, sep="\t", index=False)
    else:
        frame.to_parquet(file)
    assert found(file) == FIRST


def test_a_text_beside_each_image(tmp_path):
    put(tmp_path / "10_dogs", NAMES)
    for name, captions in zip(NAMES, CAPTIONS, strict=True):
        (tmp_path / "10_dogs" / name).with_suffix(".txt").write_bytes(captions[0].encode("utf-16"))
    assert found(tmp_path) == FIRST
    (tmp_path / "10_dogs" / "0.txt").unlink()
    assert len(found(tmp_path)) == NUMBER - 1


# ---- captions that are none


@pytest.mark.parametrize(
    "captions",
    [
        ["a dog", '["a dog", "a cat"]'],
        ["a dog\n3.jpg,a cat"],
        ["a dog 3.jpg,a cat"],
        ["a dog\n3.jpg#0\ta cat"],
    ],
)
def test_captions_that_hold_rows_or_lists_are_refused_with_their_line(tmp_path, captions):
    put(tmp_path, NAMES)
    rows = [{"image": name, "captions": c} for name, c in zip(NAMES, CAPTIONS, strict=True)]
    rows[1]["captions"] = captions
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl line 2"):
        data.load(str(tmp_path / "a.jsonl"))


def test_a_list_of_captions_in_csv_gives_the_cider_of_five_captions(test_data, tmp_path):
    """Caption 1 of each of 800 Flickr8k photos against captions 2 to 5: .774, and .002 with these as one text."""
    lines = (test_data / "flickr8k" / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions: dict[str, list[str]] = {}
    for line in lines:
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(caption)
    frame = pandas.DataFrame({"filename": list(captions), "raw": [json.dumps(c[1:]) for c in captions.values()]})
    frame.to_csv(tmp_path / "flickr.csv", index=False)
    loaded = data.load(str(tmp_path / "flickr.csv"), image_dir=str(test_data / "flickr8k"), all_as="test")["test"]
    references = dict(zip(loaded["image_id"], loaded["captions"], strict=True))
    assert len(references) == 800
    tokens = [tokenize(texts) for texts in references.values()]
    predictions = tokenize([captions[name][0] for name in references])
    assert round(float(np.mean(CiderD.from_references(tokens).score(predictions, tokens))), 3) == 0.774


# ---- the Hub's layouts, as local Parquet


def parquet(file: Path, columns: dict, **types) -> Path:
    """As pandas or pyarrow write it: without the Hub's notes about features."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: pa.array(v, types.get(k)) for k, v in columns.items()}), file)
    return file


STRUCTS = [{"bytes": jpeg(i), "path": None} for i in range(NUMBER)]
IMAGES = {
    "struct": {"image": STRUCTS},
    "binary": {"img": [jpeg(i) for i in range(NUMBER)]},
    "a list of one": {"images": [[struct] for struct in STRUCTS]},
}
TEXTS = {
    "list": {"captions": CAPTIONS},
    "JSON text": {"raw": [json.dumps(c) for c in CAPTIONS]},
    "numbered": {f"caption_{i}": [c[i] for c in CAPTIONS] for i in range(3)},
    "sentences_raw": {"sentences_raw": CAPTIONS, "sentences_tokens": [[c.split() for c in g] for g in CAPTIONS]},
    "structs": {"sentences": [[{"raw": c, "tokens": c.split()} for c in group] for group in CAPTIONS]},
}


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("images", IMAGES)
def test_images_and_captions_of_the_hubs_layouts(tmp_path, images, texts):
    file = parquet(tmp_path / "train-00000-of-00001.parquet", IMAGES[images] | TEXTS[texts])
    assert found(file) == EXPECTED
    if images == "struct" or texts == "list":
        assert found(tmp_path, streaming=True) == EXPECTED


def test_a_row_per_caption_with_the_sentence_in_a_struct(tmp_path):
    images = [struct for struct in STRUCTS for _ in range(3)]
    sentences = [{"raw": c, "tokens": c.split(), "sentid": 1} for group in CAPTIONS for c in group]
    ids = [i for i in range(NUMBER) for _ in range(3)]
    parquet(tmp_path / "data/train-0.parquet", {"image": images, "sentences": sentences, "cocoid": ids})
    assert found(tmp_path) == EXPECTED
    assert {row for rows in data.load(str(tmp_path)).values() for row in rows["image_id"]} == set(
        map(str, range(NUMBER))
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["test", "validation"])
def test_one_split_that_is_not_train_says_how_to_draw(tmp_path, name, streaming):
    parquet(tmp_path / f"data/{name}-0.parquet", {"image": STRUCTS, "captions": CAPTIONS})
    splits = data.load(str(tmp_path), streaming=streaming)
    with pytest.raises(DataError, match=rf"no train split. Splits present: {name}. Pass --draw_splits_from {name}"):
        data.require_training_split(splits, "x")
    for drawn in (name, "all"):
        splits = data.load(str(tmp_path), streaming=streaming, draw_splits_from=drawn)
        assert set(splits) == {"train", "validation", "test"}
        numbers = [len(list(rows)) for rows in splits.values()]
        assert sum(numbers) == NUMBER
        assert streaming or numbers == [6, 1, 1]
    with pytest.raises(DataError, match=f"no split 'dogs'. Splits present: {name}"):
        data.load(str(tmp_path), draw_splits_from="dogs")


def test_a_source_without_splits_is_scored_whole_and_one_with_splits_is_not(tmp_path):
    put(tmp_path, NAMES)
    rows = [{"image": name, "captions": c} for name, c in zip(NAMES, CAPTIONS, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = data.load(str(tmp_path / "a.jsonl"), splits=("test",), all_as="test")
    assert {name: len(split) for name, split in splits.items()} == {"test": NUMBER}
    for number, row in enumerate(rows):
        row["split"] = "test" if number < 2 else "train"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(data.load(str(tmp_path / "a.jsonl"), splits=("test",), all_as="test")["test"]) == 2


def test_a_stream_whose_rows_name_the_split_they_lie_in(tmp_path):
    columns = {"image": STRUCTS, "captions": CAPTIONS}
    parquet(tmp_path / "train-0.parquet", columns | {"split": ["train"] * NUMBER})
    parquet(tmp_path / "test-0.parquet", {k: v[:2] for k, v in columns.items()} | {"split": ["test"] * 2})
    splits = data.load(str(tmp_path), streaming=True)
    assert len(list(splits["test"])) == 2
    parquet(tmp_path / "test-0.parquet", {k: v[:2] for k, v in columns.items()} | {"split": ["test", "train"]})
    with pytest.raises(DataError, match="row 1 says it is of split 'train'"):
        list(data.load(str(tmp_path), streaming=True)["test"])


def test_a_column_a_language_is_asked_for_with_examples(tmp_path):
    file = parquet(
        tmp_path / "a.parquet", {"image": STRUCTS, "en": [c[0] for c in CAPTIONS], "de": ["ein Hund"] * NUMBER}
    )
    with pytest.raises(DataError, match=r"no caption column.*could be en \('a dog 0'\) or de \('ein Hund'\)"):
        data.load(str(file))
    assert found(file, caption_column="en") == FIRST


def test_several_images_in_a_row_are_refused_in_one_line(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"images": [STRUCTS[:2]] * NUMBER, "captions": CAPTIONS})
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"holds 2 images\. A caption belongs to one image") as error:
            found(file, streaming=streaming)
        assert "\n" not in str(error.value)


# ---- tars


def tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as out:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return file


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_of_mixed_kinds_of_images(tmp_path, streaming):
    members = {}
    for i, ending in enumerate(("jpg", "JPG", "png", "Jpeg", "webp", "jfif", "PNG", "")):
        kind = {"png": "PNG", "webp": "WEBP"}.get(ending.lower(), "JPEG")
        members[f"{i:04}.{ending or 'image'}"] = jpeg(i, kind)
        members[f"{i:04}.TXT" if i % 2 else f"{i:04}.txt"] = CAPTIONS[i][0].encode()
        members[f"./._{i:04}.jpg"] = b"\0\5\x16\7"
        members[f"__MACOSX/._{i:04}.jpg"] = b"\0\5\x16\7"
    loaded = data.load(str(tar(tmp_path / "0.tar", members)), streaming=streaming)
    captions = [c for rows in loaded.values() for row in rows for c in row["captions"]]
    assert sorted(captions) == sorted(c[0] for c in CAPTIONS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("lacks", ["jpg", "txt"])
def test_a_sample_without_image_or_caption_is_named_or_skipped(tmp_path, streaming, lacks):
    members = {f"{i:04}.{e}": c for i in range(NUMBER) for e, c in (("jpg", jpeg(i)), ("txt", CAPTIONS[i][0].encode()))}
    del members[f"0003.{lacks}"]
    file, bad = tar(tmp_path / "a.tar", members), []
    says = rf"a\.tar sample 0003: has no {'image' if lacks == 'jpg' else 'caption'}.*skip_bad_samples"
    with pytest.raises(DataError, match=says):
        found(file, streaming=streaming)
    loaded = data.load(str(file), streaming=streaming, skip_bad_samples=True, bad_samples=bad)
    assert sum(len(list(rows)) for rows in loaded.values()) == NUMBER - 1
    assert streaming or [sample["image_id"] for sample in bad] == ["0003"]


def test_a_tar_that_is_cut_off_names_what_was_read(tmp_path):
    members = {f"{i:04}.{e}": c for i in range(NUMBER) for e, c in (("jpg", jpeg(i)), ("txt", b"x"))}
    file = tar(tmp_path / "a.tar", members)
    file.write_bytes(file.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"a\.tar: the tar file is broken or cut off after 0\d+\.\w+"):
        data.load(str(file))


# ---- images


def png_with(chunk: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    plain = jpeg(1, "PNG")
    body = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return plain[:33] + body + plain[33:]


@pytest.mark.parametrize(
    ("chunk", "content"),
    [
        (b"tEXt", b"workflow\0" + b"x" * 3_000_000),
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 80_000_000)),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
        (b"iCCP", b"icc\0\0" + zlib.compress(os.urandom(3_000_000))),
        (b"iCCP", b"icc\0\0" + b"damaged"),
    ],
)
def test_a_png_with_a_large_or_damaged_note_is_a_picture(chunk, content):
    picture = data.open_image(png_with(chunk, content))
    assert picture.tobytes() == data.open_image(jpeg(1, "PNG")).tobytes()


def test_12_bit_data_in_16_bit_files_is_stretched_or_said(caplog):
    values = np.linspace(0, 4000, 64).astype(np.uint16).reshape(8, 8)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "TIFF")
    assert data.open_image(content.getvalue()).getextrema()[0][1] > 240
    content = io.BytesIO()
    Image.fromarray(values * 16).save(content, "PNG")
    assert data.open_image(content.getvalue()).getextrema()[0][1] > 240


@pytest.mark.parametrize("number", range(24))
def test_nothing_that_is_no_image_is_taken_for_one(number):
    """Text and noise, of which Pillow's TGA reader takes some for pictures."""
    from data.images import is_image

    assert not is_image(np.random.default_rng(number).bytes(4000))
    assert not is_image(b"P5 is a postcode, and BM a currency\n" * number)
    assert is_image(jpeg(number))


# ---- what infer.py wrote, scored


def test_predictions_by_file_name_get_the_ids_of_the_references(tmp_path):
    images = [{"id": 100 + i, "file_name": f"val2014/COCO_val2014_{100 + i:012d}.jpg"} for i in range(NUMBER)]
    annotations = [{"image_id": 100 + i, "caption": c} for i, captions in enumerate(CAPTIONS) for c in captions]
    (tmp_path / "r.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    references = read_references(tmp_path / "r.json")
    for form in ("/data/val2014/COCO_val2014_{:012d}.jpg", "C:\\val\\COCO_val2014_{:012d}.jpg", "{:012d}.png"):
        rows = [{"image": form.format(100 + i), "caption": f"c{i}"} for i in range(NUMBER)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert load_predictions(tmp_path / "p.jsonl", references) == {str(100 + i): f"c{i}" for i in range(NUMBER)}


# ---- the public reports' own inputs


@pytest.fixture
def cases() -> Path:
    folder = os.environ.get("CAPTION_TEST_CASES") or os.path.join(os.environ.get("CAPTION_TEST_DATA", ""), "../cases")
    if not os.path.isdir(folder):
        pytest.skip("neither CAPTION_TEST_CASES nor a folder cases beside CAPTION_TEST_DATA is there")
    return Path(folder)


@pytest.mark.parametrize(
    ("case", "images", "captions"),
    [
        ("05_f30k_hub", 8, 40),
        ("05_f30k_hub/flickr_annotations_30k.csv", 8, 40),
        ("08_ids", 8, 40),
        ("11b_wds_mixed/00000.tar", 8, 8),
        ("13_sidecar", 8, 8),
        ("15_excel/semicolon.csv", 8, 8),
        ("15_excel/utf16.csv", 8, 8),
        ("15_excel/cp1252.csv", 8, 8),
        ("19b_kaggle_quotes", 8, 40),
        ("22_nocaps/nocaps_val_4500_captions.json", 6, 30),
        ("23b_trl_images/train.parquet", 10, 10),
        ("25_hub_struct", 8, 8),
        ("26_hub_only_test", 8, 40),
        ("27_hub_sentence_struct", 8, 8),
    ],
)
def test_the_reported_sets_load(cases, case, images, captions):
    loaded = data.load(str(cases / case))
    assert sum(map(len, loaded.values())) == images
    texts = [c for rows in loaded.values() for row in rows for c in row["captions"]]
    assert len(texts) == captions
    assert not any(text.startswith("[") or "\ufffd" in text for text in texts)


def test_the_reported_excel_files_say_the_same(cases):
    sets = [found(cases / "15_excel" / f"{name}.csv") for name in ("semicolon", "utf16", "cp1252")]
    assert sets[0] == sets[1] == sets[2]
    assert any("à" in c for captions in sets[0].values() for c in captions)


def test_the_reported_sample_without_an_image_is_named(cases):
    file = str(cases / "11_wds_missing" / "00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar sample 000000003: has no image"):
        data.load(file)
    assert sum(map(len, data.load(file, skip_bad_samples=True).values())) == 7


def test_nocaps_domain_is_kept(cases):
    split = data.load(str(cases / "22_nocaps" / "nocaps_val_4500_captions.json"))["validation"]
    assert set(split["domain"]) == {"in-domain", "near-domain", "out-domain"}

"""Rows with prompts of their own: columns in a prompt, a conversation's question, and the records made of them."""

import base64
import io
import json
import tarfile

import pytest
import tiny
from PIL import Image

import data
from collator import CaptionCollator
from common.errors import DataError
from data import Augmentation
from data.columns import find_columns
from data.formats import webdataset
from data.prompts import PROMPTS, filled
from data.rows import Options, Part

ROW = {"category": "dog", "tags": ["red", "small"], "Image Name": "x", "blank": " ", "number": 3}


def test_columns_are_filled_in_and_other_braces_stay():
    assert filled("A {category}: {tags}, {Image Name} {number}", ROW, "here") == "A dog: red, small, x 3"
    assert filled('{{category}} {category} {"a": 1} {} { }', ROW, "here") == '{category} dog {"a": 1} {} { }'
    assert filled("{category}", {"category": "{tags}"} | ROW | {"category": "{tags}"}, "here") == "{tags}"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {categry}", r"row 3: no column 'categry'.*Did you mean category\?.*\{\{categry\}\}"),
        ("a {zzz}", "row 3: no column 'zzz'.*Columns: category, tags"),
        ("a {blank}", "row 3: nothing in column 'blank'"),
    ],
)
def test_a_column_that_is_missing_or_blank_is_one_line(prompt, message):
    with pytest.raises(DataError, match=message) as error:
        filled(prompt, ROW, "row 3")
    assert "\n" not in str(error.value)


def turns(question: str, answer: str, form: str, image: str):
    if form == "llava":
        return {"conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}
    content = [{"type": "image"}, {"type": "text", "text": question}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    if form == "inside":
        said[0]["content"][0] = {"type": "image_url", "image_url": {"url": image}}
    return {"messages": said}


QUESTIONS = {"What is it?": "a dog", "Which colour is it?": "it is red"}


def write(folder, form: str, splits=("train", "train", "validation", "test")):
    """Two questions about each of four pictures."""
    import base64

    lines = []
    for number, split in enumerate(splits):
        picture = Image.effect_noise((16, 16), 20 + 30 * number).convert("RGB")
        content = io.BytesIO()
        picture.save(content, "PNG")
        (folder / f"{number}.png").write_bytes(content.getvalue())
        address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        for question, answer in QUESTIONS.items():
            row = turns(question, f"{answer} {number}", form, address) | {"split": split}
            lines.append(json.dumps(row if form == "inside" else {"image": f"{number}.png"} | row))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "talk.jsonl")


@pytest.mark.parametrize("form", ["llava", "messages", "inside"])
def test_conversations_have_their_own_questions(tmp_path, form):
    splits = data.load(write(tmp_path, form), own_questions=True, cache_dir=tmp_path / "cache")
    train = splits["train"]
    assert train[PROMPTS][:] == [list(QUESTIONS)] * 2
    assert train["captions"][0] == ["a dog 0", "it is red 0"]
    assert PROMPTS not in data.load(write(tmp_path, form), cache_dir=tmp_path / "cache")["train"].column_names


@pytest.mark.parametrize("form", ["llava", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_in_a_tar_have_their_own_questions(tmp_path, form, streaming):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, (question, answer) in enumerate(QUESTIONS.items()):
            Image.effect_noise((16, 16), 20 + 30 * number).convert("RGB").save(tmp_path / "picture.png")
            (tmp_path / "talk.json").write_text(json.dumps(turns(question, answer, form, "")))
            tar.add(tmp_path / "picture.png", f"{number}.png")
            tar.add(tmp_path / "talk.json", f"{number}.json")
    how = {"cache_dir": tmp_path / "cache", "streaming": streaming, "all_as": "train"}
    train = list(data.load(str(tmp_path / "train.tar"), own_questions=True, **how)["train"])
    asked = [(prompt, caption) for row in train for prompt, caption in zip(row[PROMPTS], row["captions"], strict=True)]
    assert asked == list(QUESTIONS.items())
    assert PROMPTS not in next(iter(data.load(str(tmp_path / "train.tar"), **how)["train"]))
    (row, _) = webdataset.read(Part("webdataset", str(tmp_path / "train.tar")), Options(captions=False))
    assert row.question == "What is it?"  # infer.py asks it


def test_a_sample_has_captions_of_one_prompt(tmp_path):
    rows = [
        {"image": "0.png", "caption": caption, "kind": kind, "split": "train"}
        for caption, kind in (("a dog", "pet"), ("it is red", "hue"), ("a small dog", "pet"), ("a cat", "pet"))
    ]
    Image.effect_noise((16, 16), 20).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = data.load(str(tmp_path / "rows.jsonl"), prompt="Which {kind}?", all_as="train")["train"]
    pairs = data.CaptionPairs(train, 2)
    assert [(s["captions"], s[PROMPTS], s["first_caption"]) for s in map(pairs.__getitem__, range(len(pairs)))] == [
        (["a dog", "a small dog"], ["Which pet?"] * 2, 0),
        (["a cat"], ["Which pet?"], 2),
        (["it is red"], ["Which hue?"], 3),
    ]
    stream = data.CaptionStream(train.to_iterable_dataset(), 2, seed=0)
    assert [(s["captions"], s[PROMPTS]) for s in stream] == [
        (s["captions"], s[PROMPTS]) for s in map(pairs.__getitem__, range(3))
    ]


def test_an_image_with_two_prompts_is_scored_once_for_each(tmp_path, caplog):
    splits = data.load(write(tmp_path, "llava"), own_questions=True)
    held_out = data.in_memory(splits["test"], "test")
    assert held_out["image_id"][:] == ["3.png", "3.png#2"]
    assert held_out["captions"][:] == [["a dog 3"], ["it is red 3"]]
    assert held_out[PROMPTS][:] == [[question] for question in QUESTIONS]
    plain = data.load(write(tmp_path, "llava"))["test"]
    assert data.in_memory(plain, "test") is plain


def test_streamed_rows_have_their_prompts(tmp_path):
    import pandas

    tiny.write_photos(tmp_path, {"a": ["a dog"], "b": ["a cat"]})
    images = [{"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": f"{name}.png"} for name in "ab"]
    table = {"image": images, "caption": ["a dog", "a cat"], "kind": ["pet", "hue"]}
    pandas.DataFrame(table).to_parquet(tmp_path / "rows.parquet")
    load = {"prompt": "Which {kind}?", "all_as": "test", "cache_dir": tmp_path / "cache"}
    streamed = data.load(str(tmp_path / "rows.parquet"), streaming=True, **load)["test"]
    whole = data.load(str(tmp_path / "rows.parquet"), **load)["test"]
    assert [row[PROMPTS] for row in streamed] == whole[PROMPTS][:] == [["Which pet?"], ["Which hue?"]]


def of_llava(question: str, answer: str = "red") -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def written(tmp_path, *rows) -> str:
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def test_a_caption_among_conversations_is_not_its_own_question(tmp_path):
    source = written(
        tmp_path,
        {"image": "0.png", "conversations": of_llava("<image>\nWhich?")},
        {"image": "1.png", "conversations": "a dog"},
    )
    found = data.load(source, all_as="test", own_questions=True)["test"]
    assert dict(zip(found["image_id"], found[PROMPTS], strict=True)) == {"0.png": ["Which?"], "1.png": [None]}


def test_a_conversation_beside_the_captions_asks_nothing_with_and_without_captions():
    examples = {"image": "0.png", "caption": "a dog", "conversations": of_llava("Which?")}
    for captions in (True, False):
        assert find_columns(examples, Options(captions=captions), "rows").question is None
    del examples["caption"]
    for captions in (True, False):
        assert find_columns(examples, Options(captions=captions), "rows").question == "conversations"


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "conversations": of_llava("<image>\n<image>\nWhich differs?")},
        {"image": "0.png", "messages": [
            {"role": "user", "content": [{"type": "image", "image": f"{n}.png"} for n in range(2)]},
            {"role": "assistant", "content": [{"type": "text", "text": 5}]}]},
    ],
)  # fmt: skip
def test_a_conversation_about_more_images_than_its_row_has_is_refused(row, tmp_path):
    with pytest.raises(DataError, match="a conversation about 2 images"):
        data.load(written(tmp_path, row), all_as="test")


def test_images_in_base64_keep_their_captions_once_and_their_columns(tmp_path):
    rows = []
    for number in range(3):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        rows.append(
            {"image": image, "caption": f"a {number}", "category": f"c{number}", "tags": ["x", number], "more": 1}
        )
    asked = data.load(written(tmp_path, *rows), all_as="test", prompt="{category}: {tags}")["test"]
    assert asked["captions"][:] == [["a 0"], ["a 1"], ["a 2"]]
    assert asked[PROMPTS][:] == [["c0: x, 0"], ["c1: x, 1"], ["c2: x, 2"]]


@pytest.mark.parametrize("own", ["near", ["near", "left"]])
def test_a_column_that_is_called_like_ours_gives_way(own, tmp_path):
    found = data.load(written(tmp_path, {"image": "0.png", "caption": "a dog", PROMPTS: own}), all_as="test")["test"]
    assert PROMPTS not in found.column_names


def test_columns_of_any_name_are_filled_in_and_the_captions_own_is_refused(tmp_path):
    row = {"image": "0.png", "caption": "a dog", "2nd_tag": "x", "dc:subject": "y", "category": "z", "object": {"a": 1}}
    source = written(tmp_path, row)
    found = data.load(source, all_as="test", prompt="{2nd_tag} {dc:subject} { category } { }")["test"]
    assert found[PROMPTS][:] == [["x y z { }"]]
    for prompt, said in {"{image} {caption}": "would be told the answer", "{object}": "is no text"}.items():
        with pytest.raises(DataError, match=said):
            data.load(source, all_as="test", prompt=prompt)


def test_a_picture_is_not_mirrored_where_its_question_names_a_side(tmp_path):
    model, processor = tiny.build(tmp_path)
    collator = CaptionCollator(processor, model.config, augmentation=Augmentation(["flip"]))
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    for question, mirrored in (("what is on the left", False), ("what is it", True)):
        samples = [
            {"image": image, "image_id": str(n), "captions": ["a dog"], "epoch": 0, PROMPTS: [question]}
            for n in range(30)
        ]
        assert any(collator._image(sample).getpixel((0, 0)) != (255, 255, 255) for sample in samples) == mirrored

"""Rows with prompts of their own: columns in a prompt, a conversation's question, and the records made of them."""

import io
import json

import pytest
import tiny
from PIL import Image

import data
from common.errors import DataError
from data.prompts import PROMPTS, filled

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

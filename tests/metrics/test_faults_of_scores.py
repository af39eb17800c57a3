"""Texts in what scores and captions are written to: no NaN, no formulas, no passwords; reasons that say what is wrong."""

import csv
import io
import json

import numpy as np
import pytest
import tiny
import tiny_clip
from PIL import Image

from common.errors import DataError
from common.provenance import hide_secrets
from common.text import json_line, spreadsheet_cell
from data import images
from data.languages import read_languages
from metrics import score
from metrics.clip_scores import ClipScorer, clip_scores
from metrics.coco_caption.coco import preflight
from metrics.coco_caption.java import _reason
from reports.outputs import write_scores


def test_a_line_of_json_has_no_nan():
    row = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": float("-inf")}, "e": "NaN, é"}
    refuse = lambda name: pytest.fail(name)  # noqa: E731
    assert json.loads(json_line(row), parse_constant=refuse) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": None},
        "e": "NaN, é",
    }
    assert json_line({"a": 1.5, "b": "x"}) == '{"a": 1.5, "b": "x"}\n'


def test_a_spreadsheet_gets_no_formula_and_results_no_password(tmp_path):
    for text in ("=1+1", "@SUM(A1)", "+a", "-a dog", "\t=1"):
        assert spreadsheet_cell(text) == f"'{text}"
    assert [spreadsheet_cell(value) for value in ("a = b", -1.5, None, "")] == ["a = b", -1.5, None, ""]
    row = {"image_id": "@home.jpg", "caption": "=HYPERLINK(1)", "references": ["-x"], "scores": {"CIDEr": -1.0}}
    write_scores(tmp_path, {"CIDEr": 1.0}, [row], dataset_name="ftp://me:pw@host/set", models=["s3://k:pw@b/m"])
    _, cells = csv.reader(io.StringIO((tmp_path / "per_image.csv").read_text()))
    assert cells == ["'@home.jpg", "'=HYPERLINK(1)", "'-x", "-1.0"]
    assert json.loads((tmp_path / "per_image.jsonl").read_text()) == row
    written = (tmp_path / "coco_metrics.json").read_text()
    assert "pw@" not in written
    assert "ftp://***@host/set" in written
    assert hide_secrets({"a": ["//me:x@h", 1, None]}) == {"a": ["//***@h", 1, None]}


def test_the_reason_of_a_java_program_is_its_exception_not_its_stack():
    frames = "\n".join(f"\tat edu.cmu.meteor.aligner.Beam.step(Beam.java:{line})" for line in range(900))
    overflow = f'Exception in thread "main" java.lang.StackOverflowError\n{frames}'
    assert _reason(overflow) == "java.lang.StackOverflowError: a caption is too long for it"
    wrapped = f'Exception in thread "main" java.lang.RuntimeException: x\n{frames}\nCaused by: java.io.IOException: no space left\n{frames}'
    assert _reason(wrapped) == "java.io.IOException: no space left"
    assert _reason("Error: could not create the Java Virtual Machine\nInvalid -Xmx") == "Error: could not create the Java Virtual Machine / Invalid -Xmx"  # fmt: skip
    assert _reason("") == "no message"


def test_a_reference_without_words_is_named(caplog):
    score(
        {"1": "a dog", "2": "a cat"},
        {"1": ["a dog", "..."], "2": ["a cat"]},
        meteor=False,
        spice=False,
        bootstrap_samples=0,
    )
    assert "1 image with a reference without words, such as '1': CIDEr is a mean over references" in caplog.text


def test_an_empty_reference_is_refused(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"1": "a dog"}))
    (tmp_path / "r.json").write_text(json.dumps({"1": ["a dog", " "]}))
    command = [
        "--predictions",
        tmp_path / "p.json",
        "--references",
        tmp_path / "r.json",
        "--output_dir",
        tmp_path / "o",
    ]
    failed = tiny.run("evaluate.py", *command, "--meteor", "false", "--spice", "false", fails=True)
    assert "a caption of image '1' is empty" in failed.stderr


def test_a_picture_is_not_refused_twice_and_large_ones_are_converted_in_strips(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    content = io.BytesIO()
    Image.new("RGB", (10, 10), "red").save(content, "PNG")
    opened = images.open_image(content.getvalue(), max_pixels=100)  # an endpoint's own limit
    assert images.open_image(opened).size == (10, 10)
    with pytest.raises(images.ImageError, match="more than 50"):
        images.open_image(content.getvalue())
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, high, (31, 40)).astype(np.uint16)) for high in (200, 4000, 65000)]
    pictures += [Image.fromarray(generator.normal(size=(31, 40)).astype(np.float32))]
    pictures += [Image.fromarray(generator.integers(0, 256, (31, 40, 4), dtype=np.uint8))]
    whole = [np.asarray(images._to_rgb(picture)) for picture in pictures]
    monkeypatch.setattr(images, "_strip", lambda width: 3)
    for picture, expected in zip(pictures, whole, strict=True):
        assert np.array_equal(np.asarray(images._to_rgb(picture)), expected), picture.mode


def test_long_captions_are_told(caplog, tmp_path):
    many = {"1": " ".join(["a red dog runs"] * 75), "2": "a cat " * 150}
    score(many, {"1": ["a dog runs"], "2": ["a cat"]}, meteor=False, spice=False, bootstrap_samples=0)
    assert "Captions have 300 words on average, references 2" in caplog.text
    scorer = ClipScorer.load("clip-s", str(tiny_clip.write_clip(tmp_path)))
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    found, _ = clip_scores([scorer], many, {"1": ["a"], "2": ["b"]}, pictures, bootstrap_samples=0, seed=0)
    assert found["clip_weights"]["CLIP-S"]["cut_captions"] == 2
    assert f"2 of 2 captions have more than the CLIP's {scorer.max_length} tokens" in caplog.text


def test_three_languages_in_one_file(tmp_path):
    texts = {"en": "a dog runs fast", "de": "ein Hund läuft schnell", "zh": "一只狗在跑"}
    references = [
        {"image/key": str(n), **{code: {"caption": [text, text]} for code, text in texts.items()}} for n in range(3)
    ]
    predictions = [{"image_id": str(n), **texts, "fr": "un chien"} for n in range(3)]
    for name, rows in (("r", references), ("p", predictions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "--predictions",
        tmp_path / "p.jsonl",
        "--references",
        tmp_path / "r.jsonl",
        "--output_dir",
        tmp_path / "o",
    ]
    command += ["--meteor", "false", "--spice", "false", "--bootstrap_samples", 20]
    tiny.run("evaluate.py", *command, "--languages", "all")
    result = json.loads((tmp_path / "o/languages.json").read_text())
    assert list(result["languages"]) == ["en", "de", "zh"]
    assert {code: row["tokens"] for code, row in result["languages"].items()} == {
        "en": "words of the COCO code", "de": "words of the COCO code", "zh": "characters",
    }  # fmt: skip
    assert result["languages"]["zh"]["Bleu_4"] == pytest.approx(1)
    assert result["languages"]["de"]["unavailable"]["METEOR"] == "not asked for"
    assert "English" in preflight(language="de")["METEOR"]
    assert result["mean"]["ROUGE_L"]["value"] == pytest.approx(1)
    assert "| mean of 3 |" in (tmp_path / "o/languages.md").read_text()
    assert json.loads((tmp_path / "o/zh/coco_metrics.json").read_text())["caption_language"] == "zh"
    failed = tiny.run("evaluate.py", *command, "--languages", "fr", fails=True)
    assert "do not both have fr; both have: en, de, zh" in failed.stderr


def test_captions_by_language_are_read_as_cells_of_captions_are_and_none_is_lost(tmp_path):
    (tmp_path / "a.csv").write_text("image,en,de,size\n1,\"['a dog', 'a cat']\",ein Hund,3\n1,a cow,,4\n")
    (tmp_path / "b.json").write_text(json.dumps({"1": {"en": {"caption": ["a dog", "a cat"]}, "fr": None, "n": 3}}))
    of_table = read_languages(tmp_path / "a.csv")
    assert of_table["en"] == {"1": ["a dog", "a cat", "a cow"]}
    assert read_languages(tmp_path / "b.json") == {"en": {"1": ["a dog", "a cat"]}}
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": 1, "en": ["a dog", 3]}))
    with pytest.raises(DataError, match="line 1: the captions in en must be texts"):
        read_languages(tmp_path / "c.jsonl")

"""Texts in what scores and captions are written to: no NaN, no formulas, no passwords; reasons that say what is wrong."""

import csv
import io
import json

import pytest
import tiny

from common.provenance import hide_secrets
from common.text import json_line, spreadsheet_cell
from metrics import score
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
    assert "1 image(s) have a reference without words, such as '1': CIDEr is a mean over references" in caplog.text


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

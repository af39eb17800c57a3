"""Text files as people have them: every encoding, separator and quote is read right, or refused in one line."""

import csv
import io
import json
import random

import numpy as np
import pandas
import pytest
from PIL import Image

from common.errors import DataError
from common.text import TextError, encoding_of, read_text
from data import load
from data.checks import clean_captions
from data.columns import captions_of, parse_structure
from data.text_rows import csv_rows, jsonl_rows

WESTERN = "Une fille à la robe rouge, « déjà vue », sur le côté – l’été\n"
GREEK = "ένας σκύλος τρέχει στο γρασίδι\n"


@pytest.mark.parametrize("text", [WESTERN, GREEK, "plain\n", "两个男人坐在水边\n", "hai con chó chạy\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be-sig"])
def test_text_of_every_unicode_encoding_is_read(tmp_path, text, encoding):
    content = "\ufeff".encode("utf-16-be") + text.encode("utf-16-be") if "be" in encoding else text.encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == text


def test_utf16_without_a_mark_is_told_by_its_zeros(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes("photos/one.jpg\nphotos/two.jpg\n".encode(encoding))
        assert encoding_of(tmp_path / "a.txt") == encoding


def test_windows_1252_is_read_and_said(tmp_path, caplog):
    (tmp_path / "west.txt").write_bytes(WESTERN.encode("cp1252"))
    assert read_text(tmp_path / "west.txt") == WESTERN
    assert "west.txt: not UTF-8, read as Windows-1252" in caplog.text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("собака бежит по траве", "cp1251"),
        ("两个男人坐在水边", "gbk"),
        ("犬が走っています", "shift_jis"),
        ("두 남자가 앉아", "euc-kr"),
        (GREEK, "cp1253"),
        ("dziewczyna w żółtej sukience nad rzeką", "cp1250"),
    ],
)
def test_other_code_pages_are_refused_rather_than_misread(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(TextError, match=r"a\.txt: not UTF-8 text.*Save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_a_fault_far_behind_the_begin_is_found(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000 + "собака бежит".encode("cp1251"))
    with pytest.raises(TextError, match="not UTF-8"):
        encoding_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000 + "é".encode())
    assert encoding_of(tmp_path / "a.txt") == "utf-8"


# ---- tables


def rows_of(path, **options):
    return [row for row, _ in csv_rows(path, **options)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("seed", range(5))
def test_a_table_written_by_the_csv_module_is_read_back(tmp_path, separator, seed):
    """Any cells: separators, quotes and line breaks in them."""
    draw = random.Random(seed)
    pieces = ["a dog", ", ", '"', "\n", ";", "\t", "|", "x.y", "''", "né", " ", "1"]
    cells = ["".join(draw.choices(pieces, k=draw.randrange(1, 8))).strip() or "x" for _ in range(60)]
    rows = [{"image": f"{i}.jpg", "caption": cell, "split": "train"} for i, cell in enumerate(cells)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["image", "caption", "split"], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
    assert rows_of(tmp_path / "a.csv") == rows


def test_excels_own_line_about_the_separator(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nimage;caption\na.jpg;one, two\n", encoding="utf-8")
    assert rows_of(tmp_path / "a.csv") == [{"image": "a.jpg", "caption": "one, two"}]


def test_flickr30ks_results_csv(tmp_path):
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n1.jpg| 0| A man , a hat .\n")
    assert rows_of(tmp_path / "results.csv") == [
        {"image_name": "1.jpg", "comment_number": "0", "comment": "A man , a hat ."}
    ]


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_a_quote_that_is_not_closed_swallows_no_row(tmp_path, place, separator):
    """The line says by itself what its cells are: as many as the header has."""
    lines = [f"{i}.jpg{separator}caption {i}" for i in range(8)]
    lines[place] = f'{place}.jpg{separator}"Stop here'
    (tmp_path / "a.csv").write_text("\n".join([f"image{separator}caption", *lines]) + "\n")
    found = rows_of(tmp_path / "a.csv")
    assert [row["image"] for row in found] == [f"{i}.jpg" for i in range(8)]
    assert found[place]["caption"] == '"Stop here'


def test_a_quote_that_is_not_closed_on_a_line_of_more_cells_is_named(tmp_path):
    (tmp_path / "a.csv").write_text(
        'image,caption,split\n1.jpg,a cat,train\n2.jpg,"Stop, here, it says,train\n3.jpg,a dog,train\n4.jpg,a cow,train\n'
    )
    with pytest.raises(DataError, match=r"a\.csv line 3: a quote .* opens here and is not closed"):
        rows_of(tmp_path / "a.csv")


def test_a_quoted_cell_may_go_over_lines(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\n1.jpg,"first, line\nsecond line\n"\n2.jpg,"a ""big"" dog"\n')
    assert [row["caption"] for row in rows_of(tmp_path / "a.csv")] == ["first, line\nsecond line\n", 'a "big" dog']


def test_kaggles_file_has_commas_in_its_last_column(tmp_path):
    (tmp_path / "captions.txt").write_text('image,caption\n1.jpg,a man , a hat\n1.jpg,"a man, quoted"\n')
    rows = rows_of(tmp_path / "captions.txt", last_takes_rest=True)
    assert [row["caption"] for row in rows] == ["a man , a hat", "a man, quoted"]


def test_json_lines_of_another_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"caption": "né"}\r\n\r\n{"caption": "b"}'.encode("utf-16"))
    assert list(jsonl_rows(tmp_path / "a.jsonl")) == [(1, {"caption": "né"}), (3, {"caption": "b"})]


# ---- captions in a cell

CAPTIONS = ["a dog's ball, red", 'he says "stop"', "two men [seated]", "brackets {here}"]


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(CAPTIONS),
        json.dumps(CAPTIONS, indent=1),
        repr(CAPTIONS),
        repr(tuple(CAPTIONS)).replace("(", "[", 1)[:-1] + "]",
        str(np.array(CAPTIONS, dtype=object)),
        str(np.array(CAPTIONS)),
        json.dumps([{"raw": caption, "tokens": caption.split()} for caption in CAPTIONS]),
        str([{"raw": caption, "tokens": caption.split()} for caption in CAPTIONS]),
        CAPTIONS,
        tuple(CAPTIONS),
        np.array(CAPTIONS),
        [{"raw": caption} for caption in CAPTIONS],
        {"raw": CAPTIONS, "tokens": []},
        repr(tuple(CAPTIONS)),
        "{" + repr(CAPTIONS)[1:-1] + "}",
        repr([[CAPTIONS[0], CAPTIONS[1]], CAPTIONS[2:]]),
        json.dumps(json.dumps(CAPTIONS)),
        repr(np.array(CAPTIONS, dtype=object)),
        repr({"raw": CAPTIONS}),
    ],
    ids=str,
)
def test_a_list_of_captions_in_any_form_is_its_captions(cell):
    assert captions_of({"x": cell}, ["x"], "here") == CAPTIONS


def test_what_pandas_writes_of_lists_is_read_back(tmp_path):
    pandas.DataFrame({"image": ["a.jpg"], "words": [CAPTIONS]}).to_csv(tmp_path / "a.csv", index=False)
    (row,) = rows_of(tmp_path / "a.csv")
    assert captions_of(row, ["words"], "here") == CAPTIONS


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "[laughing]",
        "[12, 13]",
        "{a} smile",
        "[a dog] and [a cat]",
        "[]x",
        "a [b]",
        '("Stop" sign) left',
        "('a dog')",
        '"a" (b)',
    ],
)
def test_plain_text_with_brackets_stays_a_caption(text):
    assert captions_of({"x": text}, ["x"], "here") == [text]


@pytest.mark.parametrize(
    "text", ['["a dog", "two cats]', '["a dog", "two', "['it's a dog', 'b']", "[\u201ca dog\u201d, \u201cb\u201d]"]
)
def test_a_broken_list_is_refused(text):
    with pytest.raises(DataError, match="line 3: the caption begins like a list but cannot be read"):
        parse_structure(text, "a.csv line 3")


def test_an_object_that_names_no_caption_is_no_caption():
    (found,) = captions_of({"x": '{"en": "a dog", "de": "ein Hund"}'}, ["x"], "a.csv line 3")
    with pytest.raises(DataError, match="line 3: a caption of image 1 is dict, not text"):
        clean_captions([found], "a.csv line 3", "1")


def test_captions_of_several_lines_are_said(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "c.csv").write_text('image,caption\n1.png,"a dog\na brown dog"\n', encoding="utf-8")
    records = load(str(tmp_path / "c.csv"), all_as="test")["test"]
    assert records["captions"] == [["a dog a brown dog"]]
    assert "the captions of 1 rows span several lines, the first at c.csv line 2" in caplog.text


def test_conversations_are_captions_if_they_have_one_answer():
    llava = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A dog."}]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]
    for turns in (llava, chat):
        assert captions_of({"conversations": turns}, ["conversations"], "here") == ["A dog."]
    with pytest.raises(DataError, match="2 answers"):
        captions_of({"conversations": llava * 2}, ["conversations"], "here")


def test_recipes_and_lists_are_read_by_the_same_reader(tmp_path):
    from arguments import TRAIN_GROUPS
    from common.cli import parse

    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "r.yaml").write_bytes("learning_rate: 0.125\nprompt: né\n".encode(encoding))
        groups = parse(TRAIN_GROUPS, [str(tmp_path / "r.yaml")])
        assert any(getattr(group, "learning_rate", None) == 0.125 for group in groups)
        assert any(getattr(group, "prompt", None) == "né" for group in groups)
    (tmp_path / "r.yaml").write_bytes("prompt: собака".encode("cp1251"))
    with pytest.raises(SystemExit) as stopped:
        parse(TRAIN_GROUPS, [str(tmp_path / "r.yaml")])
    assert stopped.value.code == 2

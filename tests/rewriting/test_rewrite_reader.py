"""rewrite.py's column in the table of readers: the same images, with the same captions, as train.py's data.load."""

import csv
import errno
import json
import os
import time
from email.utils import formatdate
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_trees import FORMS, picture, write

import data
from arguments import RewriteArguments
from common.errors import DataError
from jobs import journal
from jobs.chat_server import LONGEST_WAIT, retry_after
from rewriting.rows import open_source

CAPTIONS = {
    "a.jpg": ["a red dog", "a dog runs"],
    "b.png": ["ein Bär läuft", "a bear"],
    "deep/c d.jpg": ["two cats, one black", "cats"],
    "é.png": ['he says "no"', "a sign"],
}


def opened(task: str, source, **flags):
    return open_source(task, str(source), RewriteArguments(llm="openai:m", output="x.jsonl", **flags))


def inputs(task: str, source, **flags) -> list[dict]:
    rows = opened(task, source, **flags)
    return [rows.inputs(row) for row in rows.read(rows.columns)]


def content(image) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def photos(folder: Path) -> dict[str, bytes]:
    files = {name: picture(number, os.path.splitext(name)[1]) for number, name in enumerate(CAPTIONS)}
    for name, image in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    return files


def source_of(form: str, folder: Path, captions: dict = CAPTIONS) -> Path:
    files = photos(folder)
    if form == "karpathy":
        images = [{"filename": name, "split": "train", "imgid": number, "sentences": [{"raw": c} for c in captions[name]]}
                  for number, name in enumerate(files)]  # fmt: skip
        (folder / "dataset_mine.json").write_text(json.dumps({"images": images, "dataset": "mine"}).replace(
            '"imgid"', '"sentids": [], "imgid"'))  # fmt: skip
        return folder / "dataset_mine.json"
    if form == "token":
        lines = [f"{name}#{number}\t{text}" for name in files for number, text in enumerate(captions[name])]
        (folder / "Flickr8k.token.txt").write_text("\n".join(lines), encoding="utf-8")
        return folder / "Flickr8k.token.txt"
    return write(form, folder, files, captions)


@pytest.mark.parametrize("form", [*FORMS, "karpathy", "token"])
def test_each_image_has_the_captions_that_training_has(form, tmp_path):
    (tmp_path / "set").mkdir()
    source = source_of(form, tmp_path / "set")
    trained = {content(row["image"]): row["captions"] for rows in data.load(str(source)).values() for row in rows}
    assert len(trained) == len(CAPTIONS)
    rows = opened("paragraph", source)
    rewritten = {content(row["image"]): rows.inputs(row)["captions"] for row in rows.read(None)}
    assert rewritten == trained
    assert [rows.inputs(row) for row in rows.read(rows.columns)] == [rows.inputs(row) for row in rows.read(None)]


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "parquet_paths", "parquet_bytes", "saved"])
@pytest.mark.parametrize("separate", [True, False])
def test_fuse_reads_the_rows_of_a_table_as_they_are(form, separate, tmp_path):
    (tmp_path / "set").mkdir()
    source = source_of(form, tmp_path / "set", {name: texts[:1] for name, texts in CAPTIONS.items()})
    flags = {"raw_column": "captions" if form not in ("csv", "tsv", "jsonl") else "caption"}
    synthetic = {"synthetic_column": flags["raw_column"]}
    expected = [{"raw": texts[0], "synthetic": texts[0]} for texts in CAPTIONS.values()]
    if separate:
        by_name = (
            {name: f"a {number}" for number, name in enumerate(CAPTIONS)}
            if form not in ("parquet_bytes", "saved")
            else {os.path.basename(name): f"a {number}" for number, name in enumerate(CAPTIONS)}
        )
        (tmp_path / "synthetic.json").write_text(json.dumps(by_name))
        synthetic = {"synthetic_file": str(tmp_path / "synthetic.json")}
        expected = [{**row, "synthetic": f"a {number}"} for number, row in enumerate(expected)]
    assert inputs("fuse", source, **flags, **synthetic) == expected


def table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "N/A", "null", "<NA>", "", " "])
def test_a_missing_caption_is_never_sent(word, tmp_path):
    rows = [{"raw": word, "synthetic": "a dog"}, {"raw": "a cat", "synthetic": word}]
    assert inputs("fuse", table(tmp_path / "c.csv", rows)) == [
        {"raw": "", "synthetic": "a dog"},
        {"raw": "a cat", "synthetic": ""},
    ]
    assert inputs(
        "paragraph", table(tmp_path / "p.csv", [{"n": 1, "caption": word}, {"n": 2, "caption": "a cat"}])
    ) == [
        {"captions": []},
        {"captions": ["a cat"]},
    ]
    photos(tmp_path)
    images = table(tmp_path / "i.csv", [{"image": name, "caption": word} for name in CAPTIONS][:1]
                   + [{"image": name, "caption": "a cat"} for name in CAPTIONS][1:])  # fmt: skip
    with pytest.raises(DataError, match=r"line 2.*is empty"):
        inputs("paragraph", images)
    assert inputs("paragraph", images, skip_bad_samples=True) == [{"captions": ["a cat"]}] * 3


def test_columns_are_found_in_any_case_in_any_row_and_all_of_those_with_numbers(tmp_path):
    photos(tmp_path)
    rows = [{"File Name": name, "Caption": f"a {name}", "Caption 2": "b", "caption3": "c"} for name in CAPTIONS]
    for number in (0, 3):  # with an empty cell
        rows[number] = {**rows[number], "Caption 2": ""}
    source = table(tmp_path / "c.csv", rows)
    trained = [row["captions"] for split in data.load(str(source)).values() for row in split]
    assert [row["captions"] for row in inputs("paragraph", source)] == trained
    assert sorted(map(len, trained)) == [2, 2, 3, 3]
    (tmp_path / "late.jsonl").write_text('{"id": 1}\n{"Laion_2B": "a", "laion_coco": "b"}')
    assert inputs("fuse", tmp_path / "late.jsonl") == [{"raw": "", "synthetic": ""}, {"raw": "a", "synthetic": "b"}]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a dog runs"}]
    lines = [json.dumps({"image": name, "conversations": turns}) for name in CAPTIONS]
    (tmp_path / "turns.jsonl").write_text("\n".join(lines))
    assert inputs("paragraph", tmp_path / "turns.jsonl") == [{"captions": ["a dog runs"]}] * 4


def test_a_column_of_image_names_with_any_name_groups_the_captions_of_an_image(tmp_path):
    photos(tmp_path)
    rows = [{"photo": name, "caption": text} for number in (0, 1) for name, texts in CAPTIONS.items()
            for text in texts[number:][:1]]  # fmt: skip
    assert sorted(map(str, inputs("paragraph", table(tmp_path / "c.csv", rows)))) == sorted(
        str({"captions": texts}) for texts in CAPTIONS.values()
    )


def test_rows_of_parquet_are_read_from_any_row_on_and_row_groups_before_are_not_read(tmp_path):
    rows = [{"raw": f"raw {n}", "synthetic": f"s {n}", "more": [n]} for n in range(23)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=5)
    (part,) = opened("fuse", tmp_path / "c.parquet").parts
    for start in range(24):
        assert list(part.read(None, start)) == rows[start:]
    with open(tmp_path / "c.parquet", "r+b") as file:  # the first row groups are lost
        file.seek(4)
        file.write(b"\xff" * (pq.read_metadata(tmp_path / "c.parquet").row_group(0).total_byte_size // 2))
    assert [row["raw"] for row in part.read(["raw"], 10)] == [row["raw"] for row in rows[10:]]


def test_tables_of_several_splits_say_which_a_row_is_of_and_one_can_be_chosen(tmp_path):
    for split in ("train", "test"):
        table(tmp_path / f"{split}.csv", [{"raw": split, "synthetic": "a"}])
    rows = opened("fuse", tmp_path)
    assert sorted(map(str, rows.read(None))) == sorted(
        str({"raw": split, "synthetic": "a", "split": split}) for split in ("train", "test")
    )
    assert inputs("fuse", tmp_path, split="test") == [{"raw": "test", "synthetic": "a"}]
    with pytest.raises(DataError, match="no validation split"):
        inputs("fuse", tmp_path, split="validation")


def test_a_retry_after_date_is_waited_for_and_none_is_waited_for_without_end():
    assert 85 < retry_after(httpx.Headers({"Retry-After": formatdate(time.time() + 90, usegmt=True)})) <= 90
    assert retry_after(httpx.Headers({"Retry-After": formatdate(0, usegmt=True)})) == 0
    assert retry_after(httpx.Headers({"Retry-After": "300"})) == 300
    assert retry_after(httpx.Headers({"Retry-After": "86400"})) == LONGEST_WAIT
    assert retry_after(httpx.Headers({"retry-after-ms": "1500", "Retry-After": "9"})) == 1.5
    assert retry_after(httpx.Headers({"Retry-After": "soon"})) == retry_after(httpx.Headers()) == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_journal_is_written_where_there_are_no_locks(number, monkeypatch, tmp_path):
    import fcntl

    def flock(file, operation):  # of a file system such as NFS without lockd
        raise OSError(number, os.strerror(number))

    (tmp_path / "a.jsonl").write_text('{"row": 1}\n{"ro')
    monkeypatch.setattr(fcntl, "flock", flock)
    with journal.Journal(tmp_path / "a.jsonl") as opened_again:
        opened_again.add({"row": 2})
    with journal.Journal(tmp_path / "a.jsonl") as opened_again:
        assert opened_again.rows == [{"row": 1}, {"row": 2}]


@pytest.mark.parametrize(
    "damage", [b"\0" * 9, '{"row": "é'.encode()[:-1], b'{"row": 2}', b'{"row": 2}\0\0\n{"row": 3}\n']
)
def test_what_a_kill_or_a_power_cut_left_at_a_journals_end_is_cut_off(damage, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"row": 1}\n' + damage)
    with journal.Journal(tmp_path / "a.jsonl") as first:
        assert first.rows == [{"row": 1}]
        first.add({"row": 4})
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"row": 1}\n{"row": 4}\n'


def test_a_journal_that_another_run_writes_is_refused(tmp_path):
    with (
        journal.Journal(tmp_path / "a.jsonl"),
        pytest.raises(journal.JournalInUse, match="another run is writing it"),
    ):
        journal.Journal(tmp_path / "a.jsonl")

"""infer.py: every kind of path, every kind of picture, and a run that can be killed."""

import json
import re
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


def pictures(folder, count, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number * 57 % 256)).save(
            folder / f"{number:04}.jpg"
        )
    return folder


def settings(model):
    return ["--model_name_or_path", model, "--num_beams", 2, "--max_new_tokens", 6]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_folders_globs_and_lists_are_captioned_once_each_in_order(model, tmp_path):
    folder = pictures(tmp_path / "a" / "b", 3)
    pictures(tmp_path / "c", 2)
    (tmp_path / "list.txt").write_text("c/0000.jpg\n\na/b/0002.jpg\n")
    (tmp_path / "list.jsonl").write_text('{"image": "c/0001.jpg"}\n')
    result = tiny.run(
        "infer.py", folder / "0001.jpg", tmp_path / "a", tmp_path / "list.txt", tmp_path / "list.jsonl",
        f"{tmp_path}/c/*.jpg", *settings(model),
    )  # fmt: skip
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0].removeprefix(f"{tmp_path}/") for line in lines] == [
        "a/b/0001.jpg", "a/b/0000.jpg", "a/b/0002.jpg", "c/0000.jpg", "c/0001.jpg",
    ]  # fmt: skip
    assert all(len(line) == 2 for line in lines)


def test_a_prompt_is_kept_only_if_asked_for(model, tmp_path):
    folder = pictures(tmp_path / "a", 1)
    command = [folder, *settings(model), "--prompt", "a picture of "]
    kept = tiny.run("infer.py", *command, "--keep_prompt").stdout.split("\t")[1]
    left = tiny.run("infer.py", *command).stdout.split("\t")[1]
    assert kept.startswith("a picture of")
    assert kept.removeprefix("a picture of").strip() == left.strip()


def test_pictures_of_every_mode_become_captions(model, tmp_path):
    folder = tmp_path / "modes"
    folder.mkdir()
    for mode, name in (("L", "gray.png"), ("RGBA", "alpha.png"), ("P", "palette.png"), ("CMYK", "cmyk.jpg"),
                       ("I;16", "deep.png"), ("1", "bits.png")):  # fmt: skip
        Image.new(mode, (20, 20)).save(folder / name)
    Image.new("RGB", (20, 20)).save(
        folder / "moves.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]
    )
    assert len(tiny.run("infer.py", folder, *settings(model)).stdout.splitlines()) == 7


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_with_each_image_once_and_none_lost(model, tmp_path, processes):
    folder = pictures(tmp_path / "many", 300)
    output, shards = tmp_path / "captions.jsonl", tmp_path / "captions.jsonl.shards"
    command = [folder, *settings(model), "--per_device_eval_batch_size", 4, "--shard_size", 10]
    kept: dict = {}
    for _ in range(2):
        process = tiny.start("infer.py", *command, "--output", output, processes=processes)
        deadline = time.time() + 200
        while len(list(shards.glob("0*.parquet"))) < len(kept) + 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if processes == 1 else signal.SIGTERM)
        process.communicate()
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())  # nothing was done again
        kept = {path: path.stat().st_mtime_ns for path in shards.glob("0*.parquet")}
    result = tiny.run("infer.py", *command, "--output", output, processes=processes)
    (done,) = re.findall(r"300 images, (\d+) of them done before", result.stderr)
    assert int(done) == 10 * len(kept) or (processes == 2 and int(done) > 10 * len(kept))  # the other one was sooner
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert [row["image"] for row in rows(output)] == [str(path) for path in sorted(folder.iterdir())]
    tiny.run("infer.py", *command, "--output", tmp_path / "whole.jsonl")
    assert rows(tmp_path / "whole.jsonl") == rows(output)
    said = tiny.run("infer.py", "--status", output).stdout
    assert "300 of 300 images, 30 of 30 shards" in said


def test_new_images_are_added_to_a_finished_file(model, tmp_path):
    folder = pictures(tmp_path / "a", 3)
    output = tmp_path / "captions.jsonl"
    tiny.run("infer.py", folder / "0001.jpg", *settings(model), "--output", output)
    (before,) = rows(output)
    shard = next((tmp_path / "captions.jsonl.shards").glob("0*.parquet"))
    table = pq.read_table(shard)  # what was captioned is taken over, not made again: a mark in it stays
    table = table.set_column(2, "caption", pa.array(["made before"]))
    pq.write_table(table, shard)
    tiny.run("infer.py", folder, *settings(model), "--output", output)
    found = rows(output)
    assert [row["image"][-8:] for row in found] == ["0000.jpg", "0001.jpg", "0002.jpg"]
    assert [row["caption"] == "made before" for row in found] == [False, True, False]
    pictures(tmp_path / "b", 1)  # another source is added, and what was there stays
    tiny.run("infer.py", tmp_path / "b", *settings(model), "--output", output)
    assert [row["image"][-10:] for row in rows(output)] == ["b/0000.jpg", "a/0000.jpg", "a/0001.jpg", "a/0002.jpg"]
    assert before["image"] == found[1]["image"]


def test_an_output_that_no_run_made_is_refused_in_one_line(model, tmp_path):
    folder, output = pictures(tmp_path / "a", 1), tmp_path / "captions.jsonl"
    output.write_text('{"image": "x", "caption": "y"}\n')
    result = tiny.run("infer.py", folder, *settings(model), "--output", output, fails=True)
    assert "another" in result.stderr.splitlines()[-1]
    assert output.read_text() == '{"image": "x", "caption": "y"}\n'


def test_captions_of_other_settings_are_not_mixed(model, tmp_path):
    folder = pictures(tmp_path / "a", 1)
    output = tmp_path / "captions.jsonl"
    tiny.run("infer.py", folder, *settings(model), "--output", output)
    result = tiny.run(
        "infer.py", folder, "--model_name_or_path", model, "--num_beams", 3, "--output", output, fails=True
    )
    assert "num_beams was 2, is 3" in result.stderr


def test_a_bad_image_is_named_or_written_down_as_told(model, tmp_path):
    folder = pictures(tmp_path / "a", 3)
    (folder / "0001.jpg").write_bytes((folder / "0001.jpg").read_bytes()[:300])
    command = [folder, *settings(model), "--output", tmp_path / "captions.jsonl"]
    assert "0001.jpg" in tiny.run("infer.py", *command, fails=True).stderr
    tiny.run("infer.py", *command, "--skip_bad_images")
    found = rows(tmp_path / "captions.jsonl")
    assert ["error" in row for row in found] == [False, True, False]
    assert (
        tiny.run("infer.py", folder, *settings(model), "--dataloader_num_workers", 1, fails=True).stderr.count(
            "0001.jpg"
        )
        >= 1
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name what to caption"),
        (["nowhere.jpg"], "there is no such file"),
        (["EMPTY"], "there is no image in this folder"),
        (["LIST.jsonl"], "line 1: expected an object with image and captions"),
        (["--num_beam", "3"], "unrecognized argument: --num_beam. Did you mean --num_beams?"),
    ],
)
def test_what_cannot_be_captioned_is_one_clear_message(arguments, said, model, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "LIST.jsonl").write_text("[]\n")
    arguments = [str(tmp_path / word) if word.isupper() or word.startswith("LIST") else word for word in arguments]
    assert said in tiny.run("infer.py", *arguments, "--model_name_or_path", model, fails=True).stderr


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (["--max_new_tokens", "1000"], "are more than the 64 positions of the model"),
        (["--min_new_tokens", "9", "--max_new_tokens", "8"], "min_new_tokens, 9, is more than max_new_tokens, 8"),
    ],
)
def test_lengths_that_the_model_cannot_have_are_refused(lengths, said, model, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    result = tiny.run("infer.py", str(tmp_path / "a.png"), *lengths, "--model_name_or_path", model, fails=True)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_illegal_characters_are_left_out_when_told(model, tmp_path):
    folder = pictures(tmp_path / "a", 3)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(model, spoilt)
    tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        f"{word}\u200b" if word in tiny.VOCABULARY else word: index for word, index in vocabulary.items()
    }
    (spoilt / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in (model, spoilt):
        tiny.run("infer.py", folder, *settings(name), "--output", tmp_path / f"{name.name}.jsonl")
    tiny.run("infer.py", folder, *settings(spoilt), "--output", tmp_path / "f.jsonl", "--remove_illegal_characters")
    plain, dirty, filtered = (rows(tmp_path / name) for name in ("model.jsonl", "spoilt.jsonl", "f.jsonl"))
    assert any("\u200b" in row["caption"] for row in dirty)
    assert filtered == plain

"""Sampled captions through infer.py and evaluate.py: the same bytes however a run is made, and every form of several captions."""

import csv
import json
import signal
import tarfile
import time

import families
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from places import script

DRAWN = ("--do_sample", "--temperature", 1.2, "--max_new_tokens", 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = families.build("blip")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for pictures to matter
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        Image.effect_noise((32, 32), 10 + 9 * number).convert("RGB").save(folder / f"{number:02}.png")
    return folder


def command(model, photos, output, **flags) -> list:
    flags = {"num_return_sequences": 2} | flags
    more = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [photos, "--model_name_or_path", model, *DRAWN, "--output", output, *more]


@pytest.fixture(scope="module")
def expected(model, photos, tmp_path_factory) -> bytes:
    output = tmp_path_factory.mktemp("expected") / "all.jsonl"
    tiny.run("infer.py", *command(model, photos, output))
    rows = [json.loads(line)["captions"] for line in output.read_text().splitlines()]
    assert len(rows) == 24
    assert all(first != second for first, second in rows)
    assert len(set(map(tuple, rows))) == 24
    return output.read_bytes()


CASES = [(processes, batch, shard) for processes in (1, 2) for batch in (1, 8) for shard in (5, 24)]


@pytest.mark.parametrize(
    ("processes", "batch", "shard"),
    [pytest.param(*case, marks=[] if case in ((1, 1, 5), (2, 8, 5)) else pytest.mark.slow) for case in CASES],
)
def test_the_bytes_are_the_same_in_any_processes_batches_and_shards(
    model, photos, expected, tmp_path, processes, batch, shard
):
    output = tmp_path / "all.jsonl"
    how = {"per_device_eval_batch_size": batch, "shard_size": shard}
    tiny.run("infer.py", *command(model, photos, output, **how), processes=processes)
    assert output.read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch"), [(1, 8), (2, 1)])
def test_the_bytes_are_the_same_after_kills(model, photos, expected, tmp_path, processes, batch):
    output = tmp_path / "all.jsonl"
    shards = tmp_path / "all.jsonl.shards"
    words = command(model, photos, output, per_device_eval_batch_size=batch, shard_size=2)
    for kills in (1, 2):
        process = tiny.start("infer.py", *words, processes=processes)
        deadline = time.time() + 200
        while len(list(shards.glob("0*.parquet"))) < 3 * kills and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if processes == 1 else signal.SIGTERM)
        process.communicate()
    # What is left is made with other batches.
    words = command(model, photos, output, per_device_eval_batch_size=9 - batch, shard_size=2)
    tiny.run("infer.py", *words, processes=3 - processes)
    assert output.read_bytes() == expected


def test_another_seed_draws_others_and_does_not_mix(model, photos, expected, tmp_path):
    output = tmp_path / "all.jsonl"
    tiny.run("infer.py", *command(model, photos, output, seed=1))
    assert output.read_bytes() != expected
    done = tiny.run("infer.py", *command(model, photos, output, seed=2), fails=True)
    assert "seed" in done.stderr


def test_several_captions_in_every_form(model, photos, expected, tmp_path):
    wanted = {row["image"]: row["captions"] for row in map(json.loads, expected.splitlines())}
    make = lambda name, *more: script("infer", *command(model, photos, tmp_path / name), *more)  # noqa: E731
    make("all.csv")
    with open(tmp_path / "all.csv", newline="", encoding="utf-8") as file:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    assert rows == [(image, text) for image, texts in wanted.items() for text in texts]
    for name in ("all.parquet", "folder"):
        make(name)
        table = pq.read_table(tmp_path / name).to_pydict()
        assert dict(zip(table["image"], table["captions"], strict=True)) == wanted
        assert "caption" not in table
    make("all.json")
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["captions"] for row in found] == list(wanted.values())
    make("texts", "--output_format", "txt")
    said = {path.name: path.read_text() for path in (tmp_path / "texts").rglob("*.txt")}
    stems = [image.rpartition("/")[2].removesuffix(".png") for image in wanted]
    texts = zip(stems, wanted.values(), strict=True)
    assert said == {f"{stem}.{n}.txt": f"{text}\n" for stem, group in texts for n, text in enumerate(group, 1)}
    make("all.tar")
    with tarfile.open(tmp_path / "all.tar") as tar:
        inside = {name: tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")}
    assert sorted(inside.values()) == sorted(text for group in wanted.values() for text in group)
    assert sum(name.endswith(".2.txt") for name in inside) == len(wanted)


def test_a_column_called_captions_stays_where_there_is_one_caption(model, photos, tmp_path):
    rows = [{"image": str(photos / f"0{n}.png"), "captions": ["a dog", "a cat"]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number, columns in ((1, {"caption", "captions"}), (2, {"captions", "source_captions"})):
        for output in (tmp_path / f"{number}.jsonl", tmp_path / f"{number}.csv", tmp_path / f"{number}"):
            script("infer", *command(model, tmp_path / "rows.jsonl", output, num_return_sequences=number))
        found = [json.loads(line) for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()]
        assert [set(row) for row in found] == [{"image"} | columns] * 3
        own = "captions" if number == 1 else "source_captions"
        assert [row[own] for row in found] == [["a dog", "a cat"]] * 3
        with open(tmp_path / f"{number}.csv", newline="", encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) == 3 * number
        table = pq.read_table(tmp_path / f"{number}").to_pydict()
        assert columns <= table.keys()
        assert table[own] == [["a dog", "a cat"]] * 3


def test_evaluate_draws_what_infer_draws(model, photos, tmp_path, expected):
    rows = [{"image": str(photos / f"{n:02}.png"), "caption": "a dog", "split": "test"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quiet = ("--meteor", "false", "--spice", "false", "--bootstrap_samples", 0, "--report", "false")
    flags = ("--model_name_or_path", model, *DRAWN, "--output_dir", tmp_path / "scores", *quiet)
    script("evaluate", tmp_path / "rows.jsonl", *flags)
    found = {row["image_id"]: row["caption"] for row in json.loads((tmp_path / "scores/predictions.json").read_text())}
    drawn = {row["image"].rpartition("/")[2]: row["captions"][0] for row in map(json.loads, expected.splitlines())}
    assert {name.rpartition("/")[2]: caption for name, caption in found.items()} == drawn
    metrics = json.loads((tmp_path / "scores/coco_metrics.json").read_text())
    assert json.dumps(metrics).count('"seed"') >= 1


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("infer", ("--temperature", 0.5), "--temperature is for --do_sample"),
        ("infer", ("--do_sample", "--num_beams", 3), "--num_beams 3 searches"),
        ("infer", ("--do_sample", "--top_p", 1.5), "--top_p must be above 0 and at most 1, not 1.5"),
        ("infer", ("--do_sample", "--temperature", 0), "--temperature must be above 0, not 0"),
        ("infer", ("--num_return_sequences", 0), "--num_return_sequences must be at least 1"),
        ("infer", ("--num_return_sequences", 9), "9 captions per image are the best of as many beams"),
        ("evaluate", ("--do_sample", "--num_return_sequences", 2), "evaluate.py scores one caption per image"),
        ("evaluate", ("--do_sample", "--sweep", "num_beams=1,2"), "--sweep chooses the settings of a search"),
    ],
)
def test_mistakes_are_one_line(model, photos, tmp_path, name, flags, message):
    given = {"infer": (photos,), "evaluate": ("--dataset_name", photos, "--output_dir", tmp_path)}[name]
    done = tiny.run(f"{name}.py", *given, "--model_name_or_path", model, *flags, fails=True)
    assert message in done.stderr
    assert sum(message in line for line in done.stderr.splitlines()) == 1

"""Shards of a source, the files of their outputs, and who works on them: without a model."""

import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from captioning import output as caption_output
from captioning.shards import ImageSource
from captioning.sources import image_rows
from common.errors import DataError, Unreachable, UserError
from data.rows import Options
from jobs import progress, queue
from jobs.ray_engine import Actor, resources
from jobs.run import Run
from jobs.shards import ShardFolder


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder, a list, two tars, and two Parquet files of several row groups."""
    root = tmp_path_factory.mktemp("source")
    (root / "photos").mkdir()
    for number in range(7):
        (root / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    (root / "list.csv").write_text("file,sku\n" + "".join(f"photos/{n}.jpg,s{n}\n" for n in (3, 1, 3)))
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(3):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(content := jpeg(10 * shard + number))
                tar.addfile(member, io.BytesIO(content))
        rows = [{"image": {"bytes": jpeg(100 * shard + n), "path": f"p{n}.jpg"}, "n": n} for n in range(10)]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        pq.write_table(table.with_format("arrow")[:], root / f"{shard}.parquet", row_group_size=3)
    return root


PLACES = [
    ["photos"], ["list.csv"], ["0.tar", "1.tar"], ["0.parquet", "1.parquet"],
    ["photos/2.jpg", "0.tar", "photos", "1.parquet", "list.csv", "photos/2.jpg"],
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("places", PLACES, ids=" ".join)
def test_the_rows_of_all_shards_are_those_of_the_source_in_whatever_order_they_are_read(root, places, size):
    paths = [str(root / place) for place in places]
    source = ImageSource(paths, Options())
    shards = source.shards(size)
    read = {}
    for shard in random.Random(size).sample(shards, len(shards)):
        read[shard] = list(source.rows(shard))
        assert shard.rows in (None, len(read[shard]))
    rows = [row for shard in shards for row in read[shard]]
    assert len({row["key"] for row in rows}) == len(rows)
    told = [(row["name"].split("#")[0], row["columns"], row["image"]) for row in image_rows(paths, Options())]
    assert [(row["name"].split("#")[0], row["columns"], row["image"]) for row in rows] == told
    assert len({shard.file for shard in shards}) == len(shards)
    again = ImageSource(paths, Options()).shards(size)
    assert again == shards


def test_a_source_that_grew_has_the_same_shards_but_the_last(root, tmp_path):
    names = [str(root / "photos" / f"{n}.jpg") for n in range(7)]
    (tmp_path / "list.txt").write_text("\n".join(names[:5]))
    before = ImageSource([str(tmp_path / "list.txt")], Options()).shards(2)
    (tmp_path / "list.txt").write_text("\n".join(names))
    after = ImageSource([str(tmp_path / "list.txt")], Options()).shards(2)
    assert [shard.rows for shard in before] == [2, 2, 1]
    assert after[:2] == before[:2]
    assert [shard.file == before[2].file for shard in after[2:]] == [False, False]
    assert after[2].id == before[2].id
    (tmp_path / "list.txt").write_text("\n".join(reversed(names)))
    reader = ImageSource([str(tmp_path / "list.txt")], Options())
    with pytest.raises(DataError, match="the source has changed while this was running"):
        list(reader.rows(after[0]))


def test_a_broken_parquet_file_is_a_shard_that_says_so(root, tmp_path):
    content = (root / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(content[: len(content) // 2])
    source = ImageSource([str(tmp_path / "0.parquet"), str(root / "1.parquet")], Options())
    shards = source.shards(1000)
    with pytest.raises(DataError, match=r"0\.parquet: the Parquet file is broken or cut off"):
        list(source.rows(shards[0]))
    assert len(list(source.rows(shards[1]))) == 10


def written(folder, shards, rows_of) -> None:
    for shard in shards:
        caption_output.write_shard(folder, shard, rows_of(shard), 1.0, {"model": "m"})


def test_shards_of_different_columns_become_one_table(root, tmp_path):
    source = ImageSource([str(root / "0.tar"), str(root / "1.tar"), str(root / "list.csv")], Options())
    shards = source.shards(1000)
    columns = {0: {"a": 1, "b": None}, 1: {"a": 2.5, "b": "x"}, 2: {"c": [1, 2]}}
    folder = ShardFolder(str(tmp_path / "out"), single=False)
    folder.begin({"model": "m"}, shards, 1000)
    written(folder, shards, lambda shard: [
        {"key": row["key"], "image": row["name"], **columns[shard.position], "caption": "a dog"}
        for row in source.rows(shard)
    ])  # fmt: skip
    assert caption_output.finish(folder, shards, "parquet", source, [])
    import pandas

    frame = pandas.read_parquet(tmp_path / "out")
    assert list(frame.columns) == ["key", "image", "caption", "error", "a", "b", "c"]
    assert len(frame) == 8
    assert frame.a.dropna().unique().tolist() == [1.0, 2.5]
    assert frame.b.dropna().unique().tolist() == ["x"]
    report = json.loads((tmp_path / "out/_report.json").read_text())
    assert (report["rows"], report["errors"], report["shards"]) == (8, 0, 3)


def test_names_that_two_parquet_files_share_are_numbered_in_one_file(root, tmp_path):
    source = ImageSource([str(root / "0.parquet"), str(root / "1.parquet")], Options())
    shards = source.shards(4)
    folder = ShardFolder(str(tmp_path / "out.jsonl"), single=True)
    folder.begin({"model": "m"}, shards, 4)
    written(folder, shards, lambda shard: [
        caption_output.row_of(folder, row, {"caption": row["key"]}) for row in source.rows(shard)
    ])  # fmt: skip
    caption_output.finish(folder, shards, "jsonl", source, [])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == [f"{file}.parquet#{n}" for file in range(2) for n in range(10)]
    assert [row["image"] for row in rows] == [f"p{n}.jpg" for n in range(10)] + [f"p{n}.jpg#2" for n in range(10)]
    assert [row["n"] for row in rows] == [*range(10), *range(10)]


def test_a_tar_that_was_fetched_again_replaces_what_was_made_of_it(root, tmp_path):
    (tmp_path / "a.tar").write_bytes((root / "0.tar").read_bytes())
    folder = ShardFolder(str(tmp_path / "out"), single=False)
    for text in ("before", "after"):
        source = ImageSource([str(tmp_path / "a.tar")], Options())
        shards = source.shards(1000)
        folder.begin({"model": "m"}, shards, 1000)
        assert not folder.done(shards)
        written(folder, shards, lambda _, text=text: [{"key": "a.tar/0.jpg", "image": "a.tar/0.jpg", "caption": text}])
        caption_output.finish(folder, shards, "parquet", source, [])
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            tar.add(root / "photos/0.jpg", "more.jpg")
    assert pq.read_table(tmp_path / "out")["caption"].to_pylist() == ["after"]


# ---------------------------------------------------------------- who works on them


class Silent:
    def tick(self, rows):
        pass

    finished = close = lambda *_: None


class Work:
    """Fails as told: {shard: errors to raise, one a try}."""

    def __init__(self, errors):
        self.errors, self.done = errors, []

    def start(self):
        return {}

    def __call__(self, shard, tick):
        if self.errors.get(shard):
            raise self.errors[shard].pop(0)
        self.done.append(shard)
        return {"rows": 1}


class Name(str):
    label = "?"


def run(errors, count=4, reachable=lambda shard: True):
    class Args:
        engine = "local"

    work = Work({Name(name): found for name, found in errors.items()})
    shards = [Name(n) for n in range(count)]
    return work, queue.run(work, lambda settings: (shards, Silent()), reachable, Args, count)


def test_a_shard_that_fails_is_tried_once_more_and_then_listed():
    work, failed = run({"1": [DataError("broken")] * 9, "2": [DataError("once")]})
    assert work.done == ["0", "3", "2"]
    assert [(str(outcome.shard), outcome.error) for outcome in failed] == [("1", "broken")]


@pytest.mark.parametrize(
    "error",
    [UserError("no such model"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["mistake", "full disk"],
)
def test_what_would_meet_every_shard_ends_the_run_at_once(error):
    work = Work({Name("1"): [error]})
    with pytest.raises(type(error)):
        queue.run(
            work, lambda _: ([Name(n) for n in range(4)], Silent()), lambda _: True, type("A", (), {"engine": ""}), 4
        )
    assert work.done == ["0"]


def test_a_fault_of_the_program_in_shard_after_shard_ends_the_run():
    with pytest.raises(ZeroDivisionError):
        run({str(n): [ZeroDivisionError()] for n in range(2, 9)}, 20)


def test_a_server_that_is_gone_is_waited_for(monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    answers = iter([False, False, True])
    work, failed = run({"1": [DataError("could not be reached")]}, reachable=lambda shard: next(answers, True))
    assert not failed
    assert work.done == ["0", "1", "2", "3"]  # it was not counted as a try
    assert slept == [2, 4]
    assert [record.getMessage() for record in caplog.records] == ["1: could not be reached. Waiting for it"] * 2
    work, failed = run({"1": [DataError("could not be reached")] * 2}, 2, reachable=lambda shard: False)
    assert [outcome.error for outcome in failed] == ["could not be reached"]
    assert 600 <= sum(slept[2:]) / 2 <= 700


def test_the_output_of_all_shards_waits_for_its_server_too(monkeypatch):
    slept, left, asked = [], [DataError("gone"), DataError("gone")], []
    monkeypatch.setattr(time, "sleep", slept.append)

    def finish():
        if left:
            raise left.pop()
        return "made"

    answers = iter([False, True, False, True])
    assert queue.wait_for_servers(finish, lambda shard: asked.append(shard) or next(answers)) == "made"
    assert slept == [2, 2]
    assert set(asked) == {None}

    def broken():
        raise KeyError("ours")

    with pytest.raises(KeyError):  # a fault of the program is none of the server's
        queue.wait_for_servers(broken, lambda shard: True)
    assert slept == [2, 2]


def test_work_is_tried_again_if_its_server_is_back_before_it_is_asked_for(monkeypatch):
    slept, left = [], [Unreachable("gone"), Unreachable("gone")]
    monkeypatch.setattr(time, "sleep", slept.append)

    def finish():
        if left:
            raise left.pop()
        return "made"

    assert queue.wait_for_servers(finish, lambda shard: True) == "made"
    assert slept == [2, 2]
    left += [Unreachable("wrong")] * 9  # a server that answers, and never as it should
    with pytest.raises(Unreachable):
        queue.wait_for_servers(finish, lambda shard: True)
    assert len(left) == 6


def test_a_full_disk_loses_no_shard_and_leaves_no_half_of_one(root, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        folder, kept = ShardFolder(str(place / "out"), single=False), []
        shards = ImageSource([str(root / "photos")], Options()).shards(1)
        folder.begin({}, shards, 1)
        for shard in shards:
            rows = [{"key": "a", "image": "a", "caption": os.urandom(9000).hex()}]
            try:
                caption_output.write_shard(folder, shard, rows, 1.0, {})
                kept.append(shard)
            except OSError as error:
                assert error.errno == errno.ENOSPC or "No space left" in str(error)  # noqa: PT017
        assert 0 < len(kept) < len(shards)
        assert list(folder.done(shards)) == kept
        assert all(pq.read_table(place / "out" / shard.file).num_rows == 1 for shard in kept)
        assert not [name for name in folder.files() if name.startswith(".")]
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # a reader may not have let go yet


# ---------------------------------------------------------------- what people see


def test_status_tells_from_the_files_alone(root, tmp_path):
    output = str(tmp_path / "o.csv")
    with pytest.raises(UserError, match="no run has written there"):
        progress.status(output, "images")
    source = ImageSource([str(root / "photos")], Options())
    shards = source.shards(2)
    folder = ShardFolder(output, single=True)
    left, shown = Run(folder, shards, 2, "images", (0, 1)).begin({"model": "m"})
    assert left == shards
    assert progress.status(output, "images") == "0 of 7 images, 0 of 4 shards"
    written(folder, shards[:2], lambda shard: [
        caption_output.row_of(folder, row, {"error": "broken"}) for row in source.rows(shard)
    ])  # fmt: skip
    shown.finished(queue.Outcome(shards[2], {}, "the file is gone"))
    said = progress.status(output, "images")
    assert said.startswith("4 of 7 images, 2 of 4 shards, ")
    assert "4 without a result, 1 shard failed" in said
    assert said.endswith("failed: images, rows 4 to 6: the file is gone")
    assert (progress.look(output).state, progress.look(output).exit_code) == ("failed", 1)
    left, shown = Run(folder, shards, 2, "images", (1, 2)).begin({"model": "m"})
    assert left == [shards[3]]  # the second of two processes, of those that are left


def test_the_status_of_a_run_that_has_stopped_says_when_it_wrote_last(root, tmp_path, monkeypatch):
    output = str(tmp_path / "o.csv")
    source = ImageSource([str(root / "photos")], Options())
    folder, shards = ShardFolder(output, single=True), source.shards(2)
    Run(folder, shards, 2, "images", (0, 1)).begin({"model": "m"})
    started = time.time()
    row = lambda shard: [{"key": row["key"], "image": row["name"], "error": None} for row in source.rows(shard)]  # noqa: E731
    for number, shard in enumerate(shards[:2], 1):
        table = pa.Table.from_pylist(row(shard))
        folder.write(shard.file, iter([table]), lambda n=number: {"rows": 2, "finished": started + n})
    look = progress.look(output)
    assert (look.state, look.exit_code) == ("running", 0)
    assert look.lines("images").endswith("images/s, about 2 s left, last written 0 s ago")
    monkeypatch.setattr(progress.time, "time", lambda: started + 42)
    look = progress.look(output)
    assert (look.state, look.exit_code, look.seconds_left) == ("stopped", 1, None)
    assert look.lines("images") == "4 of 7 images, 2 of 4 shards, last written 40 s ago"


def test_every_process_of_a_job_array_says_what_it_does(root, tmp_path, caplog):
    shards = ImageSource([str(root / "photos")], Options()).shards(2)
    folder = ShardFolder(str(tmp_path / "o.csv"), single=True)
    with caplog.at_level("INFO"):
        for number in range(3):
            Run(folder, shards, 2, "images", (number, 3)).begin({"model": "m"})
    assert [record.getMessage() for record in caplog.records] == [
        f"7 images, 0 of them done before; process {number + 1} of 3 takes {mine} of 4 shards"
        for number, mine in enumerate((2, 1, 1))
    ]


def test_an_address_holds_the_same_as_a_folder(root):
    fsspec.filesystem("memory").store.clear()
    source = ImageSource([str(root / "photos")], Options())
    shards = source.shards(3)
    folder = ShardFolder("memory://bucket/out", single=False)
    folder.check()
    folder.begin({"model": "m"}, shards, 3)
    written(folder, shards[:2], lambda shard: [
        {"key": row["key"], "image": row["name"], "caption": "a"} for row in source.rows(shard)
    ])  # fmt: skip
    assert list(folder.done(shards)) == shards[:2]
    assert (
        pa.concat_tables(pa.Table.from_batches(folder.read(name)) for name in folder.done(shards).values()).num_rows
        == 6
    )
    with pytest.raises(UserError, match="model was 'm', is 'other'"):
        folder.begin({"model": "other"}, shards, 3)


def test_shards_are_as_small_as_needed_to_give_every_process_one(tmp_path):
    folder = ShardFolder(str(tmp_path / "o.csv"), single=True)
    assert folder.size(1000, (0, 4), iter(range(8))) == 2
    assert folder.size(1000, (3, 4), iter(range(9))) == 3
    assert folder.size(2, (0, 4), iter(range(800))) == 2

    def unread():
        raise AssertionError("one process needs not know how many there are")
        yield

    assert folder.size(1000, (0, 1), unread()) == 1000


def test_the_line_of_a_resumed_run_counts_what_was_done_before_but_not_in_its_rate(root, tmp_path, caplog, monkeypatch):
    source = ImageSource([str(root / "photos")], Options())
    folder, shards = ShardFolder(str(tmp_path / "o.csv"), single=True), source.shards(2)
    folder.begin({"model": "m"}, shards, 2)
    written(folder, shards[:2], lambda shard: [{"key": row["key"], "image": row["name"]} for row in source.rows(shard)])
    clock = progress.time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    shown = progress.Progress(folder, shards, "images")
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock + 10)
    with caplog.at_level("INFO"):
        shown.say()
        shown.rows_of_current = 1
        written(
            folder, shards[2:3], lambda shard: [{"key": row["key"], "image": row["name"]} for row in source.rows(shard)]
        )
        shown.say()  # what others have finished is looked for every ten seconds
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock + 20.5)
        shown.say()
        shown.rows_before = 100  # of files that somebody has removed since
        shown.say()
        with folder.assembling(shards) as contents:
            assert contents is None
    first, second, third, fourth, left = (record.getMessage() for record in caplog.records)
    assert first.startswith("4 of 7 images, 2 of 4 shards")
    assert "0.1 images/s" not in first
    assert second.startswith("5 of 7 images, 2 of 4 shards, 0.1 images/s")
    assert third.startswith("7 of 7 images, 3 of 4 shards")
    assert "-" not in fourth
    assert left.startswith("1 of 4 shards are left")


def test_a_run_is_taken_to_have_stopped_after_three_times_what_a_shard_took(root, tmp_path, monkeypatch):
    output = str(tmp_path / "o.csv")
    source = ImageSource([str(root / "photos")], Options())
    folder, shards = ShardFolder(output, single=True), source.shards(2)
    Run(folder, shards, 2, "images", (0, 1)).begin({"model": "m"})
    started = folder.read_json("_settings.json")["started"]
    for number, shard in enumerate(shards[:2], 1):  # 12.5 s each: over after 37.5 s without another
        table = pa.Table.from_pylist([{"key": row["key"], "image": row["name"]} for row in source.rows(shard)])
        folder.write(shard.file, iter([table]), lambda n=number: {"rows": 2, "finished": started + 12.5 * n})
    for seconds, state in ((37.2, "running"), (37.8, "stopped")):
        monkeypatch.setattr(progress.time, "time", lambda s=seconds: started + 25 + s)
        assert progress.look(output).state == state


def test_a_damaged_file_is_named_with_the_first_line_of_what_is_wrong(tmp_path, monkeypatch):
    folder = ShardFolder(str(tmp_path / "o.csv"), single=True)
    (tmp_path / "o.csv.shards").mkdir()
    (tmp_path / "o.csv.shards" / "a.parquet").write_bytes(b"no file")

    def broken(file):
        raise pa.ArrowInvalid("it is broken\nin detail")

    monkeypatch.setattr(pq, "ParquetFile", broken)
    with pytest.raises(UserError, match=r"a\.parquet is damaged \(it is broken\)\. Delete it"):
        list(folder.rows("a.parquet"))


def test_a_worker_of_ray_starts_in_the_folder_of_the_run_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Actor(None, None, str(tmp_path / "on another machine"), [])
    assert os.getcwd() == str(ROOT)
    actor = Actor(lambda shard, tick: tick(5) or {"rows": 5}, lambda shard: True, str(tmp_path), [])
    assert os.getcwd() == str(tmp_path)
    assert actor.work_on("a shard").counts == {"rows": 5}
    assert actor.progress() == 0, "of the next shard, none are done"


@pytest.mark.parametrize(
    ("cluster", "nodes", "shards", "workers", "given"),
    [
        ({"CPU": 8.0}, [4.0, 4.0], 10, 2, {"num_gpus": 0.0, "num_cpus": 4}),
        ({"CPU": 8.0}, [4.0, 4.0], 1, 1, {"num_gpus": 0.0, "num_cpus": 4}),
        ({"CPU": 2.0, "GPU": 4.0}, [2.0], 10, 4, {"num_gpus": 1.0, "num_cpus": 0.5}),
        ({"CPU": 9.0, "GPU": 2.0}, [9.0], 10, 2, {"num_gpus": 1.0, "num_cpus": 4}),
    ],
)
def test_workers_share_what_a_cluster_says_it_has(cluster, nodes, shards, workers, given):
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    ray = SimpleNamespace(cluster_resources=lambda: cluster, nodes=lambda: [*nodes, {"Alive": False, "Resources": {}}])
    args = SimpleNamespace(gpus_per_worker=None, workers=None)
    assert resources(ray, args, shards) == (workers, given)

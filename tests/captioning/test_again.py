"""infer.py --only, and the list of captions that may be wrong: listed images are captioned again, the others are kept."""

import json
import re
import signal
import tarfile
import time

import pyarrow.parquet as pq
import pytest
import tiny
from llm_server import LLMServer, coloured, picture_in
from test_server import asked, pictures, rows, script

assert script  # a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_folder(tmp_path_factory.mktemp("model"))


def of_images(path, column="image"):
    return {re.split(r"[/\\]", row[column])[-1]: row for row in rows(path)}


def faulty(uri, request):
    """As `coloured`, but for every kind of fault, which another prompt has not."""
    red = round(picture_in(uri).getpixel((0, 0))[0] / 7) * 7
    if request["messages"][0]["content"][1]["text"] == "Again":
        return "another caption"
    return {
        7: "I'm sorry, I cannot describe this image.",
        14: "a dog and a dog and a dog and a dog and",
        21: ["it goes on and", "length"],
        28: "",
    }.get(red, coloured(uri))


def test_what_may_be_wrong_is_listed_and_asked_again_with_another_prompt(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 12), tmp_path / "out.jsonl"
    with LLMServer(faulty) as server:
        _, said = script("infer.py", folder, "--output", output, "--shard_size", 5, *asked(server))
        listed = tmp_path / "out.jsonl.shards/_flagged.txt"
        assert "4 of 12 images are flagged (1 refusing, 1 repeating themselves, 1 cut short, " in said
        assert f"--only {listed}" in said
        assert [name[-8:] for name in listed.read_text().split()] == ["0001.png", "0002.png", "0003.png", "0004.png"]
        before, requests = of_images(output), len(server.requests)
        again = ["--only", tmp_path / "mine.txt", "--prompt", "Again", *asked(server)]
        (tmp_path / "mine.txt").write_text(listed.read_text() + str(folder / "0007.png"))
        _, said = script("infer.py", folder, "--output", output, *again)
        assert "5 images are captioned again, in 2 shards" in said
        assert len(server.requests) == requests + 5
        after = of_images(output)
        assert list(after) == list(before)
        changed = {f"000{n}.png" for n in (1, 2, 3, 4, 7)}
        for name, row in after.items():
            assert row == ({"image": row["image"], "caption": "another caption"} if name in changed else before[name])
        assert not listed.exists()  # nothing is wrong now
        report = json.loads((tmp_path / "out.jsonl.shards/_report.json").read_text())
        assert report["errors"] == report["cut"] == 0
        assert report["settings"]["prompt"] != "Again"
        assert [(one["images"], one["settings"]["prompt"]) for one in report["again"]] == [(4, "Again"), (1, "Again")]
        _, said = script("infer.py", folder, "--output", output, *again)  # what is done is not done again
        _, said = script("infer.py", folder, "--output", output, *asked(server))  # and the run is as finished as it was
        assert len(server.requests) == requests + 5
        assert of_images(output) == after


def test_a_stopped_second_round_asks_no_image_twice(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 12), tmp_path / "out.jsonl"
    (tmp_path / "mine.txt").write_text("\n".join(str(folder / f"{n:04}.png") for n in range(9)))
    again = ["--only", tmp_path / "mine.txt", "--prompt", "Again"]
    with LLMServer(faulty) as server:
        script("infer.py", folder, "--output", output, "--shard_size", 5, *asked(server))
    before, turns = of_images(output), iter(range(1000))

    def breaks(uri, request):
        return faulty(uri, request) if next(turns) < 7 else (401, {"error": {"message": "bad key"}}, {})

    with LLMServer(breaks) as server:
        script("infer.py", folder, "--output", output, *again, *asked(server, "--concurrency", 1), fails=True)
        first = set(server.paid)
        assert len(first) == 7
        assert of_images(output) == before  # until the round is complete
    with LLMServer(faulty, server.server_port) as server:
        _, said = script("infer.py", folder, "--output", output, *again, *asked(server))
        assert "4 images are captioned again, in 1 shards" in said
        assert server.paid.total() == 2
        assert not first & set(server.paid)
    assert [row["caption"] == "another caption" for row in rows(output)] == [True] * 9 + [False] * 3


def test_a_second_round_that_is_killed_loses_no_answer(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 40), tmp_path / "out.jsonl"
    (tmp_path / "mine.txt").write_text("\n".join(str(folder / f"{n:04}.png") for n in range(30)))
    with LLMServer(faulty) as server:
        script("infer.py", folder, "--output", output, "--shard_size", 10, *asked(server))
    before = of_images(output)

    def slow(uri, request):
        time.sleep(0.05)
        return faulty(uri, request)

    with LLMServer(slow) as server:
        again = [folder, "--output", output, "--only", tmp_path / "mine.txt", "--prompt", "Again", *asked(server)]
        process, deadline = tiny.start("infer.py", *again), time.time() + 100
        while server.paid.total() < 14:  # in the second of three shards
            assert process.poll() is None, process.communicate()
            assert time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)  # the server answers what was asked before the kill
        assert of_images(output) == before
        first = server.paid.total()
        assert first < 30
        tiny.run("infer.py", *again)
        assert server.paid.total() - 30 <= 8  # at most those in flight are asked twice
        assert len(server.paid) == 30
    after = list(of_images(output).values())
    assert [row["caption"] for row in after[:30]] == ["another caption"] * 30
    assert after[30:] == list(before.values())[30:]


@pytest.mark.parametrize("form", ["jsonl", "folder of Parquet", "tar"])
def test_images_of_every_storage_get_what_a_run_with_these_settings_gives(form, script, model, tmp_path):
    folder = pictures(tmp_path / "photos", 6)
    source = folder
    if form == "tar":
        source = tmp_path / "photos.tar"
        with tarfile.open(source, "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    short, long = ["--num_beams", 2, "--max_new_tokens", 3], ["--num_beams", 2, "--max_new_tokens", 7]

    def run(output, *more):
        script("infer.py", source, "--model_name_or_path", model, "--output", output, *more)
        if output.is_dir():
            found = pq.read_table(output).to_pylist()
        else:
            found = rows(output)
        return {re.split(r"[/\\]", row["image"])[-1]: row["caption"] for row in found}

    ending = "" if form == "folder of Parquet" else ".jsonl"
    one, other = tmp_path / f"one{ending}", tmp_path / f"other{ending}"
    of_short, of_long = run(one, *short), run(other, *long)
    assert of_short != of_long
    prefix = "photos.tar/" if form == "tar" else f"{folder}/"
    (tmp_path / "mine.txt").write_text(f"{prefix}0004.png\n\n{prefix}0001.png\n")
    both = run(one, *long, "--only", tmp_path / "mine.txt")
    assert both == of_short | {name: of_long[name] for name in ("0001.png", "0004.png")}


def test_a_list_of_ids_that_evaluate_made_of_file_names_is_taken(script, tmp_path):
    pictures(tmp_path / "photos/a", 3)
    pictures(tmp_path / "photos/b", 2)
    (tmp_path / "photos/b/0001.png").rename(tmp_path / "photos/b/only.png")
    mine, output = tmp_path / "mine.txt", tmp_path / "out.jsonl"
    with LLMServer(faulty) as server:
        script("infer.py", tmp_path / "photos", "--output", output, *asked(server))
        again = [
            "infer.py",
            tmp_path / "photos",
            "--output",
            output,
            "--only",
            mine,
            "--prompt",
            "Again",
            *asked(server),
        ]
        mine.write_text("only.png\na/0002.png\n")
        script(*again)
        changed = [row["image"][-12:] for row in rows(output) if row["caption"] == "another caption"]
        assert changed == ["s/a/0002.png", "s/b/only.png"]
        mine.write_text("0000.png\n")
        _, said = script(*again, fails=True)
        assert "a/0000.png or " in said
        assert "write the whole name" in said


def test_what_names_no_image_or_no_finished_run_is_refused(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 3), tmp_path / "out.jsonl"
    (tmp_path / "mine.txt").write_text(f"{folder}/0001.png\nno such image\nnor this\n")
    with LLMServer(coloured) as server:
        words = ["infer.py", folder, *asked(server), "--only", tmp_path / "mine.txt"]
        _, said = script(*words, fails=True)
        assert "--only asks for the --output of a finished run" in said
        _, said = script(*words, "--output", output, fails=True)
        assert "1 of 1 shards" in said
        script("infer.py", folder, *asked(server), "--output", output)
        _, said = script(*words, "--output", output, fails=True)
        assert "'no such image' and 1 other lines name no image" in said
        assert server.paid.total() == 3

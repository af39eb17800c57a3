"""infer.py and evaluate.py with a model on a server: real HTTP, each image answered once, whatever fails."""

import contextlib
import json
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import families
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import ROOT
from llm_server import LLMServer, coloured, picture_in
from PIL import Image
from small_run import CAPTIONS

from arguments import ImageServerArguments
from captioning.server import ServerCaptioner
from jobs import chat_server


def pictures(folder, count, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = (number * 7 % 256, number * 31 % 256, number // 256 * 90)
        Image.new("RGB", size, colour).save(folder / f"{number:04}.png")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(server, *more, model="openai:small"):
    return ["--model_name_or_path", model, "--base_url", server.url, "--concurrency", 8, "--timeout", 3, *more]


@pytest.fixture
def script(monkeypatch, capsys, caplog):
    """A script, run in this process: (what it printed, what it logged). `fails`: with exit code 2."""

    def run(name, *arguments, fails=False, key="") -> tuple[str, str]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        caplog.set_level("INFO")
        caplog.clear()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert (code or 0) == (2 if fails else 0), printed.out + printed.err + caplog.text
        return printed.out, printed.err + caplog.text

    return run


def test_images_are_sent_small_and_in_order_and_what_it_took_is_said(script, tmp_path):
    folder = pictures(tmp_path / "photos", 3, size=(300, 200))
    Image.new("RGB", (20, 90), "red").save(folder / "small.jpg")
    delays = iter([0.4, 0.2, 0, 0])

    def answer(uri, request):
        time.sleep(next(delays))
        return coloured(uri)

    with LLMServer(answer) as server:
        words = asked(server, "--prompt", "Which colour?", "--max_side", 120, "--max_new_tokens", 50)
        printed, said = script("infer.py", folder, *words, "--price_in", 1, "--price_out", 10, key="sk-very-secret")
        names, captions = zip(*(line.split("\t") for line in printed.splitlines()), strict=True)
        assert [name.rpartition("/")[2] for name in names] == ["0000.png", "0001.png", "0002.png", "small.jpg"]
        assert captions[1] == "a square of 7 red, 30 green and 1 blue"  # in a JPEG's colours
        requests = [request for _, request in server.requests]
    uris = [request["messages"][0]["content"][0]["image_url"]["url"] for request in requests]
    assert {picture_in(uri).size for uri in uris} == {(120, 80), (20, 90)}  # none is made larger
    request = requests[0]
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "Which colour?"}
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("small", 50, 0)
    assert server.headers_seen[0]["authorization"] == "Bearer sk-very-secret"
    assert "very-secret" not in printed + said
    assert "4 prompt tokens, 40 written, cost 0.00" in said


def test_each_image_is_asked_its_own_prompt_and_for_as_many_samples_as_are_told(script, tmp_path):
    pictures(tmp_path / "photos", 2)
    (tmp_path / "list.csv").write_text("image,tags\nphotos/0000.png,a dog\nphotos/0001.png,a cat\n")
    output = tmp_path / "out.jsonl"

    def answer(uri, request):
        choices = [
            {
                "index": n,
                "finish_reason": ["stop", "length"][n],
                "message": {"role": "assistant", "content": f"text {n}"},
            }
            for n in range(request["n"])
        ]
        return 200, {"id": "1", "object": "chat.completion", "choices": choices}, {}

    words = ["--prompt", "Describe {tags}.", "--system_prompt", "Be short.", "--num_return_sequences", 2]
    with LLMServer(answer) as server:
        _, said = script("infer.py", tmp_path / "list.csv", "--output", output, *asked(server, *words), fails=True)
        assert "several captions need --do_sample" in said
        drawing = ["--do_sample", "--temperature", 0.5, "--top_k", 7, "--seed", 3]
        _, said = script("infer.py", tmp_path / "list.csv", "--output", output, *asked(server, *words, *drawing))
        requests = [request for _, request in server.requests]
    assert [row["captions"] for row in rows(output)] == [["text 0", "text 1"]] * 2
    assert "2 of 4 captions were cut" in said or "2 of 2 images are flagged" in said
    assert {message["content"] for request in requests for message in request["messages"][:1]} == {"Be short."}
    asked_for = {request["messages"][1]["content"][1]["text"] for request in requests}
    assert asked_for == {"Describe a dog.", "Describe a cat."}
    sampling = {name: requests[0][name] for name in ("temperature", "top_p", "top_k", "seed", "n")}
    assert sampling == {"temperature": 0.5, "top_p": 1.0, "top_k": 7, "seed": 3, "n": 2}


def test_a_dry_run_asks_nothing_and_says_what_it_may_cost(script, tmp_path):
    folder = pictures(tmp_path / "photos", 3, size=(1500, 1000))
    with LLMServer(coloured) as server:
        words = asked(
            server, "--dry_run", "--max_new_tokens", 100, "--max_side", 750, "--price_in", 1e6, "--price_out", 0
        )
        printed, _ = script("infer.py", folder, *words)
        assert server.requests == []
    # 750 x 500 pixels are 500 tokens, and the prompt of 34 letters some 8 more
    assert "3 images" in printed
    assert "prompts: about 1,524 tokens" in printed
    assert "written: at most 300 tokens" in printed
    assert "cost: at most about 1,524.00" in printed


def faulty():
    """Answers as `coloured`, with every fault in between."""
    count, lock = [0], threading.Lock()

    def answer(uri, request):
        with lock:
            count[0] += 1
            turn = count[0]
        time.sleep(0.01)
        if turn % 11 == 0:
            return 429, {"error": {"message": "slow down", "code": "rate_limit"}}, {"Retry-After": "0.2"}
        if turn % 13 == 0:
            return 500, {"error": {"message": "oops"}}, {}
        if turn % 17 == 0:
            return 200, b'{"id": "1", "choices": [{"index": 0, "mess', {}
        if turn % 19 == 0:
            return 200, {"id": "1", "object": "chat.completion", "choices": []}, {}
        if turn in (37, 200):
            return None  # hangs
        return coloured(uri)

    return answer


@pytest.mark.slow
def test_a_server_with_every_fault_and_three_kills_give_what_an_undisturbed_run_gives(tmp_path):
    folder, output = pictures(tmp_path / "photos", 500), tmp_path / "out.jsonl"
    with LLMServer(coloured) as server:
        undisturbed = tmp_path / "undisturbed.jsonl"
        tiny.run("infer.py", folder, "--output", undisturbed, *asked(server))
        assert server.paid.total() == 500

    def kept():
        files = (tmp_path / "out.jsonl.shards/_answers").glob("*.jsonl")
        return sum(len(file.read_text().split("\n")) - 1 for file in files)

    def done():
        return kept() + sum(
            pq.read_metadata(file).num_rows for file in (tmp_path / "out.jsonl.shards").glob("*.parquet")
        )

    in_flight = 0
    with LLMServer(faulty()) as server:
        command = [folder, "--output", output, "--shard_size", 200, *asked(server)]
        for _ in range(3):
            before = done()
            process = tiny.start("infer.py", *command)
            deadline = time.time() + 200
            while done() < before + 90:
                assert process.poll() is None, process.communicate()[1]
                assert time.time() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            time.sleep(0.3)  # the server answers what was asked before the kill
            in_flight += server.paid.total() - done() - in_flight
        result = tiny.run("infer.py", *command)
        assert 0 <= in_flight <= 3 * 8  # at most --concurrency of them at each kill
        assert server.paid.total() == 500 + in_flight
        assert len(server.requests) > 1.2 * 500
    assert output.read_text() == undisturbed.read_text()
    assert len({row["image"] for row in rows(output)}) == 500
    assert "500 captions in" in result.stderr
    assert "answered 429" in result.stderr or "answered 500" in result.stderr
    assert not (tmp_path / "out.jsonl.shards/_answers").exists()


def test_answers_outlive_a_source_that_changes_in_between(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 30), tmp_path / "out.jsonl"
    turns = iter(range(1000))

    def broke(uri, request):
        return coloured(uri) if next(turns) < 20 else (401, {"error": {"message": "bad key"}}, {})

    with LLMServer(broke) as server:
        _, said = script("infer.py", folder, "--output", output, "--shard_size", 10, *asked(server), fails=True)
        assert "answers 401: bad key. Is OPENAI_API_KEY right?" in said
        before = set(server.paid)
        assert len(before) == 20
        port = server.server_port
    Image.new("RGB", (40, 30), "red").save(folder / "0000-new.png")  # each image is now at another place
    (folder / "0007.png").unlink()
    with LLMServer(coloured, port) as server:
        script("infer.py", folder, "--output", output, *asked(server))
        assert not before & set(server.paid)
        assert server.paid.total() == 11
    assert len(rows(output)) == 30
    assert all("caption" in row for row in rows(output))


def test_what_the_server_does_not_answer_is_the_error_of_its_row(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 6), tmp_path / "out.jsonl"

    def answer(uri, request):
        red = round(picture_in(uri).getpixel((0, 0))[0] / 7) * 7  # a JPEG's colours differ by 1
        return {
            0: (400, {"error": {"message": "unsafe picture"}}, {}),
            7: ["what it said before", "content_filter"],
            14: "  ",
            21: (200, {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop",
                       "message": {"role": "assistant", "content": None, "refusal": "I will not."}}]}, {}),
            28: ["it goes on and", "length"],
        }.get(red, coloured(uri))  # fmt: skip

    with LLMServer(answer) as server:
        _, said = script("infer.py", folder, "--output", output, *asked(server))
        requests = len(server.requests)
        script("infer.py", folder, "--output", output, *asked(server))
        assert len(server.requests) == requests  # they are not asked again
    found = rows(output)
    assert [row.get("error") for row in found] == [
        "the server refused it (400: unsafe picture)", "the server's filter refused it", "the answer is empty",
        "the model refused it: I will not.", None, None,
    ]  # fmt: skip
    assert found[4]["caption"] == "it goes on and"
    assert "2 captions in" in said
    assert "4 images without one" in said
    assert "1 of 2 captions were cut by the server (finish_reason length)" in said


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (400, "this model does not take images", "answers 400: this model does not take images"),
        (401, "bad key", "Is OPENAI_API_KEY right?"),
        (404, "no such model", "Is the model's name right"),
    ],
)
def test_a_server_that_cannot_answer_ends_the_run_in_one_line(status, message, said, script, monkeypatch, tmp_path):
    monkeypatch.setattr(chat_server, "PATIENCE", 0.2)
    folder = pictures(tmp_path / "photos", 3)
    with LLMServer(lambda uri, request: (status, {"error": {"message": message}}, {})) as server:
        _, printed = script("infer.py", folder, "--output", tmp_path / "out.jsonl", *asked(server), fails=True)
        assert len(server.requests) <= 3  # none is tried again
    assert said in printed
    assert "Traceback" not in printed


def test_a_bad_image_stops_the_run_or_has_its_error_and_costs_nothing(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 3), tmp_path / "out.jsonl"
    (folder / "0001.png").write_bytes(b"no image")
    with LLMServer(coloured) as server:
        _, said = script("infer.py", folder, "--output", output, *asked(server), fails=True)
        assert "0001.png" in said
        assert "--skip_bad_images" in said
        script("infer.py", folder, "--output", output, "--skip_bad_images", *asked(server))
        assert server.paid.total() == 2
    assert ["error" in row for row in rows(output)] == [False, True, False]


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("openai:small", ["--num_beams", 3], "--num_beams is for models that run here"),
        ("openai:small", ["--bf16", "true"], "--bf16 is for models that run here"),
        ("openai:", [], "name the model, openai:MODEL"),
        ("DIR", ["--max_side", 3], "--max_side is for a model on a server"),
        ("DIR", ["--dry_run"], "--dry_run is for a model on a server"),
        ("openai:small", ["--extra_body", "{"], "--extra_body is not JSON"),
        *[("openai:small", ["--extra_body", body], "is a JSON object") for body in ("[1]", "5", "null")],
        *[
            ("openai:small", ["--extra_body", f'{{"{name}": 1}}'], f"cannot set '{name}'")
            for name in ("model", "messages", "stream", "n")
        ],
    ],
)
def test_flags_that_would_do_nothing_are_refused(model, flags, said, script, tmp_path):
    folder = pictures(tmp_path / "photos", 1)
    (tmp_path / "DIR").mkdir()
    model = str(tmp_path / model) if model == "DIR" else model
    url = ["--base_url", "http://127.0.0.1:9/v1"] if model.startswith("openai") else []
    _, printed = script("infer.py", folder, "--model_name_or_path", model, *url, *flags, fails=True)
    assert said in printed


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.mp4", b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41", "x.mp4: a video: take images out of it"),
        ("x.webm", b"\x1a\x45\xdf\xa3\x01\0\0\0", "x.webm: a video: take images out of it"),
        ("x.jsonl", b'{"images": ["0000.png", "0001.png"]}', "A caption belongs to one image: give a row per image"),
    ],
)
def test_videos_and_rows_of_several_images_are_refused_and_nothing_is_sent(name, content, said, script, tmp_path):
    file = pictures(tmp_path / "photos", 2) / name
    file.write_bytes(content)
    with LLMServer(coloured) as server:
        _, printed = script("infer.py", file, "--output", tmp_path / "out.jsonl", *asked(server), fails=True)
        assert said in printed
        assert server.requests == []


@pytest.mark.parametrize("name", ["serve.py", "train.py"])
def test_scripts_that_need_the_model_itself_say_so(name, script, tmp_path):
    words = ["--output_dir", tmp_path / "out"] if name == "train.py" else []
    _, printed = script(name, "--model_name_or_path", "openai:small", *words, fails=True)
    assert "models on a server caption in infer.py, evaluate.py and demo.py alone" in printed


def test_a_model_on_a_server_is_scored_and_a_killed_run_asks_no_image_again(script, tmp_path):
    tiny.write_photos(tmp_path / "photos", CAPTIONS)
    lines = [f'photos/{name}.png,"{caption}"' for name, captions in CAPTIONS.items() for caption in captions]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    words = [tmp_path / "captions.csv", "--split", "train", "--output_dir", tmp_path / "scores"]
    words += ["--meteor", "false", "--spice", "false", "--bootstrap_samples", 50, "--prompt", "What is it?"]
    turns = iter(range(1000))

    def answer(uri, request):
        turn = next(turns)
        return coloured(uri) if turn < 5 else (401, {"error": {"message": "bad key"}}, {})

    with LLMServer(answer) as server:
        _, said = script("evaluate.py", *words, *asked(server, "--concurrency", 1), fails=True)
        assert "Is OPENAI_API_KEY right?" in said
        before = set(server.paid)
        assert len(before) == 5
        port = server.server_port

    first = []

    def filtered(uri, request):
        first.append(uri)
        return ["", "content_filter"] if uri == first[0] else "a red circle"

    with LLMServer(filtered, port) as server:
        _, said = script("evaluate.py", *words, *asked(server, "--price_in", 1, "--price_out", 1, "--concurrency", 1))
        assert not before & set(server.paid)
    assert "has no caption, and is scored with an empty one: the server's filter refused it" in said
    scores = json.loads((tmp_path / "scores/coco_metrics.json").read_text())
    assert scores["model"] == "openai:small"
    assert scores["generation"]["prompt"] == "What is it?"
    assert scores["server"]["unanswered"] == 1
    assert scores["server"]["tokens"]["written"] > 0
    assert scores["server"]["cost"] is not None
    assert scores["intervals"]["CIDEr"]
    predictions = {
        row["image_id"]: row["caption"] for row in json.loads((tmp_path / "scores/predictions.json").read_text())
    }
    assert sorted(predictions.values())[0] == ""
    assert len(predictions) == scores["counts"]["images"]
    assert (tmp_path / "scores/report.html").exists()

    # What the server refused is asked again, and alone; another server is asked all.
    with LLMServer(lambda uri, request: "a blue square", port) as server:
        _, said = script("evaluate.py", *words, *asked(server))
        assert set(server.paid) == {first[0]}
        assert "all answers, those of earlier runs too: " in said
    with LLMServer(lambda uri, request: "another server") as server:
        script("evaluate.py", *words, *asked(server))
    predictions = json.loads((tmp_path / "scores/predictions.json").read_text())
    assert {row["caption"] for row in predictions} == {"another server"}


def test_an_output_is_of_one_server(script, tmp_path):
    folder, output = pictures(tmp_path / "photos", 2), tmp_path / "out.jsonl"
    with LLMServer(coloured) as server, LLMServer(coloured) as other:
        script("infer.py", folder, "--output", output, *asked(server))
        slash = ["--base_url", server.url + "/"]
        _, said = script("infer.py", folder, "--output", output, *asked(server), *slash)
        assert "all captions of the output, kept ones too: 2 prompt tokens" in said
        Image.new("RGB", (40, 30), "red").save(folder / "new.png")
        _, said = script("infer.py", folder, "--output", output, *asked(other), fails=True)
        assert "was started with other settings: server" in said
        assert "Name another --output" in said
        assert other.requests == []


def test_what_was_refused_in_an_unfinished_shard_is_asked_again(script, tmp_path):
    folder, output, turns = pictures(tmp_path / "photos", 3), tmp_path / "out.jsonl", iter(range(9))
    answers = [["", "content_filter"], "first", (401, {"error": {"message": "bad key"}}, {})]
    words = ["--output", output, "--concurrency", 1]
    with LLMServer(lambda uri, request: answers[next(turns)]) as server:
        script("infer.py", folder, *asked(server), *words, fails=True)
        port = server.server_port
    with LLMServer(lambda uri, request: "second", port) as server:
        script("infer.py", folder, *asked(server), *words)
    assert [row["caption"] for row in rows(output)] == ["second", "first", "second"]


@pytest.mark.slow
def test_a_model_in_transformers_serve_captions_as_it_does_here(script, tmp_path):
    """Greedy, in float32, and of the same pixels: those that were sent."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    model, processor = families.build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name in ("photos", "sent"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    settings = ["--max_new_tokens", 8, "--prompt", "a red dog"]
    args = ImageServerArguments(base_url="http://127.0.0.1:9/v1")
    sends = ServerCaptioner("m", args, prompt="a red dog")
    for number in range(8):
        image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((60, 40))
        image.save(tmp_path / f"photos/{number}.png")
        content = sends.picture({"image": image, "image_id": number}).messages[0]["content"]
        picture_in(content[0]["image_url"]["url"]).save(tmp_path / f"sent/{number}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", code, "serve", str(tmp_path / "model"), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*words, "--dtype", "float32"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.time() + 200
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.5)
        of_server = [
            "--model_name_or_path",
            f"openai:{tmp_path / 'model'}",
            "--base_url",
            f"{url}/v1",
            "--timeout",
            100,
        ]
        served, _ = script("infer.py", tmp_path / "photos", *of_server, *settings)
    finally:
        process.terminate()
        process.wait()
    here = ["--model_name_or_path", tmp_path / "model", "--num_beams", 1]
    ours, _ = script("infer.py", tmp_path / "sent", *here, *settings)
    assert served == ours.replace(str(tmp_path / "sent"), str(tmp_path / "photos"))
    assert len({line.split("\t")[1] for line in ours.splitlines()}) > 2  # they differ with the image


def test_copies_of_an_image_that_is_asked_several_prompts_keep_its_ending(script, tmp_path):
    pictures(tmp_path / "photos", 1)
    turns = [[{"from": "human", "value": f"<image>\n{word}?"}, {"from": "gpt", "value": word}] for word in ("a", "b")]
    talk = [{"image": "photos/0000.png", "conversations": conversation} for conversation in turns]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    with LLMServer(lambda uri, request: request["messages"][0]["content"][1]["text"]) as server:
        script("infer.py", tmp_path / "talk.jsonl", "--output", tmp_path / "metadata.jsonl", *asked(server))
    found = rows(tmp_path / "metadata.jsonl")
    assert sorted(row["caption"] for row in found) == ["a?", "b?"]
    for row in found:
        with Image.open(tmp_path / row["file_name"]) as image:
            assert (image.format, row["file_name"][-4:]) == ("PNG", ".png")

"""rewrite.py against a real server on this machine: complete output, each row once, nothing paid twice."""

import json
import re
import runpy
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest
import tiny
from conftest import ROOT
from llm_server import LLMServer, fused, write_rows
from random_trees import picture, write

import data
from jobs import progress


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder):
    """The journals of the shards."""
    return sorted(folder.glob("out.jsonl.shards/_answers/*.jsonl"))


def command(source, output, server, *more, task="fuse"):
    return [
        task, source, "--output", output, "--llm", "openai:small", "--base_url", server.url, "--concurrency", 8,
        "--timeout", 3, *more,
    ]  # fmt: skip


@pytest.fixture
def rewrite(monkeypatch, capsys, caplog):
    """The script, run in this process (it starts much sooner): what it printed and logged. `fails`: with exit code 2, or
    the one that it is."""

    def run(*arguments, fails=False, key="") -> str:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setattr("sys.argv", ["rewrite.py", *map(str, arguments)])
        caplog.set_level("INFO")
        caplog.clear()
        code = 0
        try:
            runpy.run_path(str(ROOT / "rewrite.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        said = printed.out + printed.err + caplog.text
        assert code == (2 if fails is True else int(fails)), said
        return said

    return run


def slowly(seconds: float):
    """Answers as `fused`, after some seconds."""

    def answer(prompt, request):
        time.sleep(seconds)
        return fused(prompt)

    return answer


def test_every_row_keeps_its_columns_and_gets_a_caption_and_its_provenance(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 20), tmp_path / "out.jsonl"
    with LLMServer(fused) as server:
        secrets = ("--base_url", server.url + "?api_key=very-secret",
                   "--extra_body", '{"api_key": "very-secret", "min_p": 0.1}')  # fmt: skip
        words = command(source, output, server)
        result = rewrite(*words, "--price_in", 1, "--price_out", 10, *secrets, key="sk-very-secret")
        found = rows(output)
        assert [row["key"] for row in found] == list(range(20))
        for row in found:
            assert row["caption"] == fused(f"Sentence 1: {row['laion_2b']}\nSentence 2: {row['laion_coco']}\n")
            assert row["rewrite"]["status"] == "rewritten"
            assert row["rewrite"]["model"] == "openai:small"
            assert len(row["rewrite"]["prompt"]) == 12
            assert json.loads(row["rewrite"]["settings"])["max_new_tokens"] == 80
            assert "min_p" in row["rewrite"]["settings"]
        assert set(server.paid.values()) == {1}
        request = server.requests[0][1]
        assert (request["max_tokens"], request["seed"]) == (80, 42)
        assert server.headers_seen[0]["authorization"] == "Bearer sk-very-secret"
        again = rewrite(*words, *secrets)
        assert "20 rows, 20 of them done before" in again
        assert server.paid.total() == 20
    report = json.loads((tmp_path / "out.jsonl.shards/_report.json").read_text())
    assert report["status"] == {"rewritten": 20}
    prompts, written = report["tokens"]["prompts"], report["tokens"]["written"]
    assert written == sum(len(row["caption"].split()) for row in found)
    secret = "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()) + result
    assert "very-secret" not in secret
    assert f"cost {(prompts + 10 * written) / 1e6:.2f}" in result


def test_a_server_with_every_fault_and_a_client_killed_three_times_lose_and_double_nothing(tmp_path):
    source, output = write_rows(tmp_path, 300), tmp_path / "out.jsonl"
    count, lock = [0], threading.Lock()

    def answer(prompt, request):
        with lock:
            count[0] += 1
            turn = count[0]
        time.sleep(0.02)
        if turn % 11 == 0:
            return 429, {"error": {"message": "slow down", "code": "rate_limit"}}, {"Retry-After": "0.2"}
        if turn % 13 == 0:
            return 500, {"error": {"message": "oops"}}, {}
        if turn % 17 == 0:
            return 200, b"<html>no JSON", {}
        if turn % 19 == 0:
            return 200, {"id": "1", "object": "chat.completion", "choices": []}, {}
        if turn in (37, 200):
            return None  # hangs
        return fused(prompt)

    server = LLMServer(answer)
    port = server.server_port
    server.__enter__()
    arguments = command(source, output, server)

    def finished():
        parts = answers(tmp_path)
        return {json.loads(line)["row"] for part in parts for line in part.read_text().split("\n")[:-1]}

    for _ in range(3):
        before = len(finished())
        process = tiny.start("rewrite.py", *arguments)
        deadline = time.time() + 200
        while len(finished()) < before + 40:
            assert process.poll() is None, process.communicate()[1]
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with open(answers(tmp_path)[-1], "a", encoding="utf-8") as part:  # a kill in the middle of a line
            part.write('{"row": 12')
    kept = finished()
    process = tiny.start("rewrite.py", *arguments)
    while len(finished()) < len(kept) + 40:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    server.__exit__()  # the server dies, and comes back
    time.sleep(1)
    with LLMServer(answer, port) as second:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        paid_after = set(second.paid)
    found = rows(output)
    assert [row["key"] for row in found] == list(range(300))
    assert {row["rewrite"]["status"] for row in found} == {"rewritten"}
    for said in ("answered 429", "answered 500", "could not be reached", "300 rows verified, each once"):
        assert said in err
    finished_prompts = {p for p in server.paid if int(re.search(r"Shop (\d+)", p).group(1)) in kept}
    assert not paid_after & finished_prompts  # what was finished was not asked for again


def test_rejected_texts_are_asked_for_with_another_seed_and_then_fall_back_as_told(rewrite, tmp_path):
    source = write_rows(tmp_path, 6)

    def answer(prompt, request):
        key = int(re.search(r"Shop (\d+)", prompt).group(1))
        if key == 0 and request["seed"] == 42:
            return "This exhibits nice sentence structure."
        return {
            1: "I'm sorry, I cannot do that.",
            2: "",
            3: ["The dog is on the", "length"],
            4: "dog dog dog dog.",
        }.get(key, fused(prompt))

    with LLMServer(answer) as server:
        expected = {
            "keep_synthetic": ["a picture of 1 dogs.", "a picture of 2 dogs."],
            "keep_raw": ["Shop 1 offer no. 1", "Shop 2 offer no. 2"],
            "null": [None, None],
        }
        for on_reject, kept in expected.items():  # one run: the fallback is chosen without asking again
            output = tmp_path / "out.jsonl"
            rewrite(*command(source, output, server, "--on_reject", on_reject))
            found = rows(output)
            assert [row["caption"] for row in found][1:3] == kept
            reasons = [row["rewrite"]["reason"] for row in found]
            assert reasons == [None, "refusal", "empty", "cut_off", "repetition", None]
            assert [row["rewrite"]["attempts"] for row in found] == [2, 3, 3, 3, 3, 1]
            assert found[1]["rewrite"]["rejected"] == "I'm sorry, I cannot do that."
            assert found[3]["rewrite"]["status"] == (
                "null" if on_reject == "null" else on_reject.replace("keep", "kept")
            )
        rewrite(*command(source, output, server, "--on_reject", "drop"))
        assert [row["key"] for row in rows(output)] == [0, 5]
        assert len(server.requests) == 2 + 4 * 3 + 1
    report = json.loads((tmp_path / "out.jsonl.shards/_report.json").read_text())
    assert report["status"] == {"rewritten": 2, "dropped": 4}
    assert report["rejected"] == {"refusal": 1, "empty": 1, "cut_off": 1, "repetition": 1}


def test_another_prompt_or_model_refuses_to_mix_and_more_rows_go_on(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 6), tmp_path / "out.jsonl"
    (tmp_path / "own.txt").write_text("# mine\nJoin {raw} with {synthetic}.")
    with LLMServer(fused) as server:
        rewrite(*command(source, output, server, "--max_samples", 2))
        assert len(rows(output)) == 2
        said = rewrite(*command(source, output, server, "--prompt_file", tmp_path / "own.txt"), fails=True)
        assert "started with other settings: prompt was" in said
        said = rewrite(*command(source, output, server), "--llm", "openai:other", fails=True)
        assert "llm was 'openai:small', is 'openai:other'" in said
        rewrite(*command(source, output, server))
        assert server.paid.total() == 6
        changed = json.loads(source.read_text())
        changed[3]["laion_2b"] = "another text"
        source.write_text(json.dumps(changed))
        said = rewrite(*command(source, output, server), fails=True)
        assert "row 3 has other captions than when it was rewritten" in said


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (401, {"message": "bad key"}, "Is OPENAI_API_KEY right?"),
        (404, {"message": "no such model"}, "Is the model's name right"),
        (429, {"message": "no money", "code": "insufficient_quota"}, "no credit"),
    ],
)
def test_what_does_not_pass_by_itself_ends_the_run_with_one_message(rewrite, status, error, said, tmp_path):
    source = write_rows(tmp_path, 30)
    turns = iter(range(1000))

    def answer(prompt, request):
        return fused(prompt) if next(turns) < 10 else (status, {"error": error}, {})

    with LLMServer(answer) as server:
        result = rewrite(*command(source, tmp_path / "out.jsonl", server), fails=True)
        assert said in result
        assert error["message"] in result
        assert len(answers(tmp_path)[0].read_text().splitlines()) == 10  # finished work is kept


def test_a_prompt_that_the_server_refuses_is_that_rows_fault_alone(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 5), tmp_path / "out.jsonl"

    def answer(prompt, request):
        return (400, {"error": {"message": "content policy"}}, {}) if "Shop 0 " in prompt else fused(prompt)

    with LLMServer(answer) as server:
        said = rewrite(*command(source, output, server))
    assert [row["rewrite"]["reason"] for row in rows(output)] == ["server_refused", None, None, None, None]
    assert "server: refused a prompt, which is left (400: content policy)" in said
    assert "trying again" not in said


def test_requests_keep_to_the_limit_a_minute(rewrite, tmp_path):
    source = write_rows(tmp_path, 12)
    with LLMServer(fused) as server:
        rewrite(*command(source, tmp_path / "out.jsonl", server, "--requests_per_minute", 240))
        times = sorted(when for when, _ in server.requests)
    assert times[-1] - times[0] > 0.9 * 11 * 0.25


def test_two_processes_share_the_rows_and_one_killed_run_is_finished_by_one_process(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 200), tmp_path / "out.jsonl"
    with LLMServer(slowly(0.03)) as server:
        arguments = command(source, output, server, "--concurrency", 2, "--rows_per_file", 50)
        process = tiny.start("rewrite.py", *arguments, processes=2)
        deadline = time.time() + 200
        while sum(len(part.read_text().splitlines()) for part in answers(tmp_path)) < 50:
            assert process.poll() is None, process.communicate()[1]
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        kept = [len(part.read_text().splitlines()) for part in answers(tmp_path)]
        assert len(kept) >= 2
        rewrite(*arguments)
        assert [row["key"] for row in rows(output)] == list(range(200))


def test_parquet_comes_in_and_goes_out_in_shards_with_every_column(rewrite, tmp_path):
    import pyarrow as pa

    source, output = tmp_path / "part-1.parquet", tmp_path / "out"
    table = pa.table(  # the columns of CapsFusion-120M
        {
            "image_url": [f"http://x.org/{n}.jpg" for n in range(25)],
            "laion_2b": [f"Shop {n} offer" for n in range(24)] + [None],
            "laion_coco": [f"a picture of {n} dogs." for n in range(25)],
            "capsfusion": ["the official one."] * 25,
        }
    )
    pq.write_table(table, source)
    with LLMServer(fused) as server:
        rewrite(*command(source, output, server, "--rows_per_file", 10))
        assert server.paid.total() == 24
    assert [path.name[:6] for path in sorted(output.glob("*.parquet"))] == ["00000-", "00001-", "00002-"]
    found = pq.read_table(output)
    assert found.select(table.column_names).equals(table)
    last = found.to_pylist()[-1]
    assert last["caption"] == "a picture of 24 dogs."
    assert (last["rewrite"]["status"], last["rewrite"]["reason"]) == ("kept_synthetic", "no_input")
    assert progress.status(str(output), "rows") == "25 of 25 rows, 3 of 3 shards, finished"


def test_jsonl_becomes_parquet_with_the_types_of_its_rows_and_nothing_is_overwritten(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 1100, empty=None, nested={"a": [1]}), tmp_path / "out"
    with LLMServer(fused) as server:
        output.mkdir()
        (output / "precious.txt").write_text("mine")
        assert "exists already" in rewrite(*command(source, output, server), fails=True)
        (output / "precious.txt").unlink()
        output.rmdir()
        rewrite(*command(source, output, server, "--rows_per_file", 1050))
        assert [pq.read_metadata(path).num_rows for path in sorted(output.glob("*.parquet"))] == [1050, 50]
        found = pq.read_table(output).to_pylist()
        assert [row["key"] for row in found] == list(range(1100))
        assert found[7]["nested"] == {"a": [1]}
        assert found[7]["empty"] is None
        changed = [*json.loads(source.read_text()), {"laion_2b": "a", "laion_coco": "b", "late": 1}]
        source.write_text(json.dumps(changed))
        said = rewrite(*command(source, output, server, "--rows_per_file", 1050), fails=1)
        assert "column late is not in the first" in said
        assert pq.read_table(output).num_rows == 1100  # the output of before is still there


def test_paragraphs_of_images_are_trained_on_with_their_splits(rewrite, tmp_path):
    captions = {f"p{n}": [f"a red dog {n}.", f"a dog runs {n}."] for n in range(8)}
    splits = {name: ["train", "validation", "test"][n % 3] for n, name in enumerate(captions)}
    source = tiny.write_photos(tmp_path / "photos", captions, splits)
    (tmp_path / "photos" / "p0.png").unlink()  # captions are rewritten whether or not an image is there

    def answer(prompt, request):
        numbers = re.findall(r"- a red dog (\d+)\.\n- a dog runs (\d+)\.", prompt)
        return f"A red dog, number {numbers[0][0]}, runs. It is on its way."

    output = tmp_path / "paragraphs.jsonl"
    with LLMServer(answer) as server:
        rewrite(*command(source, output, server, task="paragraph"))
    assert {row["image_id"] for row in rows(output)} == {f"p{n}.png" for n in range(8)}
    lines = [line for line in output.read_text().splitlines() if "p0.png" not in line]
    output.write_text("\n".join(lines) + "\n")
    dataset = data.load(str(output), caption_column="caption")
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 2, "validation": 3, "test": 2}
    assert all(len(row["captions"]) == 1 and "on its way" in row["captions"][0] for row in dataset["test"])


def test_captions_of_infer_are_fused_with_the_raw_ones_by_image(rewrite, tmp_path):
    tiny.write_photos(tmp_path / "photos", {f"p{n}": [f"Shop {n}"] for n in range(3)})
    made = [{"image": str(tmp_path / f"photos/p{n}.png"), "caption": f"a picture {n}"} for n in (2, 0)]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, made)))
    output = tmp_path / "out.jsonl"
    with LLMServer(fused) as server:
        arguments = command(tmp_path / "photos/data.jsonl", output, server, "--synthetic_file", tmp_path / "made.jsonl")
        rewrite(*arguments)
    found = [(row["caption"], row["rewrite"]["reason"]) for row in rows(output)]
    assert found == [
        ("There is Shop 0, and with it a picture 0.", None),
        (None, "no_input"),
        ("There is Shop 2, and with it a picture 2.", None),
    ]


def test_a_dry_run_asks_nothing_and_tells_the_cost(rewrite, tmp_path):
    source = write_rows(tmp_path, 40)
    with LLMServer(fused) as server:
        result = rewrite(
            "fuse", source, "--llm", "openai:small", "--base_url", server.url, "--dry_run", "--price_in", 1000,
            "--price_out", 1000,
        )  # fmt: skip
        assert not server.requests
    assert "40 rows" in result
    assert "Sentence 1: Shop 0 offer no. 0" in result
    assert re.search(r"cost: about \d+\.\d\d, at most \d+\.\d\d if each row took 3 attempts", result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["IN"], "Say what to do with what"),
        (["fuse", "IN", "--llm", "openai:x"], "Name the LLM"),
        (["fuse", "IN", "--llm", "x", "--output", "OUT.jsonl"], "expected openai:MODEL"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "OUT.jsonl"], "Set OPENAI_API_KEY"),
        (["paragraph", "IN", "--llm", "openai:x", "--output", "OUT.jsonl", "--on_reject", "keep_synthetic"], "for fuse"),
        (["paragraph", "IN", "--llm", "openai:x", "--output", "OUT.jsonl"], "Name it with --caption_column"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "OUT.jsonl", "--raw_column", "k"], "Columns present: laion_2b"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "OUT.jsonl", "--output_column", "key"], "has a column 'key'"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "OUT.jsonl", "--prompt_file", "P"], "{synthetic} is missing"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "none/OUT.jsonl"], "its folder does not exist"),
        (["fuse", "IN", "--llm", "openai:x", "--output", "OUT.jsonl", "--on_rejects", "drop"], "Did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_rewritten_is_one_clear_message(rewrite, arguments, said, tmp_path):
    write_rows(tmp_path, 2)
    (tmp_path / "P").write_text("Only {raw}")
    names = {"IN": "in.json", "OUT.jsonl": "OUT.jsonl", "P": "P", "none/OUT.jsonl": "none/OUT.jsonl"}
    arguments = [tmp_path / names[word] if word in names else word for word in arguments]
    result = rewrite(*arguments, fails=True)
    assert said in result


def test_an_answer_without_a_message_is_asked_for_again_and_one_that_never_has_one_is_that_rows_fault(
    rewrite, tmp_path
):
    source, output = write_rows(tmp_path, 6), tmp_path / "out.jsonl"
    turns = {}

    def answer(prompt, request):
        turns[prompt] = turns.get(prompt, 0) + 1
        if "Shop 5 " in prompt or turns[prompt] == 1:
            choice = {"index": 0, "message": None, "finish_reason": "stop"}
            return 200, {"id": "1", "object": "chat.completion", "choices": [choice]}, {}
        return fused(prompt)

    with LLMServer(answer) as server:
        said = rewrite(*command(source, output, server, "--max_retries", 2))
    assert [row["rewrite"]["reason"] for row in rows(output)] == [None] * 5 + ["server_refused"]
    assert "answered without text" in said
    assert "Traceback" not in said


def test_images_that_jsonl_cannot_hold_are_refused_before_anything_is_asked(rewrite, tmp_path):
    files = {f"{n}.png": picture(n, ".png") for n in range(4)}
    source = write("tar", tmp_path, files, {name: ["a dog runs"] for name in files})
    with LLMServer(lambda prompt, request: "A dog runs.") as server:
        for more in ((), ("--dry_run",)):
            said = rewrite(*command(source, tmp_path / "out.jsonl", server, *more, task="paragraph"), fails=True)
            assert "holds images or other bytes, which JSONL cannot hold" in said
        assert not server.requests


def test_two_runs_at_once_leave_no_shard_failed(rewrite, tmp_path):
    source, output = write_rows(tmp_path, 60), tmp_path / "out.jsonl"
    with LLMServer(slowly(0.05)) as server:
        arguments = command(source, output, server, "--concurrency", 1, "--rows_per_file", 20)
        runs = [tiny.start("rewrite.py", *arguments) for _ in range(2)]
        errors = [run.communicate(timeout=200)[1] for run in runs]
        assert any("another run is writing it" in error for error in errors)  # else nothing was tried here
        assert [row["key"] for row in rows(output)] == list(range(60))
        said = rewrite(*arguments)
        assert "failed" not in said
        assert server.paid.total() == 60
    assert not list((tmp_path / "out.jsonl.shards").glob("_failed*"))
    assert [run.returncode for run in runs] == [0, 0], errors

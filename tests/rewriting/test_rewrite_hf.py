"""rewrite.py with a model in process: its captions are those of plain generate, in any number of processes."""

import json
import time

import pytest
import tiny
import torch

TEXTS = [f"{size} {colour} dog number {n} near the water" for n, (size, colour) in enumerate(
    [("a small", "red"), ("two large", "blue"), ("the", "yellow"), ("three very small and", "green")] * 6)]  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.build_llm(tmp_path_factory.mktemp("llm"), TEXTS)


@pytest.fixture
def source(tmp_path):
    rows = [{"raw": text * (1 + n % 3), "synthetic": f"a dog {n}."} for n, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompt.txt").write_text("Join {raw} and {synthetic}:")
    return tmp_path / "in.jsonl"


def command(source, llm, *more):
    return [
        "fuse", source, "--output", source.parent / "out.jsonl", "--llm", f"hf:{llm}", "--max_new_tokens", 12,
        "--prompt_file", source.parent / "prompt.txt", "--per_device_batch_size", 5, *more,
    ]  # fmt: skip


def rows(source):
    return [json.loads(line) for line in (source.parent / "out.jsonl").read_text().splitlines()]


def test_texts_are_those_of_one_row_at_a_time(llm, source):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rewriting.checks import tidy

    tiny.run("rewrite.py", *command(source, llm, "--max_attempts", 1))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm).eval(), AutoTokenizer.from_pretrained(llm)
    for row in rows(source):
        ids = tokenizer(f"Join {row['raw']} and {row['synthetic']}:", return_tensors="pt").input_ids
        with torch.no_grad():
            new = model.generate(ids, num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=1)[
                0, ids.shape[1] :
            ]
        written = row["rewrite"]["rejected"] or row["caption"]
        if row["rewrite"]["reason"] not in ("empty",):
            assert written == tidy(tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_finished_and_equals_that_of_one(llm, source):
    arguments = command(source, llm, "--per_device_batch_size", 1, "--rows_per_file", 4)
    process = tiny.start("rewrite.py", *arguments, processes=2)
    deadline = time.time() + 200
    parts = lambda: [p.read_text().count("\n") for p in sorted(source.parent.glob("out.jsonl.shards/_answers/*"))]  # noqa: E731
    while len(parts()) < 2 or min(parts()) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    tiny.run("rewrite.py", *arguments, processes=2)
    found = rows(source)
    assert [row["synthetic"] for row in found] == [f"a dog {n}." for n in range(len(TEXTS))]
    assert {row["rewrite"]["attempts"] for row in found} <= {1, 2, 3}
    said = tiny.run("rewrite.py", *command(source, llm, "--num_beams", 2, "--rows_per_file", 4), fails=True).stderr
    assert "num_beams was 3, is 2" in said


def test_an_encoder_decoder_writes_too_and_a_prompt_longer_than_the_model_is_refused(llm, source, tmp_path):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(llm)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1,
        pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    tiny.run("rewrite.py", *command(source, tmp_path / "t5", "--max_attempts", 1, "--on_reject", "null"))
    assert len(rows(source)) == len(TEXTS)
    assert all(row["rewrite"]["attempts"] == 1 for row in rows(source))
    said = tiny.run("rewrite.py", *command(source, llm, "--max_prompt_tokens", 4000), fails=True).stderr
    assert "has a context of 2048 tokens" in said
    assert (
        "needs a CUDA GPU" in tiny.run("rewrite.py", *command(source, llm, "--quantization", "4bit"), fails=True).stderr
    )

"""evaluate.py --judge: answers are read by the published rules, each caption is judged once, whatever fails."""

import json
import random
import re
import threading
import time

import pytest
import tiny
from llm_server import LLMServer

from common.errors import UserError
from metrics.judges import CANNOT_TELL, MultipleChoice, Pairwise, choice, clair_score, preference, read_questions

# What language models answer to such prompts, and the score by the rules: JSON from the first { to the next { or }, never
# multiplied; else the first number, times 100 if it is below 1; else none.
ANSWERS = [
    ('{"score": 85, "reason": "same scene"}', 0.85),
    ('{"score": 85.5, "reason": "same scene"}', 0.855),
    ('{"reason": "of 2 dogs only 1 is named", "score": 40}', 0.40),
    ('{"score": 0, "reason": "other things"}', 0.0),
    ('{"score": 100}', 1.0),
    ('{"score": 0.85}', 0.0085),
    ('{"score": 1}', 0.01),
    ('{"score": "70"}', 0.70),
    ('{"score": " 70 "}', 0.70),
    ('{"score": 7e1}', 0.70),
    ('{"score": null, "reason": "no 3 things"}', 0.03),
    ('{"score": "high", "reason": "9 of 10"}', 0.09),
    ('{"rating": 60}', 0.60),
    ('{score: 75}', 0.75),
    ("{'score': 75, 'reason': 'x'}", 0.75),
    ('{"score": 75', 0.75),
    ('{"score": 75, "reason": "cut', 0.75),
    ('{"score": 75,}', 0.75),
    ('{"score": [75]}', 0.75),
    ('{"result": {"score": 75}}', 0.75),
    ('{ {"score": 75} }', 0.75),
    ('{"score": 75} {"score": 20}', 0.75),
    ('Here is my judgment: {"score": 75, "reason": "x"}', 0.75),
    ('On a scale of 100: {"score": 75}', 0.75),
    ('```json {"score": 75, "reason": "x"} ```', 0.75),
    ('{} 60', 0.60),
    ("85", 0.85),
    ("85.", 0.85),
    ("85/100", 0.85),
    ("85%", 0.85),
    ("Score: 85", 0.85),
    ("**85**", 0.85),
    ("I would say 85 out of 100, not 20.", 0.85),
    ("0.85", 0.85),
    (".5", 0.50),
    ("0", 0.0),
    ("1", 0.01),
    ("1.0", 0.01),
    ("", None),
    ("I cannot judge this.", None),
    ('{"score": "high"}', None),
    ("{}", None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "score"), ANSWERS)
def test_an_answer_of_clair_is_read_by_the_published_rules(answer, score):
    assert clair_score(answer) == (None if score is None else pytest.approx(score))


def test_answers_of_the_other_judges():
    choices = ["a red ball", "a dog", "two cats", CANNOT_TELL]
    for answer, chosen in {
        "B": 1, "b.": None, "(C)": 2, "A. a red ball": 0, "**D**": 3, "The answer is C.": 2, "answer: b": 1, "a dog": 1, "Two cats.": 2,
        "A dog is in it, so (B)": 1, "A man": None, "": None, "E": None, "The description does not say": 3,
    }.items():  # fmt: skip
        assert choice(answer, choices) == chosen, answer
    for answer, value in {"1": 1, "2.": 0, "Caption 2": 0, "tie": 0.5, "TIE": 0.5, "1 or 2": None, "": None, "12": None}.items():  # fmt: skip
        assert preference(answer) == value, answer


def write(tmp_path, captions: int):
    references = {f"i{n}": [f"a dog number {n} runs on the grass", f"dog {n} outside"] for n in range(captions)}
    (tmp_path / "r.json").write_text(json.dumps(references))
    (tmp_path / "p.json").write_text(json.dumps({image: f"the dog {image[1:]} runs" for image in references}))


def command(tmp_path, server, *more):
    return [
        "--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", "--output_dir", tmp_path / "o", "--meteor", "false",
        "--spice", "false", "--llm", "openai:m", "--base_url", server.url, "--bootstrap_samples", 100, "--report", "false", *more,
    ]  # fmt: skip


def test_captions_are_judged_once_by_a_server_that_errs_and_a_client_killed_three_times(tmp_path):
    write(tmp_path, 500)
    chance, lock = random.Random(0), threading.Lock()
    journal = tmp_path / "o/judge_clair.jsonl"

    def answer(prompt, request):
        assert request["temperature"] == 0
        number = re.search(r"the dog (\d+) runs", prompt)[1]
        assert f"- a dog number {number} runs on the grass\n- dog {number} outside\n" in prompt
        with lock:
            drawn = chance.random()
        if drawn < 0.08:
            return (500, {"error": {"message": "broken"}}, {}) if drawn < 0.03 else (429, {}, {"Retry-After": "0.01"})
        if drawn < 0.1:
            return (200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}, {})
        return (
            "no idea" if drawn < 0.13 else json.dumps({"score": int(re.search(r"the dog (\d+) runs", prompt)[1]) % 101})
        )

    with LLMServer(answer) as server:
        flags = command(tmp_path, server, "--judge", "clair", "--price_in", 1, "--price_out", 2, "--max_retries", 30)
        for rows in (50, 175, 325):
            run = tiny.start("evaluate.py", *flags)
            while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= rows):
                time.sleep(0.01)
            run.kill()
            run.communicate()
            assert run.returncode == -9
        tiny.run("evaluate.py", *flags)
        asked = len(server.requests)
        tiny.run("evaluate.py", *flags)
        assert len(server.requests) == asked, "answers are kept"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted(row["image_id"] for row in rows) == sorted(f"i{n}" for n in range(500))
    scores = json.loads((tmp_path / "o/coco_metrics.json").read_text())
    record = scores["judges"]["CLAIR"]
    assert scores["CLAIR"] == pytest.approx(sum(n % 101 for n in range(500)) / 500 / 100, abs=0.01)
    assert (record["llm"], record["questions"], record["cost"] > 0) == ("openai:m", 500, True)
    assert record["calls"] == sum(row["attempts"] for row in rows) >= 500
    per_image = [json.loads(line) for line in (tmp_path / "o/per_image.jsonl").read_text().splitlines()]
    assert per_image[7]["scores"]["CLAIR"] == pytest.approx(0.07)
    assert scores["intervals"]["CLAIR"][0] < scores["CLAIR"] < scores["intervals"]["CLAIR"][1]


def test_what_cannot_be_read_counts_as_worst_after_three_calls_and_a_dead_server_loses_no_other_score(tmp_path):
    write(tmp_path, 3)
    with LLMServer(lambda prompt, request: "hm" if "the dog 1 runs" in prompt else "50") as server:
        tiny.run("evaluate.py", *command(tmp_path, server, "--judge", "clair"))
        assert len(server.requests) == 5
    scores = json.loads((tmp_path / "o/coco_metrics.json").read_text())
    assert scores["CLAIR"] == pytest.approx(1 / 3)
    assert scores["judges"]["CLAIR"]["unreadable"] == pytest.approx(1 / 3)
    with LLMServer(lambda prompt, request: (401, {"error": {"message": "no such key"}}, {})) as server:
        failed = tiny.run(
            "evaluate.py", *command(tmp_path, server, "--judge", "clair", "--llm", "openai:n"), fails=True
        )
    assert "CLAIR is missing: the server of n answers 401: no such key. Is OPENAI_API_KEY right?" in failed.stderr
    scores = json.loads((tmp_path / "o/coco_metrics.json").read_text())
    assert scores["CLAIR"] is None
    assert scores["CIDEr"] is not None


def test_questions_are_answered_from_the_caption_alone_and_pairs_are_asked_in_both_orders(tmp_path):
    write(tmp_path, 2)
    rows = [
        {"image_id": "i0", "question": "What runs?", "choices": ["a dog", "a cat"], "answer": "a dog"},
        {"image_id": "i0", "question": "Where?", "choices": "on grass|in water", "answer": "B"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(str(tmp_path / "q.jsonl"))["i0"][1]["answer"] == "in water"

    def answer(prompt, request):
        if "What runs?" in prompt:
            return re.search(r"([A-Z])\. a dog", prompt)[1]
        if "Where?" in prompt:
            assert "grass" not in prompt.partition("Question")[0]
            return re.search(rf"([A-Z])\. {CANNOT_TELL}", prompt)[1]
        return "1" if "the dog 1 runs" in prompt else ("1" if "Caption 1: the dog 0 runs" in prompt else "2")

    (tmp_path / "other.json").write_text(json.dumps({"i0": "a cat", "i1": "a cow"}))
    with LLMServer(answer) as server:
        tiny.run(
            "evaluate.py", *command(tmp_path, server, "--judge", "multiple_choice", "--questions", tmp_path / "q.jsonl")
        )
        assert json.loads((tmp_path / "o/coco_metrics.json").read_text())["caption_qa"] == 0.5
        against = "--judge", "pairwise", "--judge_against", tmp_path / "other.json"
        tiny.run("evaluate.py", *command(tmp_path, server, *against))
    # i0 wins in both orders; the judge of i1 prefers whatever comes first.
    assert json.loads((tmp_path / "o/coco_metrics.json").read_text())["win_rate"] == 0.75
    with pytest.raises(UserError, match="no caption of image 'i1'"):
        Pairwise({"i0": "a"}).questions({"i0": "x", "i1": "y"}, {"i0": ["r"], "i1": ["r"]})
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0] | {"answer": "a cow"}))
    with pytest.raises(UserError, match="line 1: the answer 'a cow' is not one of the choices"):
        MultipleChoice(str(tmp_path / "bad.jsonl"))

"""A reward that fails in the middle of a run, and a language model as reward: one line, a checkpoint, and nothing lost."""

import json
import re
import threading

import pytest
import tiny
from conftest import ROOT
from llm_server import LLMServer
from small_run import CAPTIONS, SPLITS, checkpoints, equal_weights

from arguments import JudgeArguments
from common.errors import UserError
from rewriting.judging import JudgeReward


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return tiny.write_photos(folder / "photos", CAPTIONS, SPLITS), tiny.build_folder(folder)


def run(started, output, reward, fails=False, processes=1, **changed):
    values = {
        "dataset_name": started[0], "output_dir": output, "model_name_or_path": started[1], "objective": "scst",
        "reward": reward, "scst_samples": 2, "num_generations": 2, "num_iterations": 2, "max_steps": 6, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "eval_strategy": "no",
        "save_strategy": "no", "load_best_model_at_end": "false", "gradient_checkpointing": "false", "num_beams": 1,
        "max_new_tokens": 5, "meteor": "false", "spice": "false", "bootstrap_samples": 0, "report": "false",
        "report_to": "none",
    }  # fmt: skip
    words = [word for name, value in (values | changed).items() for word in (f"--{name}", value)]
    return tiny.run("train.py", *words, fails=fails, processes=processes)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: (row["loss"], row["reward"]) for row in history if "loss" in row}


class Answers:
    """A server's scores by the caption; from the request `broken_from` on the key is wrong."""

    def __init__(self):
        self.lock, self.count, self.broken_from = threading.Lock(), 0, None

    def __call__(self, prompt, request):
        with self.lock:
            self.count += 1
            if self.broken_from is not None and self.count >= self.broken_from:
                return (401, {"error": {"message": "expired"}}, {})
        caption = re.search(r"caption:\n(.*)\n", prompt)[1]
        return json.dumps({"score": sum(map(ord, caption)) % 101})


def judge_file(folder, url):
    """recipes/judges/rewards.py, its settings set."""
    text = (ROOT / "recipes/judges/rewards.py").read_text(encoding="utf-8")
    file = folder / "judge.py"
    file.write_text(text.replace("http://localhost:8000/v1", url).replace("Qwen/Qwen2.5-7B-Instruct", "m"))
    return file


def test_a_judge_that_fails_stops_the_run_at_a_checkpoint_of_its_step(started, tmp_path):
    answers = Answers()
    with LLMServer(answers) as server:
        reward = f"cider {judge_file(tmp_path, server.url)}:clair:2"
        run(started, tmp_path / "whole", reward, objective="grpo")
        asked = answers.count
        assert asked > 20
        assert set(server.paid.values()) == {1}, "equal requests are asked once"
        answers.count, answers.broken_from = 0, asked * 2 // 3
        result = run(started, tmp_path / "broken", reward, objective="grpo", fails=True)
        assert "clair: the server of m answers 401: expired" in result.stderr
        assert "Traceback" not in result.stderr
        (saved,) = checkpoints(tmp_path / "broken")
        assert saved.name in ("checkpoint-2", "checkpoint-3", "checkpoint-4")
        assert f"saved {saved}: the same command resumes from there" in result.stderr
        answers.broken_from = None
        assert f"resuming from {saved}" in run(started, tmp_path / "broken", reward, objective="grpo").stderr
        assert set(server.paid.values()) == {2}, (
            "once in the first run; and once before or after the resume in the second"
        )
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert equal_weights(tmp_path / "broken", tmp_path / "whole")


def test_a_function_that_fails_in_the_middle_goes_on_when_it_is_put_right(started, tmp_path):
    file = tmp_path / "mine.py"
    right = "def short(candidates):\n    return [-len(text) for text in candidates]\n"
    wrong = """
calls = []
def short(candidates):
    calls.append(1)
    if len(calls) > 5:  # in the third step, which has the fifth and the sixth batch
        raise KeyError("dog")
    return [-len(text) for text in candidates]
"""
    file.write_text(right)
    run(started, tmp_path / "whole", f"{file}:short chair:-1")
    file.write_text(wrong)
    stderr = run(started, tmp_path / "out", f"{file}:short chair:-1", fails=True).stderr
    assert f"reward: {file}:short failed: KeyError: 'dog' ({file} line 6)" in stderr
    assert "Traceback" not in stderr
    saved = tmp_path / "out/checkpoint-2"
    file.write_text(right)
    stderr = run(started, tmp_path / "out", f"{file}:short chair:-1", fails=True).stderr
    assert f"reward: {file} is not as it was when the run in" in stderr
    run(started, tmp_path / "out", f"{file}:short chair:-1", resume_from_checkpoint=saved)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert equal_weights(tmp_path / "out", tmp_path / "whole")


def test_where_one_process_fails_all_stop_at_a_checkpoint_and_one_says_why(started, tmp_path):
    file = tmp_path / "mine.py"
    right = "def short(candidates):\n    return [-len(text) for text in candidates]\n"
    wrong = """
import os
calls = []
def short(candidates):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 5:
        raise KeyError("dog")
    return [-len(text) for text in candidates]
"""
    both = {"objective": "grpo", "per_device_train_batch_size": 1, "processes": 2}
    file.write_text(right)
    run(started, tmp_path / "whole", f"{file}:short", **both)
    file.write_text(wrong)
    stderr = run(started, tmp_path / "out", f"{file}:short", fails=True, **both).stderr
    assert stderr.count(f"train.py: reward: {file}:short failed: KeyError: 'dog' ({file} line 7)") == 1
    assert stderr.count("train.py: ") == 1
    assert "Traceback" not in stderr
    saved = tmp_path / "out/checkpoint-4"
    assert stderr.count(f"saved {saved}: the same command resumes from there") == 1
    file.write_text(right)
    run(started, tmp_path / "out", f"{file}:short", resume_from_checkpoint=saved, **both)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert equal_weights(tmp_path / "out", tmp_path / "whole")


def test_an_async_reward_waits_while_the_captions_of_the_next_batch_are_drawn(started, tmp_path):
    """The first batch's value is there only when the second batch has been drawn: `drawn` is called at once, for each."""
    file = tmp_path / "mine.py"
    file.write_text("""
import time
from pathlib import Path
batches, second = [], Path(__file__).with_name("second")
def drawn(candidates):
    batches.append(1)
    if len(batches) == 2:
        second.touch()
    return [0] * len(candidates)
async def waiting(candidates):
    end = time.monotonic() + 20
    while not second.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return [float(second.exists())] * len(candidates)
""")
    run(started, tmp_path / "out", f"{file}:drawn {file}:waiting", objective="grpo", max_steps=1, num_iterations=1)
    assert losses(tmp_path / "out")[1][1] == 1


CAPTIONS_OF = {"1": ["a dog", "a dog", "a cat"], "2": ["a cow", "two cows", "a hen"]}


def judge(tmp_path, server, kind):
    rows = [
        {"image_id": "1", "question": q, "choices": ["yes", "no"], "answer": "yes"} for q in ("a dog?", "on grass?")
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    file = str(tmp_path / "q.json") if kind == "multiple_choice" else None
    return JudgeReward(
        JudgeArguments(judge=kind, llm="openai:m", base_url=server.url, questions=file, max_retries=0), tmp_path
    )


def ask(reward):
    images = [image for image in CAPTIONS_OF for _ in range(3)]
    return reward([text for texts in CAPTIONS_OF.values() for text in texts], [["a dog"]] * 6, images)


def test_questions_are_asked_about_each_candidate_and_an_image_without_any_has_no_opinion(tmp_path, caplog):
    def answer(prompt, request):
        caption, question = re.search(r"description:\n(.*)\n\nQuestion about the image: (.*)\n", prompt).groups()
        if question == "a dog?":
            return re.search(rf"(.)\. {'yes' if 'dog' in caption else 'no'}\n", prompt)[1]
        return "I do not know." if "cat" in caption else re.search(r"(.)\. no\n", prompt)[1]

    with LLMServer(answer) as server:
        # Of the cat's two answers the second cannot be read: the other one counts.
        assert ask(judge(tmp_path, server, "multiple_choice")) == [0.5, 0.5, 0.0, None, None, None]
        assert len(server.paid) == 4
        assert "answers of the judge that cannot be read are no opinion" in caplog.text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Sorry.", "none of the judge's answers can be read, such as 'Sorry"),
        ((503, {}, {}), "the server of m answered 503"),
    ],
)
def test_answers_that_cannot_be_read_or_do_not_come_are_no_reward_of_zero(answer, said, tmp_path):
    with LLMServer(lambda prompt, request: answer) as server, pytest.raises(UserError, match=said):
        ask(judge(tmp_path, server, "clair"))

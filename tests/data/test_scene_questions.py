"""Questions about scenes, and the judge that answers them from captions: what a language model would be asked, and its answers."""

import json
import random
import threading

import pytest

from arguments import JudgeArguments
from drawn_scenes.drawing import describe, make_facts
from drawn_scenes.questions import Handler, Server, answer, questions_of, write_questions
from rewriting.judging import JudgeReward

SCENE = {
    "objects": [
        {"count": 2, "size": "small", "colour": "red", "shape": "star"},
        {"count": 1, "size": "large", "colour": "blue", "shape": "ring"},
    ],
    "relations": [[0, "above", 1]],
}
# A caption, and how many of the scene's seven questions it answers rightly.
CAPTIONS = {
    "Two tiny red stars over a huge blue ring": 7,
    "A big blue hoop below two red stars": 6,  # no size of the stars
    "Three small red stars to the left of a large blue ring": 5,
    "Two small red stars": 3,
    "A large blue ring above two small red stars": 6,
    "Two small red stars above a small red star": 0,  # which stars are meant is not clear
    "A picture": 0,
}


def test_every_reference_answers_every_question_about_its_scene():
    chance, kinds = random.Random(0), set()
    for _ in range(100):
        facts = make_facts("train", chance)
        asked = questions_of(facts)
        kinds |= {tuple(row["choices"]) for row in asked}
        assert len(asked) == len({row["question"] for row in asked}) == 7
        for caption in describe(facts, chance):
            assert [answer(caption, row["question"]) for row in asked] == [row["answer"] for row in asked], caption
    assert len(kinds) == 5


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_answers_what_it_states(caption):
    asked = questions_of(SCENE)
    assert sum(answer(caption, row["question"]) == row["answer"] for row in asked) == CAPTIONS[caption]


def test_the_judge_asks_the_server_and_its_reward_is_the_share_of_right_answers(tmp_path):
    file = tmp_path / "folder/questions.jsonl"
    write_questions(file, {"image_id": ["s"], "facts": [json.dumps(SCENE)]}, each=7)
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    arguments = JudgeArguments(judge="multiple_choice", llm="openai:facts", base_url=url, questions=str(file))
    try:
        rewards = JudgeReward(arguments, tmp_path)([*CAPTIONS], [["a star"]] * len(CAPTIONS), ["s"] * len(CAPTIONS))
    finally:
        server.shutdown()
        server.server_close()
    assert rewards == pytest.approx([right / 7 for right in CAPTIONS.values()])

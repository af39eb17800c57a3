"""The share of the questions about a scene that its caption answers rightly, for scenes.yaml: recipes/judges/rewards.py, set."""

import functools
from pathlib import Path

from arguments import JudgeArguments
from rewriting.judging import JudgeReward


async def questions(candidates, references, image_ids, output_dir):
    return judge(output_dir)(candidates, references, image_ids)


@functools.cache
def judge(output_dir):
    server = {"llm": "openai:facts", "base_url": "http://127.0.0.1:8899/v1", "concurrency": 8, "max_retries": 4}
    arguments = JudgeArguments(judge="multiple_choice", questions="runs/questions.jsonl", **server)
    return JudgeReward(arguments, Path(output_dir))

"""Language models as rewards. Copy this file, set what is in capitals, and name a function of the copy in --reward:

    python train.py --objective grpo --reward "cider judge.py:questions:2" ...

clair asks how likely a caption and its references are of one image; questions asks what QUESTIONS has about the image, to be
answered from the caption alone. Prompts are those beside this file, or a JUDGE_PROMPT of yours; what else a judge takes is in
JudgeArguments of arguments.py.
"""

import functools
from pathlib import Path

from arguments import JudgeArguments
from rewriting.judging import JudgeReward

LLM = "openai:Qwen/Qwen2.5-7B-Instruct"  # on a server; hf:MODEL is loaded here, beside what is trained
SERVER = {"base_url": "http://localhost:8000/v1", "concurrency": 32, "timeout": 120.0, "max_retries": 10}
QUESTIONS = "questions.jsonl"  # image_id, question, choices, answer
JUDGE_PROMPT = None


async def clair(candidates, references, image_ids, output_dir):
    return judge("clair", None, output_dir)(candidates, references, image_ids)


async def questions(candidates, references, image_ids, output_dir):
    return judge("multiple_choice", QUESTIONS, output_dir)(candidates, references, image_ids)


@functools.cache
def judge(name, file, output_dir):
    arguments = JudgeArguments(judge=name, llm=LLM, questions=file, judge_prompt=JUDGE_PROMPT, **SERVER)
    return JudgeReward(arguments, Path(output_dir))

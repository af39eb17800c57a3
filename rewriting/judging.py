"""Asks a language model about captions: each question once, whatever fails; answers are kept, and a stopped run resumes."""

import hashlib
import itertools
import json
import logging
import time
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.logs import say_once
from common.processes import processes, show_progress
from data.caption_files import load_predictions
from jobs.chat_server import cost_of
from jobs.journal import Journal
from metrics.coco_caption.coco import resampled_scores
from metrics.judges import Clair, MultipleChoice, Pairwise
from rewriting.backends import Job, open_backend
from rewriting.prompts import fill, load_prompt

logger = logging.getLogger(__name__)
ATTEMPTS = 3


def load_judges(args, folder: Path) -> list["Judge"]:
    """The judge that JudgeArguments ask for, or none. UserError where its files or its server's settings are wrong."""
    return [Judge(args, args.llm_arguments(), folder)] if args.judge else []


class Judge:
    """Scores captions by one of the judges of metrics/judges.py. `args`: JudgeArguments; `llm_args`: LLMArguments. `failure`
    says why it could not finish.

    Its journal is judge_NAME.jsonl in `folder`: a line per answer, under a digest of all that it depends on (the model, the
    prompt as sent, the request's settings), so that it never answers another question, and equal questions are asked once.
    """

    def __init__(self, args, llm_args, folder: Path):
        self.kind = {
            "clair": Clair,
            "multiple_choice": lambda: MultipleChoice(args.questions),
            "pairwise": lambda: Pairwise(load_predictions(args.judge_against)),
        }[args.judge]()
        self.args, self.llm_args, self.failure = args, llm_args, None
        self.path = folder / f"judge_{args.judge}.jsonl"
        self.prompt = load_prompt(self.kind.task, args.judge_prompt)
        self.llm = open_backend(args.llm, llm_args)

    def scores(self, predictions: dict, references: dict, *, bootstrap_samples: int, seed: int) -> tuple[dict, dict]:
        """(metrics, {score: (images,)}): the mean and its interval, and under "judges" the model, prompt, tokens, cost, and
        the share of answers that could not be read; NaN for images without questions."""
        try:
            questions = self.kind.questions(predictions, references)
            if not questions:
                raise UserError("questions: none of its images is among those that are scored.")
            rows = self.answers(questions)
        except UserError as error:  # the other scores must not be lost to it
            self.failure = f"{self.kind.name} is missing: {error}"
            logger.warning("%s", self.failure)
            return {self.kind.name: None, "intervals": {}, "unavailable": {self.kind.name: str(error)}}, {}
        of_image: dict[str, list[float]] = {}
        for question, row in zip(questions, rows, strict=True):
            value = question.read(row["text"])
            of_image.setdefault(question.image, []).append(self.kind.worst if value is None else min(value, 1.0))
        values = np.array([self.kind.score(of_image[i]) if i in of_image else np.nan for i in references])
        name, known = self.kind.name, values[~np.isnan(values)]
        metrics = {name: float(known.mean()), "intervals": {}, "judges": {name: self.record(questions, rows)}}
        if bootstrap_samples:
            resampled = resampled_scores({name: values}, bootstrap_samples, seed)[name]
            metrics["intervals"] = {name: np.percentile(resampled, [2.5, 97.5]).tolist()}
        return metrics, {name: values}

    def asked(self, questions: list) -> tuple[list[str], list[str]]:
        """(prompts, their keys in the journal) of questions."""
        prompts = [fill(self.prompt, question.fields) for question in questions]
        return prompts, list(map(self.key, prompts))

    def answers(self, questions: list) -> list[dict]:
        """The journal's row of each question; those that have none are asked."""
        prompts, keys = self.asked(questions)
        with Journal(self.path) as journal:
            kept = {row["key"]: row for row in journal.rows}
            finished, left = self.ask(keys, prompts, questions, kept), len({*keys} - kept.keys())
            for row in show_progress(finished, left, f"judge: {self.kind.task}"):
                journal.add(row)
                kept[row["key"]] = row
        return [kept[key] for key in keys]

    def ask(self, keys: list[str], prompts: list[str], questions: list, kept: dict):
        """Yields a row for each different key that is not in `kept`."""
        first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
        left = sorted(first[key] for key in first.keys() - kept.keys())
        jobs = (Job(n, keys[n], [], prompts[n], self.llm.tokens.encode(prompts[n])) for n in left)
        for job, outcome in self.llm.run(jobs, lambda job, text, ended: self.fault(questions[job.row], text)):
            row = {"key": job.digest, "image_id": questions[job.row].image, "text": outcome.text}
            row |= {"attempts": outcome.attempts, "tokens": [outcome.tokens_in, outcome.tokens_out]}
            yield row | {"refused": outcome.reason == "server_refused", "time": round(time.time())}

    def key(self, prompt: str) -> str:
        settings = json.dumps([self.args.llm, self.llm.settings(), prompt], ensure_ascii=False)
        return hashlib.sha256(settings.encode("utf-8", "replace")).hexdigest()[:24]

    @staticmethod
    def fault(question, text: str) -> str | None:
        return "unreadable" if question.read(text) is None else None

    def record(self, questions: list, rows: list[dict]) -> dict:
        distinct = {row["key"]: row for row in rows}.values()
        tokens = [sum(row["tokens"][side] for row in distinct) for side in (0, 1)]
        values = [question.read(row["text"]) for question, row in zip(questions, rows, strict=True)]
        unreadable, above = values.count(None), sum(value is not None and value > 1 for value in values)
        if unreadable:
            logger.warning(
                "%d of %d answers of the judge could not be read, after %d calls", unreadable, len(rows), ATTEMPTS
            )
        return {
            "llm": self.args.llm,
            "prompt": str(self.args.judge_prompt or f"recipes/judges/{self.kind.task}.txt"),
            "prompt_sha256": self.prompt.sha256,
            "settings": self.llm.settings(),
            "questions": len(questions),
            "calls": sum(row["attempts"] for row in distinct),
            "unreadable": unreadable / len(rows),
            "above_100": above / len(rows),  # counted as 100
            "tokens": {"prompts": tokens[0], "written": tokens[1]},
            "cost": cost_of(*tokens, self.llm_args.price_in, self.llm_args.price_out),
        }


class JudgeReward(Judge):
    """A judge as a reward of one's own (objectives/own_reward.py), as in recipes/judges/rewards.py. `args`: JudgeArguments.

    All captions of a batch are asked about together, `concurrency` at a time, and equal requests once: answers are kept in
    reward_NAME.jsonl in `folder`, the run's (reward_NAME_1.jsonl of its second process, ...). A server that fails, or answers of
    which none can be read, raise a UserError, which stops the run.
    """

    def __init__(self, args, folder: Path):
        super().__init__(args, args.llm_arguments(), folder)
        rank = processes().process_index
        self.journal = Journal(folder / f"reward_{args.judge}{f'_{rank}' if rank else ''}.jsonl")
        self.kept = {row["key"]: row["text"] for row in self.journal.rows}
        self.journal.rows.clear()

    def __call__(self, candidates: list[str], references: list[list[str]], image_ids: list[str]) -> list[float | None]:
        """The score of each candidate, 0 to 1; None without a question about its image, or an answer that can be read."""
        rows = zip(candidates, references, image_ids, strict=True)
        of_each = [self.kind.questions({image: text}, {image: texts}) for text, texts, image in rows]
        questions = list(itertools.chain.from_iterable(of_each))
        prompts, keys = self.asked(questions)
        for row in self.ask(keys, prompts, questions, self.kept):
            self.journal.add(row)
            self.kept[row["key"]] = row["text"]
        values = [question.read(self.kept[key]) for question, key in zip(questions, keys, strict=True)]
        if set(values) == {None}:
            raise UserError(f"none of the judge's answers can be read, such as {self.kept[keys[0]][:80]!r}.")
        if None in values:
            say_once(logger, "answers of the judge that cannot be read are no opinion, and count as a reward of 0")
        each, scores = iter(values), []
        for of_one in of_each:
            read = [min(value, 1.0) for value in itertools.islice(each, len(of_one)) if value is not None]
            scores.append(self.kind.score(read) if read else None)
        return scores

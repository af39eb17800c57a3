"""Judges of captions: what a language model is asked about a caption, and how its answers become scores.

clair             how likely the caption and the references are of one image, 0 to 100 (Chan et al., "CLAIR", 2023)
multiple_choice   questions about the image, answered from the caption alone (the way of CaptionQA)
pairwise          which of two captions is better, in both orders (the way of CapArena, here with references for the image)

Who asks, and keeps the answers: rewriting/judging.py. The prompts: recipes/judges/.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data.text_rows import ENDINGS, table_objects

NUMBER = re.compile(r"\d*\.?\d+")
CANNOT_TELL = "The description does not say."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One request: of which image, the prompt's fields, and what an answer is worth, 0 to 1; None if it cannot be read."""

    image: str
    fields: dict
    read: Callable[[str], float | None]


def clair_score(answer: str) -> float | None:
    """The score of one answer, as in CLAIR's published code: of the JSON from the first { to the next { or }, else the first
    number, times 100 if it is below 1; divided by 100. None if there is no number."""
    _, brace, body = answer.partition("{")
    if brace:
        try:
            return float(json.loads("{" + re.split("[{}]", body)[0] + "}")["score"]) / 100
        except (ValueError, KeyError, TypeError):
            pass
    number = NUMBER.search(answer)
    if number is None:
        return None
    value = float(number[0])
    return (value * 100 if value < 1 else value) / 100


def choice(answer: str, choices: list[str]) -> int | None:
    """Which of the lettered choices an answer names: by a letter alone or first or after the word answer, or by its words."""
    letters = LETTERS[: len(choices)]
    text = answer.strip().strip("*").strip()
    for place, words in enumerate(choices):
        if text.rstrip(".").lower() == words.rstrip(".").lower():
            return place
    for pattern in (
        rf"\(?([{letters}])\)?(?:[.:),]|$)",
        rf".*\banswer(?: is)?:? *\(?\**([{letters}])\b",
        rf".*\(([{letters}])\)",
    ):
        if match := re.match(pattern, text, re.DOTALL | (re.IGNORECASE if "answer" in pattern else 0)):
            return letters.index(match[1].upper())
    return None


def preference(answer: str) -> float | None:
    """1 for the first of two captions, 0 for the second, a half for neither; None if the answer names none or both."""
    named = set(re.findall(r"\b(?:1|2|tie)\b", answer.lower()))
    return {"1": 1.0, "2": 0.0, "tie": 0.5}[named.pop()] if len(named) == 1 else None


def _lines(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


class Clair:
    name, task, worst = "CLAIR", "clair", 0.0

    def questions(self, predictions: dict, references: dict) -> list[Question]:
        return [
            Question(image, {"candidate": predictions[image], "references": _lines(texts)}, clair_score)
            for image, texts in references.items()
        ]

    def score(self, values: list[float]) -> float:
        return values[0]


class MultipleChoice:
    """`of_image`: {image: [{"question", "choices", "answer"}]}. Choices are put in an order of their own for each question."""

    name, task, worst = "caption_qa", "multiple_choice", 0.0

    def __init__(self, file: str):
        self.of_image = read_questions(file)

    def questions(self, predictions: dict, references: dict) -> list[Question]:
        asked = []
        for image in references:
            for row in self.of_image.get(image, ()):
                choices = [*row["choices"]]
                random.Random(f"{image} {row['question']}").shuffle(choices)
                right = choices.index(row["answer"])
                choices.append(CANNOT_TELL)
                lines = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
                fields = {"caption": predictions[image], "question": row["question"], "choices": lines}
                asked.append(Question(image, fields, _is_right(choices, right)))
        return asked

    def score(self, values: list[float]) -> float:
        return sum(values) / len(values)


def _is_right(choices: list[str], right: int) -> Callable[[str], float | None]:
    def read(answer: str) -> float | None:
        chosen = choice(answer, choices)
        return None if chosen is None else float(chosen == right)

    return read


class Pairwise:
    """`others`: {image: caption} of the system to compare with. A caption wins where both orders prefer it."""

    name, task, worst = "win_rate", "pairwise", 0.5

    def __init__(self, others: dict[str, str]):
        self.others = others

    def questions(self, predictions: dict, references: dict) -> list[Question]:
        asked = []
        for image, texts in references.items():
            if image not in self.others:
                raise UserError(f"judge_against: there is no caption of image {image!r}.")
            pair = predictions[image], self.others[image]
            for first, second, read in ((*pair, preference), (*pair[::-1], _of_the_second)):
                asked.append(Question(image, {"first": first, "second": second, "references": _lines(texts)}, read))
        return asked

    def score(self, values: list[float]) -> float:
        """1 or 0 where both orders agree; a half where they contradict each other, or a tie is among them."""
        return values[0] if len(set(values)) == 1 else 0.5


def _of_the_second(answer: str) -> float | None:
    value = preference(answer)
    return None if value is None else 1 - value


def read_questions(file: str) -> dict[str, list[dict]]:
    """{image: its questions} of a table with image_id, question, choices (a list, or texts with | between) and answer, a
    choice or its letter. UserError names the line of a row that is not so."""
    path, questions = Path(file), {}
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"questions: {file} is not a JSON, JSON lines, CSV or TSV file.")
    for row, where in table_objects(path):
        if not isinstance(row, dict) or not {"image_id", "question", "choices", "answer"} <= row.keys():
            raise UserError(f"questions: {path}, {where}: expected image_id, question, choices and answer.")
        choices = row["choices"].split("|") if isinstance(row["choices"], str) else row["choices"]
        choices, answer = [str(text).strip() for text in choices or ()], str(row["answer"]).strip()
        if answer not in choices and answer in LETTERS[: len(choices)] and answer:
            answer = choices[LETTERS.index(answer)]
        if not 2 <= len(choices) < len(LETTERS) or choices.count(answer) != 1:
            raise UserError(f"questions: {path}, {where}: the answer {answer!r} is not one of the choices {choices}.")
        question = {"question": str(row["question"]), "choices": choices, "answer": answer}
        questions.setdefault(str(row["image_id"]), []).append(question)
    return questions

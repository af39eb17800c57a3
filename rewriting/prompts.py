"""Prompts: files with fields, filled with a row's captions and shortened until they fit."""

import hashlib
import itertools
import re
import string
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common.errors import UserError
from common.text import read_text

FIELDS = {
    "paragraph": ("captions",),
    "fuse": ("raw", "synthetic"),
    "clair": ("candidate", "references"),
    "multiple_choice": ("caption", "question", "choices"),
    "pairwise": ("first", "second", "references"),
}
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PROMPT_FILES = {"paragraph": RECIPES / "instruct/prompt.txt", "fuse": RECIPES / "capsfusion/prompt.txt"}
PROMPT_FILES |= {judge: RECIPES / f"judges/{judge}.txt" for judge in ("clair", "multiple_choice", "pairwise")}


@dataclass
class Prompt:
    template: str
    sha256: str  # of the template, first 12 hex digits


def load_prompt(task: str, path: str | None = None) -> Prompt:
    """A prompt file: comment lines (#) at its top, then the prompt with each field of the task in braces.

    Raises:
        ValueError: a field is missing or unknown; a literal brace is written twice, {{ or }}.
    """
    file = Path(path) if path else PROMPT_FILES[task]
    lines = itertools.dropwhile(lambda line: line.startswith("#"), read_text(file).splitlines())
    template = "\n".join(lines).strip()
    try:
        list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{file}: {error}. Write a brace that is not a field twice: {{{{ or }}}}.") from None
    fields = re.findall(r"\{[^{}]*\}", template.replace("{{", "").replace("}}", ""))
    expected = [f"{{{name}}}" for name in FIELDS[task]]
    unknown, missing = sorted(set(fields) - set(expected)), sorted(set(expected) - set(fields))
    if unknown or missing:
        fault = f"{unknown[0]} is not a field" if unknown else f"the field {missing[0]} is missing"
        raise UserError(f"{file}: {fault}. A prompt for '{task}' has {' '.join(expected)}, and no other braces.")
    return Prompt(template, hashlib.sha256(template.encode()).hexdigest()[:12])


class Pieces:
    """Stands in for a tokenizer where there is none: pieces of text that are rarely longer than a token."""

    PIECE = re.compile(r"\s?[^\W_]{1,4}|\s?[\W_]")

    def __call__(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.PIECE.findall(text))

    def decode(self, pieces: list[str]) -> str:
        return "".join(pieces)


class Tokens:
    """Counts and cuts text in an LLM's tokens or, without its tokenizer, in Pieces.

    Args:
        tokenizer: a transformers tokenizer, or None.
        chat: wrap prompts in the tokenizer's chat template.
    """

    def __init__(self, tokenizer=None, chat: bool = False):
        self.tokenizer, self.chat = Pieces() if tokenizer is None else tokenizer, chat

    def encode(self, prompt: str) -> list:
        """Tokens of a whole prompt as the model gets it, with start token and chat template."""
        if not self.chat:
            return self.pieces(prompt, add_special_tokens=True)
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    def pieces(self, text: str, add_special_tokens: bool = False) -> list:
        return self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    def cut(self, text: str, length: int) -> str:
        """The first `length` tokens of a text, or as many more as are needed for it not to be blank."""
        pieces = self.pieces(text)
        for end in range(max(1, length), len(pieces)):
            if (
                piece := self.tokenizer.decode(pieces[:end]).rstrip("\ufffd").strip()
            ):  # half of a letter's bytes decode to U+FFFD
                return piece
        return text


def fill(prompt: Prompt, inputs: dict) -> str:
    """The prompt of one row. `inputs` are {"captions": [str, ...]}, {"raw": str, "synthetic": str} or a judge's."""
    values = dict(inputs)
    if "captions" in inputs:
        values["captions"] = "\n".join(f"- {caption}" for caption in inputs["captions"])
    return prompt.template.format(**values)


def fit(prompt: Prompt, inputs: dict, tokens: Tokens, limit: int) -> tuple[str, list]:
    """(prompt, its tokens) of one row in at most `limit` tokens.

    Captions that are too long are cut by tokens, never to nothing: the raw one first, the synthetic one only when the
    raw one is down to one token; of several captions always the longest.

    Raises:
        ValueError: the prompt without captions leaves no room.
    """
    texts = {name: [value] if isinstance(value, str) else list(value) for name, value in inputs.items()}
    while True:
        text = fill(prompt, {name: value if name == "captions" else value[0] for name, value in texts.items()})
        ids = tokens.encode(text)
        excess = len(ids) - limit
        if excess <= 0:
            return text, ids
        if not any(_cut_one(captions, tokens, excess) for captions in texts.values()):
            raise UserError(
                f"The prompt alone takes {len(tokens.encode(prompt.template))} tokens, which leaves no room for captions "
                f"in --max_prompt_tokens {limit}. Raise it, or shorten the prompt file."
            )


def _cut_one(captions: list[str], tokens: Tokens, excess: int) -> bool:
    """Cut the longest of the captions by `excess` tokens, or to its first; returns whether it could be cut."""
    lengths = [len(tokens.pieces(caption)) for caption in captions]
    longest = lengths.index(max(lengths))
    before = captions[longest]
    captions[longest] = tokens.cut(before, lengths[longest] - excess)
    return captions[longest] != before

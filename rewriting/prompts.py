"""Prompts: files with fields, filled with a row's captions and shortened until they fit."""

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.text import read_text

FIELDS = {"paragraph": ("captions",), "fuse": ("raw", "synthetic")}
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PROMPT_FILES = {"paragraph": RECIPES / "instruct/prompt.txt", "fuse": RECIPES / "capsfusion/prompt.txt"}


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
    lines = read_text(file).splitlines()
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    template = "\n".join(lines).strip()
    wanted = FIELDS[task]
    try:
        fields = [(name, spec or conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"{file}: {error}. Write a brace that is not a field twice: {{{{ or }}}}.") from None
    names = [name for name, _ in fields if name is not None]
    wrong = [name for name, extra in fields if name is not None and (name not in wanted or extra)]
    missing = [name for name in wanted if name not in names]
    if wrong or missing:
        expected = " ".join(f"{{{name}}}" for name in wanted)
        what = f"{{{wrong[0]}}} is not a field" if wrong else f"the field {{{missing[0]}}} is missing"
        raise UserError(f"{file}: {what}. A prompt for '{task}' has {expected}, and no other braces.")
    return Prompt(template, hashlib.sha256(template.encode()).hexdigest()[:12])


class Tokens:
    """Counts and cuts text in an LLM's tokens or, without its tokenizer, in pieces that are rarely longer than a token.

    Args:
        tokenizer: a transformers tokenizer, or None.
        chat: wrap prompts in the tokenizer's chat template.
    """

    PIECE = re.compile(r"\s?[^\W_]{1,4}|\s?[\W_]")

    def __init__(self, tokenizer=None, chat: bool = False):
        self.tokenizer, self.chat = tokenizer, chat

    def encode(self, prompt: str) -> list:
        """Tokens of a whole prompt as the model gets it, with start token and chat template."""
        if self.tokenizer is None:
            return self.PIECE.findall(prompt)
        if not self.chat:
            return self.tokenizer(prompt).input_ids
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    def pieces(self, text: str) -> list:
        if self.tokenizer is None:
            return self.PIECE.findall(text)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def cut(self, text: str, length: int) -> str:
        """The first `length` tokens of a text, or as many more as are needed for it not to be blank."""
        pieces = self.pieces(text)
        for end in range(max(1, length), len(pieces)):
            piece = "".join(pieces[:end]) if self.tokenizer is None else self.tokenizer.decode(pieces[:end])
            if piece := piece.rstrip("\ufffd").strip():  # half of a letter's bytes decode to U+FFFD
                return piece
        return text


def fill(prompt: Prompt, inputs: dict) -> str:
    """The prompt of one row. `inputs` are {"captions": [str, ...]} or {"raw": str, "synthetic": str}."""
    values = {
        name: value if isinstance(value, str) else "\n".join(f"- {c}" for c in value) for name, value in inputs.items()
    }
    return prompt.template.format(**values)


def fit(prompt: Prompt, inputs: dict, tokens: Tokens, limit: int) -> tuple[str, list]:
    """(prompt, its tokens) of one row in at most `limit` tokens.

    Captions that are too long are cut by tokens, never to nothing: the raw one first, the synthetic one only when the
    raw one is down to one token; of several captions always the longest.

    Raises:
        ValueError: the prompt without captions leaves no room.
    """
    text = fill(prompt, inputs)
    ids = tokens.encode(text)
    if len(ids) <= limit:
        return text, ids
    inputs = {name: value if isinstance(value, str) else list(value) for name, value in inputs.items()}
    while len(ids) > limit:
        if "captions" in inputs:
            captions = inputs["captions"]
            where, key = captions, max(range(len(captions)), key=lambda i: len(tokens.pieces(captions[i])))
        else:
            where, key = inputs, "raw" if len(tokens.pieces(inputs["raw"])) > 1 else "synthetic"
        before = where[key]
        where[key] = tokens.cut(before, len(tokens.pieces(before)) - (len(ids) - limit))
        if where[key] == before and key == "raw":
            where, key, before = inputs, "synthetic", inputs["synthetic"]
            where[key] = tokens.cut(before, len(tokens.pieces(before)) - (len(ids) - limit))
        if where[key] == before:
            raise UserError(
                f"The prompt alone takes {len(tokens.encode(prompt.template))} tokens, which leaves no room for captions "
                f"in --max_prompt_tokens {limit}. Raise it, or shorten the prompt file."
            )
        text = fill(prompt, inputs)
        ids = tokens.encode(text)
    return text, ids

"""Checks of texts that an LLM wrote: a one-word reason to reject a text, or None."""

import re
from difflib import SequenceMatcher

from metrics.coco_caption.text_checks import illegal_characters, repetition, scripts, words
from rewriting.prompts import Prompt

REASONS = {
    "empty": "nothing was written",
    "cut_off": "the text breaks off, or begins mid-sentence",
    "illegal": "characters that do not belong in text",
    "refusal": "the LLM refuses, or talks about itself",
    "chatter": "an introduction before the text, or lists and markup",
    "prompt_leak": "wording of the prompt, or talk about its sentences",
    "language": "not the wanted language or script",
    "repetition": "a word, phrase or sentence over and over",
    "copy": "a copy of one input, or all of them one after the other",
    "server_refused": "the server rejected the prompt, or its answer was filtered",
    "no_input": "a caption to rewrite is empty; the LLM was not asked",
}
REFUSAL = re.compile(
    r"\b(as an? (ai|artificial|language model)|(i'?m|i am) (sorry|unable|not able|just an)|i apologi[sz]e|"
    r"i (cannot|can ?not|can'?t|do not|don'?t|need more|would need)|please provide|"
    r"(not|im)possible to (combine|merge|create|write|determine)|(cannot|can not|could not) be (combined|merged)|"
    r"(there is|has|have) (no|not) enough (information|context)|no (relevant|clear) (information|connection))\b",
    re.IGNORECASE,
)
CHATTER = re.compile(
    r"^\s*((sure|certainly|of course|okay|ok)\b\s*[,.!:]|(here('s| is| are)|this is|the (merged|combined|refined|new))\b[^.:]{0,60}:|"
    r"(new sentence|paragraph|output|answer|caption|description)\s*:)|^\s*([-*•#]|\d+[.)])\s|```|\*\*",
    re.IGNORECASE,
)
THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
END = tuple(".!?…。！？") + tuple("\"'”’)]»")
HEADLESS = re.compile(r"[,;:)(]|[a-z]+[\s,;:]")  # but "iPhone", "www.x.org"
ENGLISH = set(
    words(
        "a an the and or but of in on at to for from with by as is are was were be been has have had this that these those it "
        "its his her their he she they which who while where when into over under near up down out off not no one two there "
        "you your all can will for how what if so"
    )
)
COMMON = ENGLISH | set(words("them given provides provided please may contain simply ensuring yet new"))


def tidy(text: str) -> str:
    """The answer on one line, without a reasoning model's thinking and without quotes around the whole text."""
    text = " ".join(THINKING.sub(" ", text).split())
    for left, right in ('""', "“”", "''"):
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            text = inner.strip()
    return text


class Checker:
    """Finds what is wrong with the texts of one prompt.

    `prompt_leak` is derived from the prompt itself, so it also works for a user's own: a compound ("real-world"), three
    words in a row of which two carry meaning, a label before a field ("Sentence 1"), or the prompt's name for its
    inputs (sentence, caption, description), if the text has it and none of its inputs does.

    Args:
        language: "en" or "any".
    """

    def __init__(self, prompt: Prompt, language: str = "en"):
        fixed = re.sub(r"\{\w+\}", " ", prompt.template)
        tokens = words(fixed)
        self.english = language == "en"
        self.compounds = {c.lower() for c in re.findall(r"\b[^\W\d_]+(?:-[^\W\d_]+)+\b", fixed)}
        self.compounds |= {compound.replace("-", " ") for compound in self.compounds}
        self.phrases = {
            three
            for three in zip(tokens, tokens[1:], tokens[2:], strict=False)
            if sum(word not in COMMON for word in three) >= 2
        }
        labels = re.findall(r"^([^\n:{}]{3,40}):\s*(?:\{|$)", prompt.template, re.MULTILINE)
        self.labels = {" ".join(words(label)) for label in labels}
        self.names = {"sentence", "caption", "description"} & {word.removesuffix("s") for word in tokens}

    def fault(self, text: str, inputs: list[str], finished: bool = True) -> str | None:
        """The first of REASONS that applies to a tidied text, or None.

        Args:
            inputs: the captions that it was made from.
            finished: False if the LLM stopped at the limit of new tokens.
        """
        if not words(text):
            return "empty"
        if illegal_characters(text):
            return "illegal"
        if REFUSAL.search(text):
            return "refusal"
        if CHATTER.search(text):
            return "chatter"
        if self.leaked(text, inputs):
            return "prompt_leak"
        if repetition(text) and not any(repetition(caption) for caption in inputs):
            return "repetition"
        if not finished or not text.endswith(END) or HEADLESS.match(text):
            return "cut_off"
        if self.foreign(text, inputs):
            return "language"
        if copied(text, inputs):
            return "copy"
        return None

    def leaked(self, text: str, inputs: list[str]) -> str | None:
        """Wording of the prompt that the text has and none of its inputs does."""
        lower, tokens = text.lower(), words(text)
        given = " ".join(inputs).lower()
        for compound in self.compounds:
            if compound in lower and compound not in given:
                return compound
        given = f" {' '.join(words(given))} "
        for three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if three in self.phrases and " ".join(three) not in given:
                return " ".join(three)
        spaced = f" {' '.join(tokens)} "
        for label in self.labels:
            if f" {label} " in spaced and label not in given:
                return label
        for token in tokens:
            if token.removesuffix("s") in self.names and token.removesuffix("s") not in given:
                return token
        return None

    def foreign(self, text: str, inputs: list[str]) -> bool:
        """Whether a text has letters of a script that no input has; with language en, also more letters of other scripts
        than Latin ones, or eight or more words without a single English function word."""
        found = scripts(text)
        if not text.isascii():
            given = scripts(" ".join(inputs))
            if any(script not in given for script in found):
                return True
        if not self.english:
            return False
        tokens = words(text)
        return found["LATIN"] < 0.5 * sum(found.values()) or (len(tokens) >= 8 and not ENGLISH.intersection(tokens))


def copied(text: str, inputs: list[str]) -> bool:
    """Whether the text is one of several inputs (nine in ten words the same, in order) although the others say more, or
    all of them, one after the other, with no word between."""
    if len(inputs) < 2:
        return False
    written, given = words(text), [words(caption) for caption in inputs]
    spaced, total = f" {' '.join(written)} ", sum(map(len, given))
    if len(written) == total and all(f" {' '.join(caption)} " in spaced for caption in given):
        return True
    for number, caption in enumerate(given):
        shared = len(set(written) & set(caption))
        if shared < 0.8 * max(len(set(written)), len(set(caption))):
            continue
        others = {word for i, other in enumerate(given) if i != number for word in other}
        if others - set(caption) - ENGLISH and SequenceMatcher(None, written, caption, False).ratio() >= 0.9:
            return True
    return False

"""Checks of texts that an LLM wrote: a one-word reason to reject a text, or None."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

from common.text import read_text
from metrics.coco_caption.text_checks import REFUSAL, illegal_characters, pattern, repetition, scripts, words
from rewriting.prompts import Prompt

REASONS = {
    "empty": "nothing was written",
    "cut_off": "the text breaks off, or begins mid-sentence",
    "illegal": "characters that do not belong in text",
    "refusal": "the LLM refuses, or talks about itself",
    "chatter": "an introduction, label, note or closing around the text, or lists, markup and addresses",
    "prompt_leak": "wording of the prompt, or talk about its sentences",
    "language": "not the wanted language or script",
    "repetition": "a word, phrase or sentence over and over",
    "copy": "a copy of one input, or all of them one after the other",
    "unrelated": "nothing of what the captions say",
    "server_refused": "the server rejected the prompt, or its answer was filtered",
    "no_input": "a caption to rewrite is empty; the LLM was not asked",
}


# Wording counts only where no input has it: shirts say "I Can't", songs are called "I Don't Know".
TEXT = (
    r"(?:sentences?|captions?|paragraphs?|texts?|descriptions?|versions?|results?|outputs?|answers?|responses?|summary|"
    r"merger?|rewrite|combination|attempt)"
)
MADE = r"(?:merg|combin|fus|refin|rewr[io]t|revis|rephras|summari[sz]|remov|omit|kept|keep|includ|avoid|ma[dk]e|integrat|add)"
CHATTER = pattern(
    r"^(?:sure|certainly|of course|okay|ok|absolutely|definitely|great|perfect|alright|understood|got it|no problem|"
    r"yes|my pleasure|gladly)\b(?: thing)?\s*[,.!:]",
    rf"^(?:here['’]?s|here (?:is|are|you go|you are)|below is|the following is)\b[^.:!?]{{0,80}}?(?:\b{TEXT}\b|:\s)",
    rf"^(?:this|that) is\b[^.:!?]{{0,80}}?\b{TEXT}\b",
    rf"^(?:based on|given|using) (?:the|both|these)\b[^.!?]{{0,40}}\b(?:information|inputs?|{TEXT})\b",
    rf"^(?:the )?(?:new|merged|combined|fused|refined|final|rewritten|revised)\b[^.:!?]{{0,40}}\b{TEXT}\b[^.!?]{{0,20}}:",
    # A label: "### Response:", "Merged:", "Assistant:", "Option 1:"
    r"(?:^|[.!?\n]\s+|\()\W*(?:\w+\s){0,2}(?:sentence|caption|paragraph|text|description|title|version|results?|"
    r"output|answer|response|summary|rewrite|assistant|ai|user|human|merged|combined|fused|refined|final|rewritten|revised|"
    r"rephrased|notes?|explanation|reasoning|analysis|option \d|word count)(?:\s\d+)?\W{0,3}:(?!\d)",
    r"\b(?:let me know|feel free|hope (?:this|that) (?:helps|works)|happy to (?:help|assist|provide|create|merge)|"
    r"glad to (?:help|assist)|anything else|would you like|if you(?:['’]d like| need| want| would like| have any)|"
    r"please note|note that i\b|do you want me)",
    r"\bi(?:['’]ve| have|['’]ll| will| would)?(?: also)? " + MADE + r"\w*\b",
    r"(?:^|[.!?]\s+)(?:(?:thanks|thank you)\b[^.!?]{0,40}|enjoy|cheers|done)\s*[.!]\W*(?:\Z|\s)",
    r"\b(?:combining|merging|fusing|putting) (?:both|the two|these|them|everything|all)\b",
    r"^\s*(?:[-*•#>|]|\d+[.)])\s|^#{2,}|```|\*\*|__\w|\]\(|\s\|\s.*\s\|",
    r"</?[a-z][^<>]{0,80}>|<\|[^<>]*\|>|\[/?(?:inst|sys)\]|&(?:[a-z]{2,8}|#\d+);",
    r"\bhttps?://|\(\d+ words?\)|\[(?:insert|name|image|city|location|your)\b[^\]]*\]|\{\w+\}|\\n|^[\[{]\s*[\"'{]",
)
SPEAKERS = r"(?:people|observers|viewers|annotators|captions|descriptions|sentences|sources|inputs|accounts|texts)"
SEVERAL = r"(?:several|most|some|many|multiple|other|others|different|various|all|both|two|three|four|five|each|these|those|given|provided)"
TALK = pattern(
    rf"\b{SEVERAL} (?:of the |of these |other )?{SPEAKERS} (?:also |all )?(?:describe|say|said|mention|agree|note|report|state|indicate|suggest)\w*\b",
    rf"\baccording to (?:the )?(?:{SEVERAL} )?(?:of the )?{SPEAKERS}\b",
    rf"\bthe (?:two |given |provided |original |{SEVERAL} )?(?:captions|descriptions|sentences|inputs|prompts)\b",
    r"\b(?:first|second|third|other|another|original|previous|above|given|provided|synthetic|raw) (?:caption|sentence|input)s?\b",
    r"\bthe (?:sentence|description|input|prompt) (?:says|describes|mentions|states|provides|refers|talks)\b",
    r"\bthis (?:sentence|caption|paragraph|description|version)\b",
    r"\b(?:captions?|sentences?|inputs?|descriptions?) (?:\d|one|two|structure)\b|\bas (?:mentioned|described|stated|noted) above\b",
)
IDIOMS = pattern(  # a sentence of a court, captions and descriptions that are things
    r"\b(?:prison|jail|death|life|court|judge\w*|serv(?:e|es|ed|ing)|suspended|reduced|years?|months?)\b[^.!?]{0,30}\bsentences?\b",
    r"\bsentences?\b[^.!?]{0,30}\b(?:prison|jail|death|years?|months?|court|cell)\b",
    r"\b(?:job|product|item|full|detailed) descriptions?\b",
)
# Orders to the LLM, in an input.
ORDERS = pattern(
    r"\b(?:ignore|disregard|forget)\b[^.!?]{0,40}\b(?:instructions?|prompts?|rules)\b", r"\bsystem prompt\b"
)
THINKING = re.compile(
    r"<(think|thinking|reasoning|thought)>.*?(?:</\1>|\Z)|\A.*</(?:think|thinking|reasoning|thought)>", re.DOTALL
)
QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|(?<!\w)['‘][^'’]*(?:['’]\w[^'’]*)*['’](?!\w)")
ALL_QUOTED = re.compile(r"\"([^\"]+)\"|“([^“”]+)”|'([^']+)'")
END = tuple(".!?…。！？") + tuple("\"'”’)]»")
PUNCTUATION = tuple(",;:)(")  # that no text begins with
LOWER_CASE = re.compile(r"[a-z]+[\s,;:]")  # but "iPhone", "www.x.org"
BEGINNINGS = set(
    words(
        "a an the this that these those two three four five six some several many one each every de van von di la le el al da du"
    )
)
UNFINISHED = re.compile(
    r"[,;:(\[–—-]$|\b(?:the|an?|and|or|but|of|with|to|for|by|from|at|is|are|was|were|as|its|their|his|her|which|such|than|into|additionally)$",
    re.IGNORECASE,
)
LONG = 25  # words; a text of more that does not end with a full stop was cut, whatever the server says
# Function words of languages in Latin letters, with those that English has, too.
LANGUAGES = dict(line.split(": ") for line in read_text(Path(__file__).with_name("function_words.txt")).splitlines())
ENGLISH = set(LANGUAGES.pop("en").split())
FOREIGN = [set(function_words.split()) for function_words in LANGUAGES.values()]
COMMON = ENGLISH | set(words("them given provides provided please may contain simply ensuring yet new"))


def tidy(text: str) -> str:
    """The answer on one line, without a reasoning model's thinking and without quotes around the whole text."""
    text = " ".join(THINKING.sub(" ", text).split())
    while quoted := ALL_QUOTED.fullmatch(text):
        text = quoted[quoted.lastindex].strip()
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
        triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
        wording = [" ".join(three) for three in triples if sum(word not in COMMON for word in three) >= 2]
        wording += re.findall(r"\b[^\W\d_]+(?:-[^\W\d_]+)+\b", fixed)
        wording += re.findall(r"^([^\n:{}]{3,40}):\s*(?:\{|$)", prompt.template, re.MULTILINE)
        self.wording = {" ".join(words(phrase)) for phrase in wording}
        self.names = {"sentence", "caption", "description"} & {word.removesuffix("s") for word in tokens}

    def fault(self, text: str, inputs: list[str], finished: bool = True) -> str | None:
        """The first of REASONS that applies to a tidied text, or None.

        Args:
            inputs: the captions that it was made from.
            finished: False if the LLM stopped at the limit of new tokens.
        """
        captions = [caption for caption in inputs if not ORDERS.search(caption)] or inputs
        return next((reason for reason, applies in self.checks(text, captions, finished) if applies), None)

    def checks(self, text: str, captions: list[str], finished: bool) -> Iterator[tuple[str, bool]]:
        """Each of REASONS that a text can be rejected for, with whether it applies, in the order in which they count."""
        yield "empty", not words(text)
        yield "illegal", bool(illegal_characters(text))
        yield "refusal", says(REFUSAL, QUOTED.sub(" ", text), captions, following=2)
        yield "chatter", says(CHATTER, text, captions)
        yield "prompt_leak", self.leaks(text, captions) or says(TALK, text, captions)
        yield "repetition", bool(repetition(text)) and not any(map(repetition, captions))
        yield "cut_off", not finished or broken_off(text) or headless(text, captions)
        yield "language", self.foreign(text, captions)
        yield "copy", copied(text, captions)
        yield "unrelated", self.english and unrelated(text, captions)

    def leaks(self, text: str, captions: list[str]) -> bool:
        """Whether the text has wording of the prompt that no caption has."""
        tokens, given = words(IDIOMS.sub(" ", text)), in_spaces(words(" ".join(captions)))
        names = self.names.intersection(token.removesuffix("s") for token in tokens)
        leaked = [phrase for phrase in self.wording if f" {phrase} " in in_spaces(tokens)]
        return any(phrase not in given for phrase in (*names, *leaked))

    def foreign(self, text: str, captions: list[str]) -> bool:
        """Whether a text has letters of a script that no caption has; with language en, also more letters of other scripts
        than Latin ones, eight or more words without a single English function word, or more function words of another
        language than English ones."""
        letters = scripts(text)
        if not text.isascii() and letters.keys() - scripts(" ".join(captions)):
            return True
        if not self.english:
            return False
        tokens = set(words(text))
        if letters["LATIN"] < 0.5 * letters.total() or (len(words(text)) >= 8 and not ENGLISH & tokens):
            return True
        english = [spoken for spoken in map(set, map(words, captions)) if not other_language(spoken, spoken)]
        own = tokens.difference(*english)
        return other_language(own, tokens, one_is_enough=True) or accented(own, tokens)


def in_spaces(tokens: list[str]) -> str:
    """Words as a text in which " word " finds whole ones."""
    return f" {' '.join(tokens)} "


def says(wording: re.Pattern, text: str, captions: list[str], following: int = 0) -> bool:
    """Whether a text has wording that no caption has. `following`: with as many words after it."""
    given = [in_spaces(words(caption)) for caption in captions]
    for match in wording.finditer(text):
        after = words(text[match.end() :])[:following]
        phrase = " ".join([*words(match.group()), *after])
        if not re.search(r"[^\W\d_]", phrase) or not any(f" {phrase} " in caption for caption in given):
            return True
    return False


def broken_off(text: str) -> bool:
    return not text.endswith(END) and (len(words(text)) > LONG or bool(UNFINISHED.search(text)))


def headless(text: str, inputs: list[str]) -> bool:
    """Whether a text begins mid-sentence. A name may begin in lower case ("adidas Originals"), as an input has it."""
    if text.startswith(PUNCTUATION):
        return True
    first, start = text.split()[0].lower(), " ".join(text.split()[:2])
    is_name = any(caption.lower().startswith(first) or start in caption for caption in inputs)
    return bool(LOWER_CASE.match(text)) and first not in BEGINNINGS and not is_name


def other_language(tokens: set[str], every: set[str], one_is_enough: bool = False) -> bool:
    """Whether more of the words are of another language than of English. `one_is_enough`: a single one, if no word is English."""
    enough = 1 if one_is_enough and not every & ENGLISH else 2
    for function_words in FOREIGN:
        others, english = len(tokens & function_words - ENGLISH), len(every & ENGLISH - function_words)
        if others >= enough and others > english:
            return True
    return False


def accented(tokens: set[str], every: set[str]) -> bool:
    """Whether a third of the words have letters that English has not."""
    return sum(not token.isascii() for token in tokens) >= max(2, len(every) / 3)


def stems(text: str) -> set[str]:
    """The words that carry meaning, without their endings."""
    return {re.sub(r"(?:['’]s|ies|es|s|ed|ing|ly|er)$", "", word)[:6] for word in words(text) if word not in ENGLISH}


def unrelated(text: str, captions: list[str]) -> bool:
    """Whether no word that carries meaning is in the captions."""
    latin = any(scripts(caption)["LATIN"] for caption in captions)
    return latin and not stems(text) & set().union(*map(stems, captions))


def copied(text: str, inputs: list[str]) -> bool:
    """Whether the text is one of several inputs (nine in ten words the same, in order) although the others say more, or
    all of them, one after the other, with no word between."""
    if len(inputs) < 2:
        return False
    written, given = words(text), list(map(words, inputs))
    if len(written) == sum(map(len, given)) and all(in_spaces(caption) in in_spaces(written) for caption in given):
        return True
    more = set().union(*given) - ENGLISH
    return any(more - set(caption) and alike(written, caption) for caption in given)


def alike(one: list[str], other: list[str]) -> bool:
    """Whether nine in ten words are the same, in order."""
    most = max(len(set(one)), len(set(other)))
    return len(set(one) & set(other)) >= 0.8 * most and SequenceMatcher(None, one, other, False).ratio() >= 0.9

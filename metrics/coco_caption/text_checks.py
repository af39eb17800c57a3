"""Facts about a text: illegal characters, foreign scripts, repetition; compared with others, names, numbers and colours.

Used on captions of a captioner (infer.py, evaluate.py) and on what an LLM wrote (rewriting/checks.py).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
JOINERS = {"\u200c", "\u200d"}  # they hold emoji and letters of some scripts together


def pattern(*alternatives: str) -> re.Pattern:
    return re.compile("|".join(alternatives), re.IGNORECASE)


# A language model refuses, or talks about itself.
REFUSAL = pattern(
    r"\bas an? (?:ai|artificial|language model|assistant)\b",
    r"\b(?:i['’]?m|i am) (?:sorry|afraid|unable|not able|just an|an ai|only able)\b",
    r"\bi (?:apologi[sz]e|regret|cannot|can ?not|can['’]?t|do not|don['’]?t|need more|would need|won['’]t)\b",
    r"\bi (?:think|assume|guess|suppose)\b|\b(?:please|kindly) provide\b|^(?:sorry|apologies|unfortunately|regrettably)\b[,.!:]",
    r"\b(?:not |im)possible to (?:combine|merge|fuse|create|write|determine)\b",
    r"\b(?:cannot|can ?not|can['’]t|could not) be (?:combined|merged|fused)\b",
    r"\b(?:there is|has|have) (?:no|not) enough (?:information|context)\b|\bno (?:relevant|clear) (?:information|connection)\b",
)


def words(text: str) -> list[str]:
    """The words of a text in lower case; a hyphen divides, an apostrophe does not."""
    return WORD.findall(text.lower())


NUMBERS = {
    word: str(number) for number, word in enumerate(words("zero one two three four five six seven eight nine ten"))
}


COLOURS = {name: name for name in words("black white gray red orange yellow green blue purple pink brown")}
COLOURS |= {"grey": "gray", "violet": "purple"}
# A count is two to ten, in words or digits. One is left out: "a" and "one" are said of anything.
COUNTS = {word: number for word, number in NUMBERS.items() if int(number) > 1}
COUNTS |= {number: number for number in COUNTS.values()} | {"pair": "2", "couple": "2", "trio": "3"}


def contradictions(text: str, references: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """{"colour": (said, instead), "count": ...}: what `text` says that all references contradict, and what they say.

    A reference contradicts a colour if it names colours and not this one; one that names none says nothing. Words are
    compared, not what they belong to: "a red ball" contradicts "a dog with a blue ball", and "a red dog" does not
    contradict "red ball".
    """
    captions = [words(caption) for caption in (text, *references)]
    result = {}
    for fact, vocabulary in (("colour", COLOURS), ("count", COUNTS)):
        claimed, *others = ({vocabulary[word] for word in caption if word in vocabulary} for caption in captions)
        wrong = claimed.difference(*others) if others and all(others) else set()
        result[fact] = sorted(wrong), sorted(set().union(*others)) if wrong else []
    return result


def illegal_characters(text: str) -> list[str]:
    """The characters of `text` that no caption should have: control and invisible ones, private and unassigned code
    points, halves of surrogate pairs, and U+FFFD, which replaces bytes that were not text.

    BLIP-2's OPT decoder writes them (its tokens are bytes); a line break or tab counts as white space.
    """
    if text.isascii() and text.isprintable():
        return []
    illegal = []
    for character in text:
        category = unicodedata.category(character)
        if (category in ("Cc", "Cf", "Cn", "Co", "Cs") and character not in JOINERS and character not in "\n\r\t") or (
            character == "\ufffd"
        ):
            illegal.append(character)
    return illegal


def remove_illegal_characters(text: str) -> str:
    """`text` without them, white space collapsed."""
    illegal = set(illegal_characters(text))
    return " ".join("".join(c for c in text if c not in illegal).split()) if illegal else text


def scripts(text: str) -> Counter:
    """Letters of `text` by script: Counter(LATIN=20, CJK=3). The script is the first word of a letter's Unicode name."""
    if text.isascii():
        return Counter(LATIN=sum(map(str.isalpha, text)))
    return Counter(unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha())


def repetition(text: str) -> str | None:
    """The word, phrase or sentence that a text says over and over, as a loop of a language model does, or None.

    A word four times in a row, two to six words three times in a row, or a sentence of four words or more twice.
    """
    tokens = words(text)
    for size, times in ((1, 4), *((size, 3) for size in range(2, 7))):
        run = 0
        for i in range(size, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - size] else 0
            if run >= size * (times - 1):
                return " ".join(tokens[i - size + 1 : i + 1])
    seen = set()
    for sentence in SENTENCE_END.split(text):
        key = tuple(words(sentence))
        if len(key) >= 4 and key in seen:
            return " ".join(key)
        seen.add(key)
    return None


def unsupported_facts(text: str, sources: Iterable[str]) -> list[str]:
    """Names and numbers of `text` that occur in no source, in order: words with a capital inside a sentence, and digits.

    A hint, not a proof: a name in other words ("NYC", "New York City") is listed too. "two" and "2" are the same.
    """
    joined = " ".join(sources).lower()
    supported = set(words(joined))
    supported |= {NUMBERS[word] for word in supported if word in NUMBERS}
    supported |= set(re.findall(r"\d+", joined.replace(",", "")))  # 1,200 is 1200, iPhone6 is iPhone 6
    compact = re.sub(r"[\W_]+", "", joined)
    unsupported = []
    for sentence in SENTENCE_END.split(text):
        for place, match in enumerate(WORD.finditer(sentence)):
            word = match.group()
            named = place > 0 and word[0].isupper()
            if not named and (word.isalpha() or not any(map(str.isdigit, word))):
                continue
            word = re.sub(r"['’]s?$", "", word)
            if len(word) == 1 and word.isalpha():
                continue
            plain = word.lower()
            if (
                plain not in supported
                and (plain.isdigit() or plain not in compact)
                and plain.removesuffix("s") not in supported
            ):
                unsupported.append(word)
    return list(dict.fromkeys(unsupported))

"""Captions in any language: how they are cut into the words that are compared.

Scripts that put no spaces between words are compared character by character (code points, as sacreBLEU's `char`): what
the COCO evaluation code gives for the same text with a space after every character, punctuation left out. All other
languages go through the COCO tokenizer as they are.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from .tokenizer import tokenize

# language: (name, sacreBLEU's tokenizer)
UNSPACED = {
    "zh": ("Chinese", "zh"), "yue": ("Cantonese", "zh"), "ja": ("Japanese", "char"), "th": ("Thai", "char"),
    "lo": ("Lao", "char"), "km": ("Khmer", "char"), "my": ("Burmese", "char"), "bo": ("Tibetan", "char"),
    "dz": ("Dzongkha", "char"),
}  # fmt: skip
# The first word of a letter's Unicode name: (language that is likely, code points of a usual word)
_SCRIPTS = {
    "CJK": ("zh", 3), "HIRAGANA": ("ja", 5), "KATAKANA": ("ja", 6), "THAI": ("th", 9), "LAO": ("lo", 9),
    "KHMER": ("km", 9), "MYANMAR": ("my", 9), "TIBETAN": ("bo", 9),
}  # fmt: skip
_CODE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]+)*")


def check_language(code: str) -> str:
    """The language of a code such as zh, zh-Hans or pt_BR: its first part. ValueError if it is not a code."""
    if not _CODE.fullmatch(code.lower()):
        raise ValueError(f"caption_language: {code!r} is not a language code. Examples: en, de, vi, zh, ja, th.")
    return re.split("[-_]", code.lower())[0]


def tokens_of(captions: Iterable[str], language: str = "en") -> list[list[str]]:
    """The words of each caption that scores compare: for English those of the COCO code's tokenizer."""
    if language == "en":
        return tokenize(captions)
    texts = (unicodedata.normalize("NFC", caption) for caption in captions)  # an accent may be a character of its own
    return tokenize(_spaced(text) if language in UNSPACED else text for text in texts)


def tokenization(language: str) -> str:
    """What words captions in a language are compared in, for people."""
    return "characters" if check_language(language) in UNSPACED else "words of the COCO code"


def sacrebleu_tokenizer(language: str) -> str:
    return UNSPACED[language][1] if language in UNSPACED else "13a"


def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]


def _is_unspaced(character: str) -> bool:
    if character.isascii():
        return False
    script = _script(character)
    return script in _SCRIPTS or script in ("HALFWIDTH", "BOPOMOFO", "IDEOGRAPHIC")


def _spaced(text: str) -> str:
    """A space around every character of an unspaced script; words and numbers of other scripts stay whole. Punctuation
    that is not ASCII's becomes a space: ASCII's is the tokenizer's to drop."""
    pieces = []
    for character in text:
        if not character.isascii() and unicodedata.category(character)[0] == "P":
            pieces.append(" ")
        else:
            pieces.append(f" {character} " if _is_unspaced(character) else character)
    return " ".join("".join(pieces).split())


def unsegmented(tokens: Sequence[list[str]]) -> tuple[str, str] | None:
    """(language that is likely, a caption) of English-tokenized captions in which whole phrases are one word; else None.

    Judged by the words: in most captions with words of an unspaced script, one is far longer than any real word.
    """
    scripts, long, example = Counter(), 0, None
    captions = 0
    for caption in tokens:
        foreign = [word for word in caption if not word.isascii() and any(map(_is_unspaced, word))]
        if not foreign:
            continue
        captions += 1
        word = max(foreign, key=len)
        counts = Counter(script for script in map(_script, word) if script in _SCRIPTS)
        scripts += counts
        script = counts.most_common(1)[0][0] if counts else "CJK"
        if len(word) > _SCRIPTS[script][1]:
            long, example = long + 1, example or word
    if not example or 2 * long < captions or 2 * captions < len(tokens):
        return None
    likely = "ja" if scripts["HIRAGANA"] + scripts["KATAKANA"] else _SCRIPTS[scripts.most_common(1)[0][0]][0]
    return likely, example

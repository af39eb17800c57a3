"""Caption augmentation from a list of plain words in a recipe, seeded per image like data/augmentation.py.

augment_text: ["synonym:0.2", "sentence_shuffle:0.2"]
"""

import random
import re

from common.errors import UserError
from data.augmentation import parse_operation, seeded
from data.synonyms import PHRASES, synonyms

FORMS = {
    "synonym": ("P", 1, lambda p: 0 <= p <= 1, "P from 0 to 1"),
    "sentence_shuffle": ("P", 1, lambda p: 0 <= p <= 1, "P from 0 to 1"),
    "clean": ("", 0, lambda: True, ""),
}
WORD = re.compile(r"(?<![\w<\[#@&'’./-])[A-Za-z]+(?![\w>\]'’/-]|\.\w)")
# Left as they are: quoted text, which is in the picture, and the names of other things.
KEPT_AS_THEY_ARE = re.compile(
    r'"[^"]*"|“[^”]*”|\b(?:' + "|".join(" ".join(phrase.split()) for phrase in PHRASES.split(",")) + r")s?\b", re.I
)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\.\.)\s+|(?<=[.!?][\"”')])\s+")
ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|no|vs|oz|lb|ft|e\.g|i\.e|[a-z])\.$", re.IGNORECASE)


class TextAugmentation:
    """Augments the captions of one sample: `TextAugmentation(spec, seed)(captions, epoch, image_id)`.

    Every random choice comes from (seed, epoch, image_id), so a resumed run sees the same captions as an uninterrupted
    one, with any number of workers and processes.

    Args:
        spec: operations, in order:
            `synonym:P`: each word that has a synonym (data/synonyms.py) is replaced by one with probability P. Colours,
            counts, positions, names, quoted text, special tokens, and "a" or "an" before the word stay as they are.
            `sentence_shuffle:P`: a caption of several sentences has them in an order drawn with probability P. It is
            for paragraphs that list what is seen; where a sentence refers to the one before, it may lose its sense.
            `clean`: as BLIP's own code learns captions: in lower case, without . ! " ( ) * # : ; ~, the first 30 words.
            Not drawn: every caption of the training split, each time.
        seed: the run's seed.
        language: of the captions.

    Raises:
        ValueError: an unknown operation or wrong numbers, or `synonym` for another language than English; the message
            names it.
    """

    def __init__(self, spec: list[str], seed: int = 42, language: str = "en"):
        self.seed = seed
        self.operations = [parse_operation(text, FORMS, "augment_text") for text in spec]
        if "synonym" in dict(self.operations) and not re.fullmatch("en([-_].*)?", language.lower()):
            raise UserError(
                f"--augment_text synonym: they are English, and caption_language is {language}. Leave it out."
            )

    def __call__(self, captions: list[str], epoch: int, image_id: str) -> list[str]:
        rng = seeded(self.seed, epoch, image_id, "text")
        for name, numbers in self.operations:
            captions = [OPERATIONS[name](caption, *numbers, rng) for caption in captions]
        return captions


def clean(caption: str, rng: random.Random | None = None) -> str:
    """The caption as BLIP's own code learns it."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:30])


def replace_words(caption: str, probability: float, rng: random.Random) -> str:
    """The caption with each word that has synonyms replaced by one of them with `probability`."""
    kept = [match.span() for match in KEPT_AS_THEY_ARE.finditer(caption)]
    present, pieces, end, before = set(re.findall("[a-z]+", caption.lower())), [], 0, ""
    for match in WORD.finditer(caption):
        word, previous, before = match.group(), before, match.group().lower()
        starts = caption[: match.start()].rstrip(" \"'“‘(")[-1:] in ("", ".", "!", "?")
        if not (word.islower() or (starts and word.istitle())):  # a name, or something written in capitals
            continue
        if any(first <= match.start() < last for first, last in kept):
            continue
        follower = re.match(r"\s+([\w-]+)", caption[match.end() :])
        options = [
            option
            for option in synonyms(word.lower(), follower and follower[1].lower())
            if option not in present and (previous not in ("a", "an") or _takes_an(option) == _takes_an(word.lower()))
        ]
        if options and rng.random() < probability:
            new = rng.choice(options)
            pieces += [caption[end : match.start()], new if word.islower() else new.capitalize()]
            end = match.end()
            present.add(new)
    return "".join([*pieces, caption[end:]])


def _takes_an(word: str) -> bool:
    return bool(re.match(r"hour|honest|(?!uni|use|eu|one)[aeiou]", word))


def _quotes(text: str) -> bool:
    """Whether a quotation is begun and not ended."""
    return text.count('"') % 2 == 1 or text.count("“") > text.count("”")


def shuffle_sentences(caption: str, probability: float, rng: random.Random) -> str:
    """With `probability`, the caption's sentences in an order drawn evenly from all; one sentence stays as it is."""
    sentences: list[str] = []
    for part in SENTENCE_END.split(caption.strip()):
        if sentences and (ABBREVIATION.search(sentences[-1]) or _quotes(sentences[-1])):
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    if len(sentences) < 2 or rng.random() >= probability:
        return caption
    if not re.search(r"[.!?][\"”')]*$", sentences[-1]):
        sentences[-1] += "."
    rng.shuffle(sentences)
    return " ".join(sentences)


OPERATIONS = {"synonym": replace_words, "sentence_shuffle": shuffle_sentences, "clean": clean}

"""Whether a tokenizer can write the captions that a model is to learn."""

import itertools
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable

from common.errors import UserError

logger = logging.getLogger(__name__)

_LOOKED_AT = 20_000  # captions
_WARN, _REFUSE = 0.01, 0.5
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def check_captions_can_be_written(tokenizer, captions: Iterable[str]) -> None:
    """Warn in one line if the tokenizer cannot write some words of the captions: they come back as unknown, or changed
    in more than case (BERT's uncased vocabulary strips every accent). UserError if that is more than half of them."""
    words = Counter(word for caption in itertools.islice(captions, _LOOKED_AT) for word in _words(caption))
    if not words:
        return
    distinct = list(words)
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    lost = {}
    for word, tokens in zip(distinct, encoded, strict=True):
        written = "".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        if _plain(written) != _plain(word) or tokenizer.unk_token_id in tokens:
            lost[word] = written
    fraction = sum(map(words.get, lost)) / words.total()
    if fraction < _WARN:
        return
    word = max(lost, key=words.__getitem__)
    message = (
        f"the tokenizer cannot write {fraction:.0%} of the captions' words: {word!r} becomes {lost[word] or 'unknown'!r}. The "
        "model would learn these captions wrongly"
    )
    advice = "choose a model whose tokenizer knows the language, or train one from scratch with model_config"
    if fraction > _REFUSE:
        raise UserError(f"{message}: {advice}.")
    logger.warning("%s; %s.", message, advice)


def _plain(word: str) -> str:
    return unicodedata.normalize("NFC", word).lower()


def _words(caption: str) -> Iterable[str]:
    """Words between spaces without the punctuation at their ends; for scripts without spaces, characters."""
    for piece in caption.split():
        word = piece.strip("".join(itertools.filterfalse(_is_letter, piece)))
        if any(unicodedata.name(character, "").startswith(_UNSPACED) for character in word if not character.isascii()):
            yield from filter(_is_letter, word)
        elif word:
            yield word


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"

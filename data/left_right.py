"""Words for left and right, by language: what a mirrored picture makes false in its captions."""

import functools
import re
import unicodedata

# The endings that a word may have follow its stem. Some words have other senses too ("derecho" is also a law): then a
# picture is not mirrored that could have been.
WORDS = {
    "en": r"(left|right)(most|wards?|side|-?hand|-?handed|-side|-most)?",
    "de": r"(links|rechts)\w*|(linke|rechte)[mnrs]?",
    "nl": r"(links|rechts)\w*|(linker|rechter)\w*",
    "sv": r"(vänster|vänstra|höger|högra)\w*",
    "da": r"(venstre|højre)\w*",
    "no": r"(venstre|høyre|høgre)\w*",
    "fr": r"gauches?|droite?s?",
    "es": r"(izquierd|derech)[ao]s?",
    "pt": r"(esquerd|direit)[ao]s?",
    "gl": r"(esquerd|dereit)[ao]s?",
    "ca": r"esquerr(a|e|es|ans?)|dret(a|es|s)?",
    "it": r"(sinistr|destr)[aeio]",
    "ro": r"stâng\w*|drept\w*|dreapt\w*",
    "pl": r"(lew|praw)(a|y|e|ą|ej|ego|emu|ym|ymi|ych|o)",
    "cs": r"(v|do|na|z)?(lev|prav)(a|o|á|ý|é|í|ou|ém|ého|ému|ých|ým|ými)",
    "sk": r"(v|do|na|z)?(ľav|prav)(a|o|á|ý|é|ej|í|ou|om|ého|ému|ých|ým)",
    "sl": r"(lev|desn)(o|a|i|e|em|ega|emu|ih|im)",
    "hr": r"(lijev|desn)(o|a|i|e|oj|om|og|u|oga|ih|im)|(s|u)?(lijeva|desna)",
    "sr": r"(lev|desn|лев|десн)(o|a|i|e|oj|om|og|u|о|а|и|е|ој|ом|ог|у)",
    "ru": r"(с|на|в)?(лев|прав)(о|а|ый|ая|ое|ые|ого|ой|ому|ом|ым|ую|ых|ыми)",
    "uk": r"(з|с|на|в|у)?(лів|прав)(о|а|ий|е|і|ого|ої|ому|ій|у|ою|им|их|ими|оруч)",
    "bg": r"(в|на|от)?(ляв|лев|дясн|десн)(о|а|ата|ия|ият|и|ите|ото)?",
    "el": r"(αριστερ|δεξι|δεξί|δέξι)\w*",
    "hu": r"bal(ra|ról|on|oldal\w*|ján|ja)?|jobb\w*",
    "fi": r"vase(n|m)\w*|oike(a|i)\w*",
    "et": r"vasak\w*|parem\w*",
    "lt": r"kair\w*|dešin\w*",
    "lv": r"kreis\w*|lab(ā|o|ais|ajā|ās|i|ā)",
    "tr": r"sol(a|da|dan|daki|u|un\w*)?|sağ(a|da|dan|daki|ı|ın\w*)?",
    "vi": r"trái|phải",
    "id": r"kiri|kanan",
    "ms": r"kiri|kanan",
    "fil": r"kaliwa\w*|kanan\w*",
    "sw": r"kushoto|kulia",
}
# Of scripts whose words are not found by their borders, or have none: wherever they occur.
PARTS = {
    "zh": "左|右", "yue": "左|右", "ja": "左|右", "ko": "왼|오른|좌측|우측", "th": "ซ้าย|ขวา", "lo": "ຊ້າຍ|ຂວາ",
    "km": "ឆ្វេង|ស្តាំ", "my": "ဘယ်|ညာ", "bo": "གཡོན|གཡས", "ar": "يسار|يمين|أيسر|أيمن|يسرى|يمنى", "fa": "چپ|راست",
    "ur": "بائیں|دائیں|بایاں|دایاں", "he": "שמאל|ימין|ימני|ימנית", "hi": "बाएं|बाएँ|बायाँ|बायां|बायीं|बाईं|बायें|दाएं|दाएँ|दायाँ|दायां|दायीं|दाईं|दायें",
    "mr": "डाव|उजव", "bn": "বাম|বাঁ|বায়ে|ডান", "te": "ఎడమ|కుడి", "ta": "இடது|வலது|இடப்|வலப்",
}  # fmt: skip
SAME = {"iw": "he", "nb": "no", "nn": "no", "tl": "fil", "in": "id"}  # other codes of these languages


@functools.cache
def left_right(language: str) -> tuple[re.Pattern, bool]:
    """(what finds words for left and right in captions, whether those of `language` are among them). English ones are, in
    all; for en, which may just be the default, those of every language."""
    code = re.split("[-_]", language.lower())[0]
    code = SAME.get(code, code)
    chosen = [*WORDS, *PARTS] if code == "en" else ["en", code]
    words, parts = ("|".join(table[name] for name in chosen if name in table) for table in (WORDS, PARTS))
    parts = unicodedata.normalize("NFC", parts)
    return re.compile(rf"\b({words})\b{'|' * bool(parts)}{parts}", re.IGNORECASE), code in WORDS or code in PARTS


def names_a_side(caption: str, language: str) -> bool:
    """Whether the caption says left or right."""
    return bool(left_right(language)[0].search(unicodedata.normalize("NFC", caption)))

"""Objects with named columns -> rows: which column holds the image, which the captions, and what a cell holds."""

import ast
import base64
import binascii
import contextlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from common.errors import DataError
from common.existence import ENDINGS
from common.logs import say_once
from data.images import ImageError, is_image
from data.rows import Options, Row, split_in, split_name, text_or_none

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    "image", "img", "image_path", "file_name", "filename", "filepath", "jpg", "jpeg", "png", "webp", "path",
    "images", "image_file", "image_name", "img_path", "img_name", "image_bytes", "image_base64", "file",
)  # fmt: skip
CAPTION_COLUMNS = (
    "captions", "caption", "sentences", "sentence", "text", "txt", "description", "sentences_raw", "raw",
    "caption_str", "caption_text", "texts", "references", "reference_strs", "comment", "conversations", "messages",
    "completion", "response", "suffix", "summary", "utterance", "report", "short_caption",
)  # fmt: skip
PREDICTION_COLUMNS = (
    "prediction", "predicted_caption", "generated_caption", "generated_text", "generated", "hypothesis", "response",
    "output", "answer", "pred",
)  # fmt: skip
CAPTION_WORDS = {"caption", "captions", "sentence", "sentences", "text", "texts", "description", "descriptions"}
NUMBERED_CAPTION = re.compile(r"(?:captions?|sentences?|texts?|comments?)_?\d+")  # caption_0 ... caption_4
SPLIT_COLUMNS = ("split", "set_name")  # TextCaps says set_name
MAYBE_SPLIT_COLUMNS = ("subset", "partition", "set", "fold", "phase")  # where they say train, val or test
ID_COLUMNS = ("image_id", "cocoid", "imgid")
MISSING = ("", "nan", "none", "n/a", "null", "<na>", "#n/a")
CONVERSATIONS = ("conversations", "messages")
QUESTION = "caption_question"  # what is kept of a conversation beside its answer, in a table made of its source
LONGEST_NAME = 4096  # of a path
LOOKED_AT = 200  # rows whose keys make the header of a file that has none
IMG2DATASET = (
    "Images are not fetched from addresses in a data set. Fetch them: img2dataset --url_list {file} --input_format {form} "
    "--url_col {column} --caption_col {caption} --output_format webdataset --output_folder images, and use that folder; or "
    "give their names and --image_dir"
)
# The first characters of JPEG, PNG, GIF, WebP, BMP and TIFF files in base64.
BASE64_IMAGE = re.compile(r"(?:data:image/[\w.+-]+;base64,|/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkqA|TU0AK)")


@dataclass
class Columns:
    """The columns that have a meaning: names, or None."""

    image: str | None = None
    captions: list[str] = field(default_factory=list)
    image_id: str | None = None
    split: str | None = None
    question: str | None = None

    @property
    def used(self) -> tuple:
        return (self.image, self.image_id, self.split, self.question, *self.captions)


def find_columns(examples: dict, options: Options, source: str, images: tuple = ()) -> Columns:
    """The columns by their usual names in any case, or those that the options name.

    Args:
        examples: every column of the source, with a value of it.
        images: columns that are known to hold images (their `datasets` type is Image).

    Raises:
        DataError: a column is missing, or two could be meant; it names them, and the flag.
    """
    for flag in ("image_column", "caption_column", "group_column"):
        name = getattr(options, flag)
        if name not in (None, *examples):
            raise DataError(f"{source}: no column {name!r} (--{flag}). Columns present: {', '.join(examples)}")
    usual = {usual_name(name): name for name in reversed(examples)}
    image_id = taken("ids", present(ID_COLUMNS, usual), source)
    image = options.image_column or _image_column(examples, usual, source, images)
    captions = _caption_columns(examples, usual, options, source, image) if options.captions else []
    if image is None:
        if options.images:
            image = _image_by_content(examples, captions, options.is_file, source)
        else:
            image_id = image_id or usual.get("id")
    split = _split_column(examples, usual, source)
    return Columns(
        image, captions, None if image_id == image else image_id, split, _question(examples, usual, captions)
    )


def _question(examples: dict, usual: dict, captions: list[str]) -> str | None:
    """The column of what conversations ask: the captions' one if that holds conversations."""
    if usual.get(QUESTION):
        return usual[QUESTION]
    columns = captions or list(filter(None, [first_of(CAPTION_COLUMNS, usual)]))
    return next((name for name in columns if turns_of(examples[name])), None)


def say_taken(role: str, taken: list[str], others: list[str], source: str, flag: str) -> None:
    """One line where several columns could be meant."""
    if others:
        advice = f"; --{flag} names another" if flag else ""
        columns = " and ".join(taken), " or ".join(others), advice
        say_once(logger, "%s: %s are read from %s, not from %s%s", source, role, *columns)


def taken(role: str, columns: list[str], source: str, flag: str = "") -> str | None:
    """The first of the columns that could be meant."""
    say_taken(role, columns[:1], columns[1:], source, flag)
    return next(iter(columns), None)


def present(names: tuple, usual: dict) -> list[str]:
    """The columns with these names, in the order of the names."""
    return [usual[name] for name in names if name in usual]


def _image_column(examples: dict, usual: dict, source: str, images: tuple) -> str | None:
    columns = present(IMAGE_COLUMNS, usual)
    if images:
        columns = list(dict.fromkeys([*filter(images.__contains__, columns), *images]))
    others = [name for name in columns[1:] if name in images or _may_be_image(examples[name])]
    return taken("images", [*columns[:1], *others], source, "image_column")


def first_of(names: tuple, values: dict):
    """The value of the first of these names that has one."""
    return next(filter(None, map(values.get, names)), None)


def _caption_columns(examples: dict, usual: dict, options: Options, source: str, image: str | None) -> list[str]:
    if options.caption_column:
        return [options.caption_column]
    texts = {name: column for name, column in usual.items() if column != image}
    plain, predicted, columns = (
        present(n, texts) for n in (("caption", "captions"), PREDICTION_COLUMNS, CAPTION_COLUMNS)
    )
    if options.predictions:
        if plain and predicted:
            both = " or ".join((*predicted, *plain))
            raise DataError(
                f"{source}: the predictions could be {both}. Say which with --caption_column, or remove the others"
            )
        columns = [*predicted, *columns]
    numbered = [texts[name] for name in sorted(filter(NUMBERED_CAPTION.fullmatch, reversed(texts)), key=_number)]
    candidates = [*columns[:1], *numbered]  # caption, caption2, caption3
    chosen = [column for column in candidates if _base(column) == _base(candidates[0])]
    if chosen:
        alike = [texts[name] for name in reversed(texts) if _is_alike(name, examples[texts[name]])]
        others = [column for column in dict.fromkeys((*columns, *numbered, *alike)) if column not in chosen]
        say_taken("captions", chosen, others, source, "caption_column")
        return chosen
    if "error" in examples:
        return []
    if "json" in examples:  # WebDataset: the caption is inside
        return ["json"]
    raise _missing("caption", examples, source, [n for n, v in examples.items() if n != image and _is_text(v)])


def _is_alike(name: str, value) -> bool:
    """Whether a column may hold captions, by a word of its usual name and several words in it: caption_en, alt_text."""
    text = str(_first(value))
    worded = name != QUESTION and not CAPTION_WORDS.isdisjoint(name.split("_"))
    return worded and _is_text(value) and (" " in text or not text.isascii())


def _image_by_content(examples: dict, captions: list[str], is_file: Callable[[str], bool], source: str) -> str:
    """The only column of names of images that are there, or of images."""
    texts = {name: str(value) for name, value in examples.items() if name not in captions}
    columns = [name for name, text in texts.items() if is_file(text)]
    columns = [name for name in columns if usual_name(name) in ID_COLUMNS] or columns
    if len(columns) == 1:
        say_once(logger, "%s: images are named by column %s, whose names are those of files", source, columns[0])
        return columns[0]
    for name in captions:
        if _images_in(examples[name]):
            return name
    for name, text in texts.items():
        if re.match(r"https?://", text):
            raise DataError(f"{source}: " + address_error(name, text, source, captions))
    raise _missing("image", examples, source, columns or [n for n, t in texts.items() if _may_be_image(t)])


def address_error(column: str, address: str, source: str, captions: list[str]) -> str:
    """What to do with a table of addresses."""
    file = source.split(",")[0]
    form = os.path.splitext(file)[1].lstrip(".") or "parquet"
    command = IMG2DATASET.format(file=file, form=form, column=column, caption=[*captions, "caption"][0])
    return f"column {column} holds an address ({address[:80]}). {command}"


def _missing(role: str, examples: dict, source: str, candidates: list[str]) -> DataError:
    could = " or ".join(f"{name} ({str(_first(examples[name]))[:40]!r})" for name in candidates[:6])
    could = could and f". It could be {could}"
    if any(map(_may_be_image, examples)):
        first = next(iter(examples))
        could = f". The first line looks like a row, not a header: write one, such as image,caption, above {first!r}"
    if {"id", "data", "annotations"} <= examples.keys():
        could = ". This is Label Studio's full JSON: export JSON-MIN or CSV there"
    return DataError(
        f"{source}: no {role} column. Columns present: {', '.join(examples)}. Name it with --{role}_column{could}"
    )


def _split_column(examples: dict, usual: dict, source: str) -> str | None:
    columns = present(SPLIT_COLUMNS, usual)
    for name in present(MAYBE_SPLIT_COLUMNS, usual):
        if split_in(str(examples[name])) is not None:
            columns.append(name)
        elif not columns:
            say_once(logger, "%s: column %s (%.40r) names no splits", source, name, str(examples[name]))
    return taken("splits", columns, source)


def usual_name(column: str) -> str:
    """ "Image Name" is image_name."""
    return re.sub(r"\W+", "_", column.strip().lower())


def _base(name: str) -> str:
    return re.sub(r"_?\d+$", "", usual_name(name)).removesuffix("s")


def _number(name: str) -> int:
    return int(re.search(r"\d*$", name.strip())[0] or 0)


def _first(value):
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _is_text(value) -> bool:
    text = _first(value)
    text = _first(text[caption_key(text)]) if caption_key(text) else text
    return isinstance(text, str) and bool(text.strip()) and not _may_be_image(text)


def _may_be_image(value) -> bool:
    return isinstance(value, str) and (is_image_name(value) or bool(BASE64_IMAGE.match(value)))


def is_image_name(value: str) -> bool:
    return os.path.splitext(value.strip())[1].lower() in ENDINGS


def captions_of(row: dict, names: list[str], where: str, literal: bool = False) -> list:
    """The raw captions of a row, in one column or several: text, a list, a list or an object written as text, a struct
    with the text in it, a conversation, or WebDataset's json."""
    return [caption for name in names for caption in _captions(row.get(name), where, literal)]


def caption_key(value) -> str | None:
    """The key of an object that its captions are under; None if there is none, or it is no object."""
    return next((key for key in CAPTION_COLUMNS if isinstance(value, dict) and value.get(key) is not None), None)


def _captions(value, where: str, inside: bool = False) -> list:
    """inside: the value is an item of a list, whose strings are captions and not parsed again."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and not inside:
        structure = parse_structure(value, where)
        return [value] if structure is None else _captions(structure, where)
    if key := caption_key(value):
        return _captions(value[key], where, inside)
    if isinstance(value, list | tuple | np.ndarray):
        if turns := turns_of(value):
            return [_answer(turns, where)]
        return [caption for item in value for caption in _captions(item, where, inside=True)]
    return [value]  # `clean_captions` refuses what is no text


MODEL = ("gpt", "assistant", "model")  # who answers in a conversation


USERS = ("human", "user")


@dataclass
class Turn:
    """One of a conversation of LLaVA's form, {"from": "gpt", "value": ...}, or OpenAI's, {"role": "user", "content": ...}."""

    who: str
    text: str
    images: list


def turns_of(value) -> list[Turn]:
    """The turns of a conversation, also of one written as text; none of what is something else."""
    turns = _json(value) if isinstance(value, str) else value
    if not isinstance(turns, list | tuple | np.ndarray):
        return []
    if not all(isinstance(turn, dict) and {"from", "role"} & set(turn) for turn in turns):
        return []
    return [Turn(turn.get("from", turn.get("role")), _text_of(turn), _images_in(turn)) for turn in turns]


def _text_of(turn: dict) -> str:
    value = turn.get("value", turn.get("content"))
    parts = value if isinstance(value, list | np.ndarray) else [value]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(map(str, filter(None, texts)))


def _answer(turns: list[Turn], where: str) -> str:
    """What the model says in a conversation."""
    answers = [turn.text for turn in turns if turn.who in MODEL]
    if len(answers) != 1:
        raise DataError(
            f"{where}: a conversation with {len(answers)} answers. Captions are conversations with one answer each: keep "
            "those of the descriptions"
        )
    return answers[0]


def question_of(value, where: str) -> str | None:
    """What the user says before the answer in a conversation, without the image's placeholder; None if it is none, or nothing
    is asked.

    Raises:
        DataError: it is about several images.
    """
    turns = turns_of(value)
    images = max(sum(len(turn.images) for turn in turns), sum(turn.text.count("<image>") for turn in turns))
    if images > 1:
        raise DataError(
            f"{where}: a conversation about {images} images. A caption belongs to one image: give a row per image"
        )
    if "system" in [turn.who for turn in turns]:
        say_once(logger, "the system messages of conversations are left out; --system_prompt gives every image one")
    before = itertools.takewhile(lambda turn: turn.who not in MODEL, turns)
    texts = [turn.text.replace("<image>", "").strip() for turn in before if turn.who in USERS]
    return "\n".join(filter(None, texts)) or None


# How a list or an object of strings begins, with any quotes, and a numpy array.
OF_CALL = r"(?:np\.|pd\.)?(?:array|list|Index)\("
BEGINS = re.compile(
    rf"""[\[{{]\s*(?:[\[({{]\s*)*(?:b?["'\u201c\u2018\u201e]|{OF_CALL}|np\.str_\()|{OF_CALL}(?=\s*[\[(])"""
)
ARRAY = re.compile(rf"\A{OF_CALL}(.*?)(?:,\s*(?:dtype|name)=\S+)*\)\Z", re.DOTALL)
# What Python, numpy and pandas write between the strings of a list, in [] or {}: nothing, in ['a b' 'c'], or missing values.
STRING = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""", re.DOTALL)
BETWEEN_STRINGS = re.compile(r"[\[{](?:[\s,]|\b(?:nan|None)\b)*[\]}]")


def parse_structure(text: str, where: str):
    """The list, tuple or object that a text holds, as JSON, as Python writes it or as numpy does; None for plain text.

    Raises:
        DataError: it begins like a list of strings but is not one.
    """
    text = text.strip()
    value, begins = _json(text), BEGINS.match(text)
    if isinstance(value, str):  # JSON in JSON
        return parse_structure(value, where)
    if value is None and (begins or text[:1] + text[-1:] in ("[]", "()", "{}")):
        value = _python_literal(text)
    of_texts = isinstance(value, list | tuple) and set(map(type, value)) <= {str, bytes, list, tuple, dict}
    if of_texts or isinstance(value, dict):
        return value
    if begins:
        fault = "cannot be read as one" if value is None else "holds other than text"
        raise DataError(f"{where}: the caption begins like a list but {fault}: {text[:80]!r}")
    return None


def _json(text: str):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _python_literal(text: str):
    text = ARRAY.sub(r"\1", text)
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if BETWEEN_STRINGS.fullmatch(STRING.sub("", text)):  # Python would read ['a b' 'c'] as one text
            return list(map(ast.literal_eval, STRING.findall(text)))
        return ast.literal_eval(text)
    return None


def image_in(value, where: str, column: str, captions=(), address: bool = False):
    """The image of a cell: a name (str), or {"path", "bytes"} of one that the cell holds, as bytes or base64.

    Args:
        captions: the columns of captions, for what to do about a table of addresses.
        address: whether an address may stand for the image, since nobody looks at it.
    """
    if isinstance(value, str):
        value = parse_structure(value, where) or value
    value = _images_in(value) or value
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise DataError(
                f"{where}: column {column} holds {len(value)} images. A caption belongs to one image: give a row per image"
            )
        return image_in(value[0], where, column, captions, address)
    if isinstance(value, dict) and ({"bytes", "path"} & set(value)):
        content = value.get("bytes")
        return {"path": value.get("path"), "bytes": content} if content is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(value)}
    value = str(value) if type(value) is int else value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column} holds {value!r:.80}, expected the path of an image")
    if re.match(r"https?://", value) and not address:
        raise DataError(f"{where}: " + address_error(column, value, where, list(captions)))
    content = from_base64(value)
    return value if content is None else {"path": None, "bytes": content}


def _images_in(turns) -> list:
    """The images inside a conversation: {"type": "image_url", "image_url": {"url": data}} or {"type": "image", "image": path}."""
    if isinstance(turns, list):
        return [image for turn in turns for image in _images_in(turn)]
    if isinstance(turns, dict):
        address = turns.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        image = address or turns.get("image")
        return [image] if image else _images_in(turns.get("content"))
    return []


def from_base64(value: str) -> bytes | None:
    """The bytes of an image in base64 (also URL-safe, or as a data: address), of a damaged one its text; None for a name."""
    content = b""
    if BASE64_IMAGE.match(value):
        text = re.sub(r"\s+", "", value.rpartition(",")[2])
        text = text.translate(str.maketrans("-_", "+/"))
        with contextlib.suppress(binascii.Error, ValueError):
            content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    if is_image(content):
        return content
    return value.encode() if len(value) > LONGEST_NAME else None


def object_rows(objects: Iterable, source: str, options: Options, split=None) -> Iterator[Row]:
    """The rows of (object with named columns, where) pairs. The header is every key of the first 200 objects.

    Args:
        source: what messages call the file.
        split: the split of every row, unless it has one of its own.
    """
    objects = checked_objects(objects, source)
    first = list(itertools.islice(objects, LOOKED_AT))
    if not first:
        return
    columns = find_columns(first_values(content for content, _ in first), options, source)
    for content, where in itertools.chain(first, objects):
        yield row_of(content, columns, where, source, options, split)


def checked_objects(objects: Iterable, source: str) -> Iterator[tuple[dict, str]]:
    """The (object, where) pairs; DataError for what is no object with named columns."""
    for content, where in objects:
        if not isinstance(content, dict):
            raise DataError(
                f"{source}, {where}: expected an object with image and captions, got {type(content).__name__}"
            )
        yield content, where


def first_values(rows: Iterable[dict]) -> dict:
    """{column: its first value that is not None} of all columns of some rows."""
    examples: dict = {}
    for row in rows:
        examples |= {name: value for name, value in row.items() if examples.get(name) is None}
    return examples


def row_of(content: dict, columns: Columns, where: str, source: str, options: Options, split=None) -> Row:
    place = f"{source}, {where}"
    image = content.get(columns.image)
    if image is not None:
        image = image_in(image, place, columns.image, columns.captions, address=not options.images)
        image = without_spaces(image, options.is_file) if isinstance(image, str) else image
    elif options.images:
        image = ImageError(f"there is no image in column {columns.image}")
    name = None
    match image:
        case str():
            name = os.path.basename(image) if os.path.isabs(image) else image
        case {"path": str(path)}:
            name = os.path.basename(path) or None
    image_id, own_split = content.get(columns.image_id), content.get(columns.split)
    captions = captions_of(content, columns.captions, where, options.literal)
    if len(columns.captions) > 1:  # empty cells of a table are no captions
        captions = [caption for caption in captions if not is_missing(caption)] or captions[:1]
    return Row(
        where,
        image,
        captions,
        name=name,
        image_id=None if image_id is None or isinstance(image_id, bool) else as_id(image_id),
        split=split if own_split is None else split_name(own_split, place),
        columns=content,
        used=columns.used,
        question=_question_in(content.get(columns.question), columns.question, place),
        error=text_or_none(content.get("error")),
    )


def without_spaces(name: str, is_file: Callable[[str], bool]) -> str:
    """An image's name without the white space around it, unless that is part of a file's name."""
    return name.strip() if name != name.strip() and not is_file(name) else name


def _question_in(value, column: str | None, place: str) -> str | None:
    """`column` may be QUESTION, which holds the questions themselves."""
    return text_or_none(value) if column and usual_name(column) == QUESTION else question_of(value, place)


def is_missing(caption) -> bool:
    """Empty, or what pandas and str() make of a missing value."""
    return caption is None or (isinstance(caption, str) and caption.strip().lower() in MISSING)


def as_id(value) -> str:
    """An id as text: 6, 6.0 and "6" are the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

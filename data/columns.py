"""Rows with named columns -> records: which column holds the image, which the captions, and what a cell holds."""

import ast
import base64
import binascii
import io
import json
import os
import re
import tokenize
from collections.abc import Iterable, Iterator

from common.errors import DataError
from data.images import is_image
from data.rows import Record, split_name

IMAGE_COLUMNS = (
    "image",
    "img",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "path",
    "images",
    "image_file",
    "image_name",
    "img_path",
    "img_name",
    "image_bytes",
    "image_base64",
    "file",
)
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "sentences",
    "sentence",
    "text",
    "txt",
    "description",
    "sentences_raw",
    "raw",
    "caption_str",
    "caption_text",
    "texts",
    "references",
    "reference_strs",
    "comment",
    "conversations",
    "messages",
)
NUMBERED_CAPTION = re.compile(r"(?:captions?|sentences?|texts?|comments?)_?\d+")  # caption_0 ... caption_4
SPLIT_COLUMNS = ("split", "set_name")  # TextCaps says set_name
ID_COLUMNS = ("image_id", "cocoid")
# The first characters of JPEG, PNG, GIF, WebP, BMP and TIFF files in base64.
BASE64_IMAGE = re.compile(r"(?:data:image/[\w.+-]+;base64,|/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkqA|TU0AK)")


def find_columns(columns: list[str], image_column, caption_column, source: str, image_columns=(), example=None):
    """The image column and the caption columns, by their usual names in any case.

    Args:
        image_columns: columns that are known to hold images (their `datasets` type is Image).
        example: a row, from which an error shows what the columns hold.
    """
    for option, name in (("image_column", image_column), ("caption_column", caption_column)):
        if name is not None and name not in columns:
            raise DataError(f"{source}: no column {name!r} (--{option}). Columns present: {', '.join(columns)}")
    usual = {usual_name(name): name for name in reversed(columns)}
    image = image_column or next((usual[name] for name in IMAGE_COLUMNS if name in usual), None)
    if image_columns and not image_column and image not in image_columns:
        image = image_columns[0]
    captions = [caption_column or next((usual[n] for n in CAPTION_COLUMNS if n in usual and usual[n] != image), None)]
    if captions == [None]:
        captions = sorted((column for name, column in usual.items() if NUMBERED_CAPTION.fullmatch(name)), key=_number)
        captions = captions or [None]
    if captions == [None] and "json" in columns:  # WebDataset: the caption is inside
        captions = ["json"]
    for option, name in (("image", image), ("caption", captions[0])):
        if name is None:
            raise DataError(
                f"{source}: no {option} column. Columns present: {', '.join(columns)}. Name it with --{option}_column"
                + _candidates(option, example or {}, image)
            )
    return image, captions


def usual_name(column: str) -> str:
    """ "Image Name" is image_name."""
    return re.sub(r"\W+", "_", column.strip().lower())


def _number(name: str) -> int:
    return int(re.search(r"\d+$", name.strip())[0])


def _candidates(option: str, example: dict, image) -> str:
    """The columns that could be meant, with an example of each."""
    found = []
    for name, value in example.items():
        if option == "caption" and name != image:
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(first, str) and first.strip() and not is_image_name(first):
                found.append(f"{name} ({first[:40]!r})")
        elif option == "image" and isinstance(value, str) and (is_image_name(value) or BASE64_IMAGE.match(value)):
            found.append(f"{name} ({value[:40]!r})")
    return f". It could be {' or '.join(found[:6])}" if found else ""


def is_image_name(value: str) -> bool:
    return bool(re.fullmatch(r"\S.{0,1000}\.(?:jpe?g|png|webp|gif|bmp|tiff?|jfif|jpe|heic|avif)", value.strip(), re.I))


def captions_of(row: dict, names: list[str], where: str) -> list:
    """The raw captions of a row, in one column or several: text, a list, a list or an object written as text, a struct
    with the text in it, a conversation, or WebDataset's json."""
    captions = []
    for name in names:
        value = row.get(name)
        if name == "json":
            value = json.loads(value) if isinstance(value, str | bytes) else value
            inner = caption_key(value or {})
            if inner is None:
                raise DataError(f"{where}: the json of this sample has no caption. Its keys: {', '.join(value or {})}")
            value = value[inner]
        captions += _captions(value, where)
    return captions


def caption_key(value: dict) -> str | None:
    return next((key for key in CAPTION_COLUMNS if value.get(key) is not None), None)


def _captions(value, where: str, inside: bool = False) -> list:
    """inside: the value is an item of a list, whose strings are captions and not parsed again."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and not inside:
        structured = parse_structure(value, where)
        return [value] if structured is None else _captions(structured, where, inside=isinstance(structured, str))
    if isinstance(value, dict):
        key = caption_key(value)
        return [value] if key is None else _captions(value[key], where, inside)  # `clean_captions` refuses it
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        turns = list(value)
        if turns and all(isinstance(turn, dict) and {"from", "role"} & set(turn) for turn in turns):
            return _answers(turns, where)
        return [caption for item in turns for caption in _captions(item, where, inside=True)]
    return [value]


def _answers(turns: list[dict], where: str) -> list:
    """What the model says in a conversation of LLaVA's form ({"from": "gpt", "value": ...}) or OpenAI's (role, content)."""
    found = [turn for turn in turns if turn.get("from", turn.get("role")) in ("gpt", "assistant", "model")]
    if len(found) != 1:
        raise DataError(
            f"{where}: a conversation with {len(found)} answers. Captions are conversations with one answer each: keep "
            "those of the descriptions"
        )
    value = found[0].get("value", found[0].get("content"))
    if isinstance(value, (list, tuple)):
        value = " ".join(part["text"] for part in value if isinstance(part, dict) and part.get("text"))
    return [value]


# How a list or an object of strings begins, with any quotes, and a numpy array.
BEGINS = re.compile(r"""[\[{]\s*(?:[\[({]\s*)*["'\u201c\u2018\u201e]|(?:np\.)?array\(""")
ARRAY = re.compile(r"(?:np\.)?array\((.*?)(?:,\s*dtype=\S+)?\)", re.DOTALL)


def parse_structure(text: str, where: str):
    """The list or object that a text holds, as JSON, as Python writes it or as numpy does; None for plain text.

    Raises:
        DataError: it begins like a list of strings but is not one.
    """
    text = text.strip()
    if text[:1] == text[-1:] == '"' and text[1:2] in "[{":  # JSON in JSON
        inner = _json(text)
        return parse_structure(inner, where) if isinstance(inner, str) else None
    if not BEGINS.match(text) and text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    value = _json(text)
    if value is None:
        value = _python_literal(text)
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(i, str | list | tuple | dict) for i in value)
    ):
        return value
    if value is None and BEGINS.match(text):
        raise DataError(f"{where}: the caption begins like a list but cannot be read as one: {text[:80]!r}")
    return None


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _python_literal(text: str):
    array = ARRAY.fullmatch(text)
    text = array[1] if array else text
    try:
        if not text or text[0] + text[-1] not in ("[]", "{}") or text[1:].lstrip()[:1] in "[({":
            return ast.literal_eval(text)
        # numpy and pandas write ['a b' 'c'] without commas, which Python itself would read as one text; a set has no order.
        items = []
        for token in tokenize.generate_tokens(io.StringIO(f"({text[1:-1]})").readline):
            if token.type == tokenize.STRING:
                items.append(ast.literal_eval(token.string))
            elif token.type == tokenize.NAME and token.string == "nan":
                continue
            elif token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER) and token.string not in ",()":
                return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return None
    return items if all(isinstance(item, str) for item in items) else None


def image_in(value, where: str, column: str):
    """The image of a cell: a path (str), or {"path", "bytes"} of one that the cell holds, as bytes or base64."""
    if isinstance(value, str) and value[:1] in "[{":
        value = parse_structure(value, where) or value
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise DataError(
                f"{where}: column {column} holds {len(value)} images. A caption belongs to one image: give a row per image"
            )
        return image_in(value[0], where, column)
    if isinstance(value, dict) and ({"bytes", "path"} & set(value)):
        content = value.get("bytes")
        return {"path": value.get("path"), "bytes": content} if content is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(value)}
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column} holds {value!r:.80}, expected the path of an image")
    if re.match(r"https?://", value):
        raise DataError(
            f"{where}: column {column} holds an address ({value[:80]}). Images are not fetched from "
            "addresses in a data set: download them, and give their names and --image_dir"
        )
    if len(value) >= 64 and BASE64_IMAGE.match(value):
        content = from_base64(value)
        if content is not None:
            return {"path": None, "bytes": content}
    return value.strip()


def from_base64(value: str) -> bytes | None:
    """The bytes of an image in base64 (also URL-safe, or as a data: address); None if it is something else."""
    text = re.sub(r"\s+", "", value.split(",", 1)[1] if value.startswith("data:") else value)
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_" if set("-_") & set(text) else None,
                                   validate=True)  # fmt: skip
    except (binascii.Error, ValueError):
        return None
    return content if is_image(content) else None


def dict_rows(
    rows: Iterable, source: str, image_column, caption_column, find, split=None, captions=True
) -> Iterator[Record]:
    """Rows with named columns and an image's path, or the image itself, in one of them.

    Args:
        rows: (dict, where) pairs.
        find: from an image's name to the path of its file; see data.finder.
        split: the split of every row, unless it has a `split` of its own.
        captions: False for callers that read images only: rows then need no captions.
    """
    image_name = caption_names = None
    for row, where in rows:
        if not isinstance(row, dict):
            raise DataError(f"{source}, {where}: expected an object with image and captions, got {type(row).__name__}")
        if image_name is None:
            image_name, caption_names = columns_of(row, image_column, caption_column, f"{source}, {where}", captions)
            split_column = next((name for name in SPLIT_COLUMNS if name in row), "split")
            id_column = next((name for name in ID_COLUMNS if row.get(name) is not None), "image_id")
        image = image_in(row.get(image_name), f"{source}, {where}", image_name)
        own_split, image_id = row.get(split_column), row.get(id_column)
        name = None
        if isinstance(image, str):
            name = os.path.basename(image) if os.path.isabs(image) else image
            image = find(image)
        elif image["path"]:
            name = os.path.basename(image["path"])
        yield Record(
            where,
            image,
            captions_of(row, caption_names, where),
            name=name,
            image_id=None if image_id is None else str(image_id),
            split=split if own_split is None else split_name(own_split, f"{source}, {where}"),
            extras={
                key: value
                for key, value in row.items()
                if key not in (image_name, *caption_names, id_column, "split", "image", "captions")
            },
        )


def columns_of(row: dict, image_column, caption_column, source: str, captions: bool = True):
    """`find_columns` for a row. Without `captions` only the image column is looked for, and no caption columns."""
    if captions:
        return find_columns(list(row), image_column, caption_column, source, example=row)
    image, _ = find_columns([*row, "captions"], image_column, None, source, example=row)
    return image, []

"""Text files in any common encoding: read correctly, or refused in one line that names the file.

UTF-8 and UTF-16 with or without a byte order mark, UTF-32 with one, and Windows-1252 (Excel's CSV in Western Europe),
which is only assumed of text that looks like it, with a warning.
"""

import codecs
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator

from common.errors import DataError
from common.logs import say_once

logger = logging.getLogger(__name__)

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, as it begins with that mark
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK = 1 << 20
# Four bytes above ASCII in a row are a word of another script; a symbol within a word is a letter of another code page.
# NUL and five more bytes are no letters there.
FOREIGN = re.compile(
    rb"[\x00\x81\x8d\x8f\x90\x9d]|[\x80-\xff]{4}|[A-Za-z\xc0-\xff][\xa1-\xa9\xac-\xaf\xb1-\xb3\xb5\xb6\xb8\xb9\xbc-\xbf][A-Za-z\xc0-\xff]"
)

_warned_inside: list[str] = []  # the text inside another file that a warning named


class TextError(DataError):
    """A file that is not text, or text in an encoding that cannot be determined."""


def counted(number: int, unit: str) -> str:
    """ "1 image", "4,982 images": `unit` is the plural of a noun that ends in s."""
    return f"{number:,} {unit.removesuffix('s') if number == 1 else unit}"


def json_line(row: dict) -> str:
    """A row as a line of JSON, which has no NaN and no Infinity: they become null, as in what a browser or a database writes.
    What JSON has no form for is written as text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(each_value(row, _finite), ensure_ascii=False, default=str) + "\n"


def _finite(value, name: str):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def each_value(value, change: Callable, name: str = ""):
    """A copy of JSON data, with every value that is neither a list nor an object replaced by `change(value, its name)`."""
    if isinstance(value, dict):
        return {key: each_value(inner, change, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [each_value(inner, change, name) for inner in value]
    return change(value, name)


def spreadsheet_cell(value):
    """A cell of a CSV file that people open in a spreadsheet: text that it would run as a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def open_text(path: str | os.PathLike, newline: str | None = None) -> io.TextIOWrapper:
    """The file, opened to be read as text in its own encoding; `newline` as in `open`.

    Raises:
        TextError: naming the file and what it is not. OSError: as `open` does.
    """
    encoding = encoding_of(path)
    if encoding == "cp1252":
        say_once(logger, "%s: not UTF-8, read as Windows-1252. Save it as UTF-8 if letters look wrong", path)
    return open(path, encoding=encoding, newline=newline)


def read_text(path: str | os.PathLike) -> str:
    """All of the text; see `open_text`."""
    with open_text(path) as file:
        return file.read()


def encoding_of(path: str | os.PathLike) -> str:
    """The encoding as `open` takes it. The file is read through once, in pieces."""
    with open(path, "rb") as file:
        return _encoding(file, path)


def decode(content: bytes, name: str) -> str:
    """The text of a file that lies inside another; `name` is for messages. TextError as `open_text`."""
    encoding = _encoding(io.BytesIO(content), name)
    if encoding == "cp1252" and not _warned_inside:
        _warned_inside.append(name)
        logger.warning("%s: not UTF-8, read as Windows-1252, as are others there", name)
    return content.decode(encoding)


def _encoding(file, path) -> str:
    first = file.read(CHUNK)
    marked = next((encoding for mark, encoding in MARKS if first.startswith(mark)), None)
    encoding = marked or _utf16_without_mark(first) or "utf-8"
    file.seek(0)
    fault = _fault(file, encoding)
    if fault is None:
        return encoding
    if encoding != "utf-8":
        raise TextError(f"{path}: begins as {encoding.upper()} text, but is not ({fault.reason}). Save it as UTF-8")
    file.seek(0)
    if all(map(_looks_western, _chunks(file))):
        return "cp1252"
    raise TextError(
        f"{path}: not UTF-8 text (byte 0x{fault.object[fault.start]:02x}: {fault.reason}), nor UTF-16 or Windows-1252. "
        "Save it as UTF-8"
    )


def _fault(file, encoding: str) -> UnicodeDecodeError | None:
    """What keeps the file from being text of an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in _chunks(file):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return error
    return None


def _chunks(file) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK), b"")


def _utf16_without_mark(first: bytes) -> str | None:
    """UTF-16 of mostly ASCII text has a zero in every other byte."""
    even, odd = first[0:4096:2].count(0), first[1:4096:2].count(0)
    half = max(1, min(len(first), 4096) // 2)
    for encoding, high, low in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if high > half * 0.4 and low < half * 0.05:
            return encoding
    return None


def _looks_western(chunk: bytes) -> bool:
    return not FOREIGN.search(chunk)


class Caption(str):
    """A caption, and whether it was `cut` at max_new_tokens, or by the server."""

    def __new__(cls, text: str, cut: bool):
        caption = super().__new__(cls, text)
        caption.cut = cut
        return caption

    def __getnewargs__(self):
        return str(self), self.cut

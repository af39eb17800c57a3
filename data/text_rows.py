"""Rows of text files: CSV with any separator, TSV, JSON lines, JSON. Nothing is misread silently: a line is read
as written, or refused with the file and the line."""

import csv
import io
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.existence import ENDING
from common.text import open_text, read_text

SEPARATORS = (",", ";", "\t", "|")
IMAGE_NAME = re.compile(rf"\.(?:{ENDING})\b", re.IGNORECASE)
LONGEST_CELL = 500  # lines of one quoted cell

csv.field_size_limit(1 << 30)  # a cell may hold an image in base64


LINES, TABLES = (".jsonl", ".ndjson", ".jsonlines"), (".csv", ".tsv")
ENDINGS = (".json", *LINES, *TABLES)


def read_json(file: Path):
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON: {error}. One object per line belongs in a .jsonl file") from None


def first_character(file: Path) -> str:
    with open_text(file) as text:
        return text.read(1024).lstrip()[:1]


def table_objects(file: Path) -> Iterator[tuple[object, str]]:
    """(object, where) of each row of a CSV or TSV file, line of JSON lines, or entry of a JSON list, one in memory at a
    time."""
    ending = file.suffix.lower()
    if ending in TABLES:
        return csv_rows(file)
    if ending in LINES:
        return ((row, f"{file.name} line {number}") for number, row in jsonl_rows(file))
    return ((row, f"{file.name} entry {number}") for number, row in enumerate(json_list(file)))


def json_list(file: Path, chunk: int = 1 << 20) -> Iterator:
    """The entries of a JSON list, read piece by piece."""
    decoder, number = json.JSONDecoder(), 0
    with open_text(file) as content:
        text, comma = content.read(chunk).lstrip()[1:].lstrip(), ""  # the comma that is still to be read
        while not text.startswith("]"):
            try:
                entry, end = decoder.raw_decode(text)
                if end == len(text):  # 12 may continue as 123
                    raise json.JSONDecodeError("the list has no end", text, end)
            except json.JSONDecodeError as error:
                more = content.read(chunk)
                if not more:
                    raise DataError(f"{file} entry {number}: not valid JSON: {error.msg}") from None
                text = (text + more).lstrip()
            else:
                yield entry
                text, number, comma = text[end:].lstrip(), number + 1, ","
            if comma and text.startswith(comma):
                text, comma = text[1:].lstrip(), ""


def jsonl_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file} line {number}: not valid JSON: {error}") from None


def csv_rows(file: Path, last_takes_rest: bool = False) -> Iterator[tuple[dict, str]]:
    """(row, "name line N") of a table with a header, which determines the separator: comma, semicolon, tab or |.

    A quoted cell may span several lines. A quote that opens and is not closed, so that it would swallow the rows
    after it, is taken literally where the line alone shows what its cells are; else it is an error. With
    `last_takes_rest` extra separators belong to the last cell (Kaggle's captions.txt).
    """
    with open_text(file, newline="") as text:
        lines = _Lines(text)
        header, separator = _header(lines, file)
        for cells, number in _cells(lines, separator, len(header), file):
            if last_takes_rest and len(cells) > len(header):
                cells[len(header) - 1 :] = [separator.join(cells[len(header) - 1 :])]
            if len(cells) > len(header):
                advice = ". Quote captions with commas" if separator == "," else f", separated by {separator!r}"
                raise DataError(f"{file} line {number}: more fields than the header has{advice}")
            if separator == "|":
                cells = [cell.strip() for cell in cells]
            yield dict(itertools.zip_longest(header, cells)), f"{file.name} line {number}"


def _header(lines: "_Lines", file: Path) -> tuple[list[str], str]:
    first = lines.take() or ""
    written = re.fullmatch(r"sep=(.)\s*", first)  # Excel's own way to name it
    if written:
        first = lines.take() or ""
    parsed = {separator: _parse(first, separator) for separator in (written[1] if written else SEPARATORS)}
    if not any(parsed.values()):
        raise DataError(f"{file} line 1: the header opens a quote and does not close it")
    separator = max(parsed, key=lambda separator: len(parsed[separator] or ()))  # on a tie the first: the comma
    header = [cell.strip() for cell in parsed[separator]]
    double = next((name for name, number in Counter(header).items() if number > 1), None)
    if double is not None:
        raise DataError(f"{file} line 1: two columns are called {double!r}. Rename or remove one")
    return header, separator


class _Lines:
    """Lines with their numbers, which can be looked at before they are taken."""

    def __init__(self, text):
        self.text, self.ahead, self.number = iter(text), deque(), 0

    def take(self) -> str | None:
        self.look(0)
        self.number += len(self.ahead) > 0
        return self.ahead.popleft() if self.ahead else None

    def look(self, index: int) -> str | None:
        self.ahead.extend(itertools.islice(self.text, max(0, index + 1 - len(self.ahead))))
        return self.ahead[index] if index < len(self.ahead) else None


def _parse(line: str, separator: str) -> list[str] | None:
    """The cells of a whole row; None if a quote is open at its end, or closed in the middle of a cell."""
    if '"' not in line:
        return line.rstrip("\r\n").split(separator)
    try:
        rows = list(csv.reader(io.StringIO(line, newline=""), delimiter=separator, strict=True, skipinitialspace=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _cells(lines: _Lines, separator: str, width: int, file: Path) -> Iterator[tuple[list[str], int]]:
    shapes: set[str] = set()
    while (line := lines.take()) is not None:
        number = lines.number
        if not line.strip():
            continue
        cells = _parse(line, separator)
        if cells is None:
            shapes |= _shapes(line.split(separator))
            cells = _over_lines(line, lines, separator, shapes)
        if cells is None:  # not really a quote: literal, if the line alone shows what its cells are
            cells = line.rstrip("\r\n").split(separator)
            if len(cells) > 2 == width and IMAGE_NAME.search(cells[0]):
                cells = [cells[0], separator.join(cells[1:])]
            if len(cells) != width:
                raise DataError(
                    f'{file} line {number}: a quote (") opens here and is not closed, so that it would swallow the '
                    'rows after it. Close it, or write a quote inside a quoted cell twice ("")'
                )
        shapes |= _shapes(cells)
        if len(shapes) > 1000:
            shapes = set(list(shapes)[:500])
        yield cells, number


def _over_lines(line: str, lines: _Lines, separator: str, shapes: set[str]) -> list[str] | None:
    """The cells of a row whose quoted cell continues over the next lines; None if these are rows of their own."""
    for index in range(LONGEST_CELL):
        following = lines.look(index)
        if following is None or _is_row(following, separator, shapes):
            return None
        line += following
        cells = _parse(line, separator)
        if cells is not None:
            for _ in range(index + 1):
                lines.take()
            return cells
    return None


def _is_row(line: str, separator: str, shapes: set[str]) -> bool:
    cells = line.rstrip("\r\n").split(separator)
    return len(cells) > 1 and bool(_shapes(cells) & shapes)


def _shapes(cells: list[str]) -> set[str]:
    """What the names of images in a row look like, by place: 1000_a1.jpg as "0:0_a.jpg". Other cells say nothing."""
    shapes = set()
    for place, cell in enumerate(cells):
        name = (cell or "").strip().strip('"')
        if (place == 0 and any(map(str.isdigit, name))) or IMAGE_NAME.search(name):
            shape = re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name)).replace("a0", "0").replace("0a", "0")
            if len(name) < 300 and " " not in shape:
                shapes.add(f"{place}:{re.sub(r'0+', '0', shape)}")
    return shapes

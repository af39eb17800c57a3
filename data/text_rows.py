"""Rows of text files: CSV with any separator, TSV, JSON lines, JSON. Nothing is misread silently: a line is read
as written, or refused with the file and the line."""

import contextlib
import csv
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from common.errors import DataError
from common.existence import ENDING
from common.text import open_text, read_text

SEPARATORS = (",", ";", "\t", "|")
IMAGE_NAME = re.compile(rf"\.(?:{ENDING})\b", re.IGNORECASE)
NUMBERED = re.compile(r"[^\W_]*\d[^\W_]*")  # a word with digits
BEHIND_ENTRY = re.compile(r"\s*(?:,\s*(?=\S)|(?=\]))")
LONGEST_CELL = 500  # lines of one quoted cell

csv.field_size_limit(1 << 30)  # a cell may hold an image in base64


LINES, TABLES = (".jsonl", ".ndjson", ".jsonlines"), (".csv", ".tsv")
ENDINGS = (".json", *LINES, *TABLES)


def read_json(file: Path):
    try:
        return json.loads(read_text(file), object_pairs_hook=partial(object_of, file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON: {error}. One object per line belongs in a .jsonl file") from None


def object_of(file: Path, pairs: list[tuple]) -> dict:
    """A JSON object. DataError if a key is there twice, as an image in a map of images to captions: one value would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DataError(f"{file}: the key {double!r} is there twice in one object. Put its values into one list")
    return content


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
    decoder, number = json.JSONDecoder(object_pairs_hook=partial(object_of, file)), 0
    with open_text(file) as content:
        text = content.read(chunk).lstrip()[1:].lstrip()
        while not text.startswith("]"):
            try:
                entry, end = decoder.raw_decode(text)
                behind = BEHIND_ENTRY.match(text, end)
                if behind is None:  # 12 may continue as 123
                    raise json.JSONDecodeError("the list has no end", text, end)
            except json.JSONDecodeError as error:
                more = content.read(chunk)
                if not more:
                    raise DataError(f"{file} entry {number}: not valid JSON: {error.msg}") from None
                text = (text + more).lstrip()
            else:
                yield entry
                text, number = text[behind.end() :], number + 1
        if (text[1:] + content.read(chunk)).strip():
            raise DataError(f"{file}: not valid JSON: there is more behind the end of the list")


def jsonl_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    decoder = json.JSONDecoder(object_pairs_hook=partial(object_of, file))
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line := line.strip():
                    yield number, decoder.decode(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file} line {number}: not valid JSON: {error}") from None
            except DataError as error:
                raise DataError(f"{error} (line {number})") from None


def csv_rows(file: Path, last_takes_rest: bool = False) -> Iterator[tuple[dict, str]]:
    """(row, "name line N") of a table with a header, which determines the separator: comma, semicolon, tab or |.

    A quoted cell may span several lines. A quote that opens and is not closed, so that it would swallow the rows
    after it, is taken literally where the line alone shows what its cells are; else it is an error. With
    `last_takes_rest` extra separators belong to the last cell (Kaggle's captions.txt).
    """
    with open_text(file, newline="") as text:
        (lines,) = itertools.tee(text, 1)  # which can be looked ahead of
        header, separator, number = _header(lines, file)
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                cells, lines_behind = _cells(line, lines, separator)
            except csv.Error:
                place = f"{file} line {number}"
                cells, lines_behind = _literal_cells(line, separator, len(header), place), 0
                if _closes_behind(line, lines, separator, len(header)):
                    raise DataError(
                        f'{place}: a quote (") opens here and is closed in a line that looks like a row of its own. If it '
                        'is none, keep the cell in one line; else write the quote twice ("") in a quoted cell'
                    ) from None
            if last_takes_rest and len(cells) > len(header):
                cells = line.rstrip("\r\n").split(separator, len(header) - 1)
            if len(cells) > len(header):
                advice = ". Quote captions with commas" if separator == "," else f", separated by {separator!r}"
                raise DataError(f"{file} line {number}: more fields than the header has{advice}")
            if separator == "|":
                cells = [cell.strip() for cell in cells]
            yield dict(itertools.zip_longest(header, cells)), f"{file.name} line {number}"
            number += lines_behind


def _header(lines: Iterator[str], file: Path) -> tuple[list[str], str, int]:
    """(names, separator, lines read)."""
    first, number, separators = next(lines, ""), 1, SEPARATORS
    written = re.fullmatch(r"sep=(.)\s*", first)  # Excel's own way to name it
    if written:
        first, number, separators = next(lines, ""), 2, written[1]
    parsed = {}
    for separator in separators:
        with contextlib.suppress(csv.Error):
            parsed[separator] = next(_reader(first, [], separator))
    if not parsed:
        raise DataError(f"{file} line 1: the header opens a quote and does not close it")
    separator = max(parsed, key=lambda separator: len(parsed[separator]))  # on a tie the first: the comma
    header = list(map(str.strip, parsed[separator]))
    if len(set(header)) < len(header):
        double = Counter(header).most_common(1)[0][0]
        raise DataError(f"{file} line 1: two columns are called {double!r}. Rename or remove one")
    return header, separator, number


def _reader(line: str, behind: Iterable[str], separator: str):
    """The rows of `line` and what is behind it; white space before a quote is none of the cell."""
    spaced = re.search(rf'(?:^|{re.escape(separator)})[^\S\t]+"', line) is not None
    return csv.reader(itertools.chain([line], behind), delimiter=separator, strict=True, skipinitialspace=spaced)


def _cells(line: str, lines: Iterator[str], separator: str) -> tuple[list[str], int]:
    """(cells of the row that begins with `line`, number of further `lines` that belong to it, which are consumed).

    Raises:
        csv.Error: a quote is not closed before another row begins, or closed in the middle of a cell.
    """
    _, ahead = itertools.tee(lines)
    signature = _signature(line, separator)
    same_row = itertools.takewhile(
        lambda other: separator not in other or _signature(other, separator) != signature, ahead
    )
    rows = _reader(line, itertools.islice(same_row, LONGEST_CELL), separator)
    cells, lines_behind = next(rows), rows.line_num - 1
    deque(itertools.islice(lines, lines_behind), maxlen=0)
    return cells, lines_behind


def _closes_behind(line: str, lines: Iterator[str], separator: str, width: int) -> bool:
    """Whether the row that begins with `line` is valid if lines that look like rows of their own belong to it."""
    _, ahead = itertools.tee(lines)
    try:
        return len(next(_reader(line, itertools.islice(ahead, LONGEST_CELL), separator))) == width
    except csv.Error:
        return False


def _signature(line: str, separator: str) -> str:
    """The same for two lines if both are rows: a cell is an image's name, or their first cells are numbered alike, a1-22 and
    b1-3; else the line itself."""
    if any(map(IMAGE_NAME.search, line.split(separator))):
        return "image"
    first = line.split(separator)[0].strip(' "')
    return NUMBERED.sub("0", first) if re.fullmatch(r"\S*\d\S*", first) else line


def _literal_cells(line: str, separator: str, width: int, where: str) -> list[str]:
    """The cells of a line whose quotes are none; DataError where they are not as many as the header has."""
    cells = line.rstrip("\r\n").split(separator)
    if width == 2 and IMAGE_NAME.search(cells[0]):
        cells = line.rstrip("\r\n").split(separator, 1)
    if len(cells) != width:
        raise DataError(
            f'{where}: a quote (") opens here and is not closed, so that it would swallow the '
            'rows after it. Close it, or write a quote inside a quoted cell twice ("")'
        )
    return cells

"""A journal: rows that a process appends as they are finished, so that a kill loses none."""

import json
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.locks import Busy, hold


class JournalInUse(UserError):
    of_one_shard = True


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of a file, except for one that a kill cut short; none if there is no file."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from (line for line in file if line.endswith("\n"))


def open_journal(path: Path):
    """The file, opened to append to, without a line that a kill cut short. JournalInUse if another run has it."""
    try:
        file, _ = hold(path)  # released when the process ends, however that happens
    except Busy:
        raise JournalInUse(f"{path}: another run is writing it. Let it finish, or stop it.") from None
    with open(path, "r+b") as lines:
        lines.truncate(sum(len(line) for line in lines if line.endswith(b"\n")))
    return file


def write_row(file, row: dict) -> None:
    """Append one row, so that it survives this process."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()

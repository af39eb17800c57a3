"""A journal: rows that a process appends as they are finished, so that a kill loses none."""

import json
from pathlib import Path

from common.errors import UserError
from common.locks import Busy, hold


class JournalInUse(UserError):
    of_one_shard = True


class Journal:
    """A file of JSON lines, opened to append to; `rows` are those that it had.

    Raises:
        JournalInUse: another run has it.
    """

    def __init__(self, path: Path):
        try:
            self.file, _ = hold(path)  # released when the process ends, however that happens
        except Busy:
            raise JournalInUse(f"{path}: another run is writing it. Let it finish, or stop it.") from None
        self.rows, end = [], 0
        with open(path, "r+b") as lines:
            for line in lines:
                try:
                    self.rows.append(json.loads(line[:-1]))  # a line that a kill cut short has no end to take away
                except ValueError:
                    break
                end += len(line)
            lines.truncate(end)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, row: dict) -> None:
        """Append one row, so that it survives this process."""
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

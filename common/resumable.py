"""Rows that processes write as they finish them, so that a run that was killed resumes without losing or repeating one.

Process N appends whole lines of JSON to OUTPUT.part-N; OUTPUT.settings.json says what they were made with.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def parts(output: Path) -> list[Path]:
    """The files that processes wrote, or are writing."""
    return sorted(output.parent.glob(f"{output.name}.part-*"))


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of a file but for the one that a kill cut in two."""
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))


def settings_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def check_settings(output: Path, settings: dict) -> None:
    """ValueError if OUTPUT was begun with other settings; `settings` is what JSON can hold."""
    beside = settings_file(output)
    before = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    differ = [name for name in settings if before.get(name) != settings[name]]
    if differ:
        what = "; ".join(f"{name} was {before.get(name)!r}, is {settings[name]!r}" for name in differ)
        raise UserError(f"{output} was begun with other settings: {what}. Name another --output.")


def open_part(output: Path, process: int):
    """This process's part, to append to, without a line that a kill cut in two. ValueError if another run has it."""
    path = output.with_name(f"{output.name}.part-{process}")
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller's `with` closes it
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however that ends
        except OSError:
            file.close()
            raise UserError(f"{path}: another run is writing it. Let it finish, or stop it.") from None
    with open(path, "r+b") as lines:
        lines.truncate(sum(len(line) for line in lines if line.endswith(b"\n")))
    return file


def write_row(file, row: dict) -> None:
    """Append one row, so that it outlives this process."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()

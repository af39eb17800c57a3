"""The files of a folder, the same for every reader: each once, in order, without what programs leave there."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LEFT_BY_PROGRAMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


def walk(folder: str | os.PathLike, left_out: Counter | None = None) -> Iterator[str]:
    """Paths of the files in a folder and below, sorted within each folder; linked folders are entered once each.

    Args:
        left_out: counts what is not entered: hidden and programs' own folders, and those that may not be read.
    """
    left_out = Counter() if left_out is None else left_out
    entered = {os.path.realpath(folder)}

    def unreadable(error: OSError) -> None:
        left_out[f"{error.filename} ({error.strerror})"] += 1

    for place, below, names in os.walk(folder, followlinks=True, onerror=unreadable):
        kept = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(place, name))
            if name.startswith(".") or name in LEFT_BY_PROGRAMS:
                left_out[f"folders called {name}"] += 1
            elif real not in entered and not name.endswith(".shards"):  # infer.py's own, while it runs
                entered.add(real)
                kept.append(name)
        below[:] = kept
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith("."))


def files_below(path: Path, ending: str) -> list[Path]:
    """The files in a folder and below whose names end so."""
    return [Path(file) for file in walk(path) if file.lower().endswith(ending)]

"""Names of images: each differs from the others, and leads out of no folder."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import xxhash

from common.existence import ENDINGS

RESERVED = r'[<>:"|?*]' if os.name == "nt" else ":"  # characters that Windows refuses in names; a drive everywhere


def short(*words: str) -> int:
    """A stand-in for words, so that those of a million rows fit in little memory."""
    return xxhash.xxh3_64_intdigest("\n".join(words).encode("utf-8", "surrogateescape"))


def printable(name: str) -> str:
    """The name of a file, which may be any bytes, as text."""
    return name.encode("utf-8", "backslashreplace").decode()


def folded(name: str) -> int:
    """Equal for names that some file system takes for the same: in another case, or another Unicode form."""
    return short(unicodedata.normalize("NFC", name).casefold())


class Different:
    """Makes names differ from each other.

    Args:
        numbered: called with a name that is taken and a number; returns another name.
        same: equal for names that are the same.
    """

    def __init__(self, numbered: Callable[[str, int], str], same: Callable[[str], int] = folded):
        self.numbered, self.same, self.taken = numbered, same, {}

    def __call__(self, name: str) -> str:
        """The name, or if it is taken the name with the first free number."""
        free = name
        while self.same(free) in self.taken:
            self.taken[self.same(name)] += 1
            free = self.numbered(name, self.taken[self.same(name)])
        self.taken[self.same(free)] = 1
        return free


class EachOnce:
    """Of rows, those of different images; a name in `column` that an image of another version has gets a number.

    Args:
        version: called with a row; returns what differs when the image does.
    """

    def __init__(self, version: Callable[[dict], str], column: str = "name"):
        self.version, self.column = version, column
        self.seen, self.different = set(), Different("{}#{}".format, short)

    def __call__(self, rows: Iterable[dict]) -> Iterator[dict]:
        for row in rows:
            image = short(row[self.column], self.version(row))
            if image not in self.seen:
                self.seen.add(image)
                yield row | {self.column: self.different(row[self.column])}


def inside(name: str) -> str:
    """The name without anything that leads out of the folder it is put in: a source's names are not to be trusted."""
    parts = re.split(r"[/\\]", name)
    return "/".join(re.sub(RESERVED, "_", part) for part in parts if part.strip(". ")) or "image"


def stem_and_ending(name: str) -> tuple[str, str]:
    """Of the name of an image; all of a name that has no image's ending is its stem. The number that makes a name differ
    from others is no part of its ending."""
    stem, ending = os.path.splitext(re.sub(r"(#\d+)+$", "", name))
    return (stem, ending.lower()) if ending.lower() in ENDINGS else (name, ".jpg")

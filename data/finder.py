"""From an image's name in a data set to the path of its file."""

import contextlib
import functools
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from common.errors import DataError
from common.existence import ENDINGS
from common.remote import is_remote, local_copy
from data.images import ImageError
from data.walk import walk

IMAGE_FOLDERS = (
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Images",
    "images",
    "flickr30k-images",
    "flickr30k_images",
    "train2014",
    "val2014",
    # Archives of Kaggle nest folders.
    "Flicker8k_Dataset/Flicker8k_Dataset",
    "Flickr8k_Dataset/Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "Images/Images",
    "images/images",
    "flickr30k-images/flickr30k-images",
    "flickr30k_images/flickr30k_images",
)
MOST_FILES = 3_000_000  # that are searched below a folder for a name that is nowhere else


class Finder:
    """find(name) -> the path of the image's file: the file of exactly this name in one of the folders; else the one file
    below them that fits: in another case or Unicode form, from another folder, without its ending, or COCO's number. A
    file that another row names exactly is never taken. A name found nowhere gets its path in the first folder, for the
    message."""

    def __init__(self, folders: Iterable[str], names: Callable[[], Iterable[str]] = tuple):
        """
        Args:
            folders: where to look, in this order; everything below the first is searched.
            names: called once if a name is not found exactly: all names of the source.
        """
        self.folders, self.names = [str(folder) for folder in folders], names
        self.taken: dict[str, str] = {}  # path of a file -> the name that it was found by

    def __call__(self, name: str) -> str:
        """
        Raises:
            ImageError: several files fit. DataError: two names have the same file.
        """
        if is_remote(name):
            return str(local_copy(name))
        path = self.exact(name)
        if path is None:
            fitting = self._fitting(name)
            if len(fitting) > 1:
                raise ImageError(
                    f"{name}: found in {len(fitting)} places: {' and '.join(fitting[:3])}. Give the folder that the names "
                    "are relative to with --image_dir"
                )
            if not fitting:
                return os.path.normpath(os.path.join(self.folders[0], name))
            path = fitting[0]
        other = self.taken.setdefault(path, name)
        if self._full(other) != self._full(name):
            raise DataError(
                f"{other} and {name} would both be {path}. Give the folder that the names are relative to with --image_dir"
            )
        return path

    def _full(self, name: str) -> str:
        path = os.path.abspath(os.path.join(self.folders[0], name.replace("\\", "/")))
        return unicodedata.normalize("NFC", path)

    def exact(self, name: str) -> str | None:
        for form in forms(name):
            for folder in self.folders:
                path = os.path.join(folder, form)
                if os.path.isfile(path):
                    return os.path.normpath(path)
        return None

    def _fitting(self, name: str) -> list[str]:
        """The files that a name may mean and that no row names exactly."""
        parts = _key(name).strip("/").split("/")
        candidates = self.files.get(parts[-1], [])
        if not candidates and os.path.splitext(name)[1].lower() not in ENDINGS:
            stem = parts[-1]
            number = re.fullmatch(r"(?:coco_)?0*(\d+)", stem)
            stems = dict.fromkeys([stem, *([number[1], number[1].zfill(12)] if number else [])])
            candidates = [path for each_stem in stems for path in self.files.get(f"{each_stem}.*", [])]
        candidates = [path for path in candidates if os.path.realpath(path) not in self.named]
        home = os.path.dirname(name.replace("\\", "/"))
        homes = tuple(os.path.join(os.path.normpath(os.path.join(folder, home)), "") for folder in self.folders)
        if home and any(map(os.path.isdir, homes)):  # the folder is there, so its file is missing, not moved
            candidates = [path for path in candidates if os.path.normpath(path).startswith(homes)]
        for length in range(2, len(parts) + 1):  # as much of the name as distinguishes the files
            narrower = [path for path in candidates if _key(path).split("/")[-length:-1] == parts[-length:-1]]
            candidates = narrower or candidates
        return candidates

    @functools.cached_property
    def files(self) -> dict[str, list[str]]:
        """Paths below the first folder by name, and by stem, COCO's without the split, followed by .*"""
        files = defaultdict(list)
        for path in itertools.islice(walk(self.folders[0] or "."), MOST_FILES):
            name = os.path.basename(path)
            stem, ending = os.path.splitext(name)
            files[_key(name)].append(path)
            if ending.lower() in ENDINGS:
                stem = re.sub(r"^COCO_(?:train|val|test)\d{4}_", "", stem)
                files[f"{_key(stem)}.*"].append(path)
        return files

    @functools.cached_property
    def named(self) -> set[str]:
        """Real paths of files that the source names exactly."""
        return set(map(os.path.realpath, filter(None, map(self.exact, self.names()))))


def folders_beside(file: Path) -> tuple[str, ...]:
    """Where the images of an annotation file lie: next to it, and in the usual folders there, those of its split
    (train2014, val, ...) first."""
    named = re.findall(r"(?:train|val|test)(?:2014|2015|2017)?", file.stem)
    roots = [file.parent, file.parent / "images", file.parent.parent, file.parent.parent / "images"]
    folders = [root / folder for root in roots for folder in ("", *named, *IMAGE_FOLDERS)]
    return tuple(dict.fromkeys(map(str, filter(Path.is_dir, folders))))


def forms(name: str) -> list[str]:
    """The name as it may be written on disk: as it is, with / for \\, in Unicode's composed and decomposed form, and in
    bytes of Windows-1252."""
    slashes = (name, name.replace("\\", "/"))
    variants = [*slashes, *(unicodedata.normalize(form, text) for text in slashes for form in ("NFC", "NFD"))]
    with contextlib.suppress(UnicodeError):
        variants += [os.fsdecode(text.encode("cp1252")) for text in slashes]
    return list(dict.fromkeys(variants))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()

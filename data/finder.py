"""From an image's name in a data set to the path of its file."""

import contextlib
import os
import re
import unicodedata
from pathlib import Path

from common.errors import DataError
from common.remote import is_remote, local_copy

IMAGE_FOLDERS = (
    "",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Images",
    "images",
    "flickr30k-images",
    "flickr30k_images",
)
MOST_FILES = 3_000_000  # that are searched below a folder for a name that is nowhere else


class Finder:
    """find(name) -> the path of the image's file: in the folders given, or anywhere below them if only one file there
    has the name. Names may have backslashes, another Unicode form or case, or come from another machine.
    A name found nowhere gets its path in the first folder, for the message."""

    def __init__(self, folders: list, beside: Path | None = None, search: bool = True):
        """
        Args:
            folders: where to look, in this order.
            beside: the annotation file, if no folder is given: images are looked for next to it, and in the usual
                folders there, those of its split (train2014, val, ...) first.
            search: also search everything below.
        """
        if beside is not None and not folders:
            named = re.findall(r"(?:train|val|test)(?:2014|2015|2017)?", beside.stem)
            roots = [beside.parent, beside.parent / "images", beside.parent.parent, beside.parent.parent / "images"]
            folders = [root / folder for folder in ["", *named] for root in roots]
            folders += [root / folder for root in roots for folder in (*IMAGE_FOLDERS[1:], "train2014", "val2014")]
            self.below = os.path.abspath(beside.parent)
        else:
            self.below = os.path.abspath(folders[0])
        self.folders = [os.path.abspath(folder) for folder in dict.fromkeys(map(str, folders))]
        self.given = str(folders[0])  # as it was written
        self.search, self.files, self.claimed = search, None, {}

    def __call__(self, name: str) -> str:
        if is_remote(name):
            return str(local_copy(name))
        for form in forms(name):
            for folder in self.folders:
                path = os.path.join(folder, form)
                if os.path.exists(path):
                    return os.path.normpath(path)
        return self._below(name) or os.path.normpath(os.path.join(self.folders[0], name))

    def by_id(self, image_id: str) -> str | None:
        """The file of an image that is known by its number or by its name without ending: COCO's
        COCO_val2014_000000000042.jpg, 000000000042.jpg or 42.jpg for 42. None if there is none, or more than one."""
        number = re.fullmatch(r"(?:coco_)?0*(\d+)", image_id)
        names = [image_id, *([number[1], number[1].zfill(12)] if number else [])]
        found = dict.fromkeys(path for name in names for path in self._index().get(f"stem {_key(name)}", ()))
        return next(iter(found)) if len(found) == 1 else None

    def _below(self, name: str) -> str | None:
        if not self.search:
            return None
        wanted = _key(name).strip("/").split("/")
        found = self._index().get(wanted[-1], [])
        for length in range(2, len(wanted) + 1):  # as much of the name as distinguishes the files
            if len(found) > 1:
                found = [path for path in found if _key(path).split("/")[-length:] == wanted[-length:]]
        if len(found) != 1:
            return None
        other = self.claimed.setdefault(found[0], name)
        if other != name:
            raise DataError(
                f"{other} and {name} would both be {found[0]}, the only file of that name. Give the folder that the "
                "names are relative to with --image_dir"
            )
        return found[0]

    def _index(self) -> dict[str, list[str]]:
        if self.files is None:
            self.files, number = {}, 0
            for folder, _, names in os.walk(self.below):
                for name in names:
                    path = os.path.join(folder, name)
                    self.files.setdefault(_key(name), []).append(path)
                    stem = re.sub(r"^COCO_(?:train|val|test)\d{4}_", "", os.path.splitext(name)[0])
                    self.files.setdefault(f"stem {_key(stem)}", []).append(path)
                number += len(names)
                if number > MOST_FILES:
                    break
        return self.files


def forms(name: str) -> list[str]:
    """The name as it may be written on disk: as it is, with / for \\, in Unicode's composed and decomposed form, and in
    bytes of Windows-1252."""
    found = [name]
    if "\\" in name:
        found.append(name.replace("\\", "/"))
    if not name.isascii():
        found += [unicodedata.normalize(form, text) for text in tuple(found) for form in ("NFC", "NFD")]
        if os.name == "posix":
            with contextlib.suppress(UnicodeEncodeError):
                found += [os.fsdecode(text.encode("cp1252")) for text in tuple(found[:2])]
    return list(dict.fromkeys(found))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()

"""Predictions and references from files of every format that data.reader reads, and which prediction belongs to which image.

Image ids are compared as text: COCO writes numbers, others file names. A prediction finds its image by its id and by its file
name together: the whole name, its base name with or without ending, or COCO's number in it, where only one image has it.
"""

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.errors import DataError
from data.checks import check_rows, clean_captions
from data.finder import Finder
from data.reader import Source
from data.rows import Options, Row
from data.text_rows import TABLES

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class References:
    captions: dict[str, list[str]]  # by image id, in the file's order
    names: dict[str, str]  # file names of those images that have one
    columns: dict[str, dict]  # what else the file says about each image, for scores of subsets


def load_predictions(
    path: str | os.PathLike, references: References | None = None, caption_column: str | None = None
) -> dict[str, str]:
    """{image id: caption}, exactly one caption per image; with references, by their image ids. Images with an
    error from infer.py instead of a caption are an error if the references have them, else only counted."""
    matching = Matching(references)
    predictions: dict[str, str] = {}
    failed = {}
    for row in rows_of(Path(path), predictions=True, caption_column=caption_column):
        place = f"{path}, {row.where}"
        image_id = matching.image_of(row, place)
        captions = [] if row.error and row.captions in ([], [""], [None]) else row.captions
        if row.error and not captions:
            failed[image_id] = row.error
            continue
        if image_id in predictions or len(captions) > 1:
            raise DataError(
                f"{place}: image {image_id!r} has more than one predicted caption. Scores compare one caption per "
                "image with all its references: keep one."
            )
        if not captions:
            raise DataError(
                f"{place}: image {image_id!r} has an empty list of captions. A prediction may be an empty string, but it must "
                "be there."
            )
        predictions[image_id] = _text(captions[0], place)
    needed = [image for image in failed if references and image in references.captions and image not in predictions]
    if not predictions and not failed:
        raise DataError(f"{path} is empty.")
    if needed:
        shown = "; ".join(f"{image!r}: {failed[image]}" for image in needed[:3])
        raise DataError(
            f"{path}: {len(needed)} images of the references have an error instead of a caption ({shown}). Caption them, or "
            "take them out of the references."
        )
    if failed:
        logger.warning("%s: left out %d images with an error, such as %r", path, len(failed), next(iter(failed)))
    return predictions


def load_references(path: str | os.PathLike) -> dict[str, list[str]]:
    """{image id: captions}, in the file's order; captions of one image may be spread over many entries."""
    return read_references(path).captions


def read_references(path: str | os.PathLike, split: str | None = None) -> References:
    """The references in a file or folder; where it has splits, those of `split`."""
    found = References({}, {}, {})
    splits = Counter()
    for row in rows_of(Path(path)):
        splits[row.split] += 1
        if row.split not in (None, split) and split is not None:
            continue
        image_id = _id_of(row, f"{path}, {row.where}")
        if not row.captions:
            raise DataError(f"{path}, {row.where}: image {image_id!r} has no reference captions.")
        captions = clean_captions(row.captions, f"{path}, {row.where}", image_id)
        found.captions.setdefault(image_id, []).extend(captions)
        if row.name:
            found.names[image_id] = row.name
        scalars = {key: value for key, value in row.columns.items() if isinstance(value, str | int | float | bool)}
        found.columns.setdefault(image_id, {}).update(scalars)
    if not found.captions and splits:
        present = ", ".join(sorted(filter(None, splits)))
        raise DataError(f"{path} has no image of split {split!r}; it has {present}: pass --split.")
    if not found.captions:
        raise DataError(f"{path} is empty.")
    return found


def rows_of(path: Path, predictions: bool = False, caption_column: str | None = None) -> Iterator[Row]:
    """The rows of a file or folder. The name of a single file does not make all of it a split."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    literal = predictions and path.suffix.lower() not in TABLES
    options = Options(images=False, predictions=predictions, literal=literal, caption_column=caption_column)
    source = Source(str(path), options)
    for part in source.parts:
        yield from source.read(dataclasses.replace(part, split=None) if path.is_file() else part)


def _id_of(row: Row, place: str) -> str:
    image_id = row.image_id or row.name
    if image_id is None:
        raise DataError(
            f"{place}: no 'image_id' (or 'image') that is text or a whole number. Columns: {', '.join(row.columns)}."
        )
    return image_id


def _text(caption, place: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{place}: a caption must be text, found {type(caption).__name__} {caption!r:.80}.")
    check_rows(caption, place)
    return caption.encode("utf-8", "replace").decode()  # half an emoji


class Matching:
    """From predictions to the image ids of references; without references, to their own."""

    def __init__(self, references: References | None):
        self.references, self.tables = references, []
        for short in (str, base_name, stem, coco_number) if references else ():
            table: dict[str, str | None] = {}
            for image_id in references.captions:
                for name in {short(n) for n in (image_id, references.names.get(image_id)) if n} - {None}:
                    table[name] = image_id if table.get(name, image_id) == image_id else None  # None: of several
            self.tables.append((short, table))

    def image_of(self, row: Row, place: str) -> str:
        own = _id_of(row, place)
        by_id, by_name = (self._image(text, place) for text in (row.image_id, row.name))
        if by_id is not None and by_name is not None and by_id != by_name:
            raise DataError(
                f"{place}: its id {row.image_id!r} is that of {self._shown(by_id)} in the references, its file {row.name!r} that "
                f"of {self._shown(by_name)}. Remove the column that is wrong."
            )
        return by_id or by_name or own

    def _image(self, text: str | None, place: str) -> str | None:
        for short, table in self.tables if text is not None else ():
            name = short(text)
            if name is not None and name in table:
                if table[name] is None:
                    raise DataError(
                        f"{place}: {name!r} is the name of several images of the references. Give the predictions the "
                        "references' own image ids or whole paths."
                    )
                return table[name]
        return None

    def _shown(self, image_id: str) -> str:
        return f"image {image_id!r} ({self.references.names.get(image_id, 'without a file name')})"


def base_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def stem(name: str) -> str:
    return re.sub(r"\.[A-Za-z]{2,5}$", "", base_name(name))


def coco_number(name: str) -> str | None:
    """COCO's file names end in the image id: COCO_val2014_000000000042.jpg is 42."""
    number = re.search(r"(?:^|_)(\d{12})$", stem(name))
    return str(int(number[1])) if number else None


def find_images(image_dir: str | os.PathLike | None, references: dict, names: dict | None = None) -> list[Path]:
    """The image file of each image id, in `image_dir` or below: the one named in `names`, {image id: file name}, else the
    file that the id names, with any ending, or COCO's, which ends in the number."""
    if image_dir is None:
        raise DataError("CLIP-based scores need the images: pass --image_dir, the folder they are in.")
    named = [(names or {}).get(image_id, image_id) for image_id in references]
    find = Finder([str(image_dir)], lambda: named)
    files = [Path(find(name)) for name in named]
    if absent := [image_id for image_id, file in zip(references, files, strict=True) if not file.exists()]:
        raise DataError(
            f"{image_dir} lacks {len(absent)} of the {len(references)} images (first: {absent[0]!r}). A file must be "
            "named after its image id, with or without an extension such as .jpg."
        )
    return files

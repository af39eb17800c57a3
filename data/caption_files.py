"""Predictions and references from files, in every format that data sets come in, and which prediction is of which image.

Image ids are compared as text: COCO writes numbers, others file names. A prediction finds its image by its id and its file's
name together: both must mean the same image. A name is looked up as it is, then by its end, without its ending, and by COCO's
number; never as an image that another prediction names exactly.
"""

import itertools
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from common.errors import DataError
from data.checks import check_rows, clean_captions
from data.finder import Finder
from data.formats import flickr8k
from data.reader import Source
from data.rows import Options, Part, Row
from data.text_rows import TABLES

logger = logging.getLogger(__name__)


@dataclass
class References:
    captions: dict[str, list[str]] = field(default_factory=dict)  # by image id, in the file's order
    names: dict[str, str] = field(default_factory=dict)  # file names of those images that have one
    columns: dict[str, dict] = field(
        default_factory=dict
    )  # what else the file says of each image, for scores of subsets
    aliases: dict[str, set[str]] = field(default_factory=dict)  # all that the file calls each image


def load_predictions(
    path: str | os.PathLike, references: References | None = None, common: bool = False, **columns: str | None
) -> dict[str, str]:
    """{image id: caption}, exactly one caption per image; with references, by their image ids.

    Args:
        common: only images that the references have, too, so that others may have errors.
        columns: image_column and caption_column, if their names are unusual.

    Raises:
        DataError: a row has no caption or several, its image is not clear, or infer.py wrote an error in place of the
            caption of an image that the references have; other such rows are only counted.
    """
    references = references or References()
    options = Options(images=False, predictions=True, literal=Path(path).suffix.lower() not in TABLES, **columns)
    rows = list(_rows(path, options))
    predictions: dict[str, str] = {}
    failed = {}
    for (row, place), image in zip(rows, _matched(rows, references), strict=True):
        if row.error and not any(row.captions):
            failed[image] = row.error
            continue
        if not row.captions:
            raise DataError(
                f"{place}: image {image!r} has an empty list of captions. A prediction may be an empty string, but it "
                "must be there."
            )
        if image in predictions or len(row.captions) > 1:
            raise DataError(
                f"{place}: image {image!r} has more than one predicted caption. Scores compare one caption per image with "
                "all its references: keep one."
            )
        predictions[image] = _text(row.captions[0], place)
    needed = references.captions.keys() & failed.keys() - predictions.keys()
    if needed and not common:
        examples = "; ".join(f"{image!r}: {failed[image]}" for image in sorted(needed)[:3])
        raise DataError(
            f"{path}: {len(needed)} images of the references have an error instead of a caption ({examples}). Caption "
            "them, take them out of the references, or pass --common."
        )
    if failed:
        logger.warning("%s: left out %d images with an error, such as %r", path, len(failed), next(iter(failed)))
    return predictions


def _text(caption: object, place: str) -> str:
    """A prediction as it is: a model may answer with nothing, or with the word None."""
    if not isinstance(caption, str):
        raise DataError(f"{place}: a caption must be text, found {type(caption).__name__} {caption!r:.80}.")
    check_rows(caption, place)
    return caption.encode("utf-8", "replace").decode()  # a model's answer may be cut within an emoji


def load_references(path: str | os.PathLike) -> dict[str, list[str]]:
    """{image id: captions}, in the file's order; captions of one image may be spread over many rows."""
    return read_references(path).captions


def read_references(path: str | os.PathLike, split: str | None = None) -> References:
    """The references in a file or folder; of one that has splits, those of `split`."""
    references = References()
    others: set[str] = set()
    keys: dict[str, str | None] = {}  # of each image
    for row, place in _rows(path, Options(images=False)):
        if split is not None and row.split not in (None, split):
            others.add(row.split)
            continue
        if isinstance(row.image, str):
            row.image = row.key
        image = _called(row, place)
        if not row.captions:
            raise DataError(f"{place}: image {image!r} has no reference captions.")
        if keys.setdefault(image, row.key) != row.key:
            raise DataError(
                f"{place}: {image!r} names another image than in an earlier row. Give each image its own id."
            )
        references.captions.setdefault(image, []).extend(clean_captions(row.captions, place, repr(image)))
        names = {image, row.name, _file_name(row)}
        if row.name is None:  # an id next to a name is a running number as often as not
            names.add(row.columns.get("id"))
        else:
            references.names[image] = _file_name(row)
        references.aliases.setdefault(image, set()).update(map(str, names - {None}))
        columns = {name: value for name, value in row.columns.items() if isinstance(value, str | int | float)}
        references.columns.setdefault(image, {}).update(columns)
    if not references.captions:
        no_split = f"image of split {split!r}; it has {', '.join(sorted(others))}: pass --split"
        raise DataError(f"{path} has no {no_split if others else 'captions'}.")
    return references


def _rows(path: str | os.PathLike, options: Options) -> Iterator[tuple[Row, str]]:
    """(row, place) of a file or folder; the name of a file is no split, as all of it was asked for."""
    place = Path(os.path.abspath(path))  # no id of a Hub data set
    if place.suffix.lower() == ".txt" and not flickr8k.matches(place):
        options.format = "annotations"
    source = Source(str(place), options)
    for part in source.parts:
        part = replace(part, split=None) if place.is_file() else part
        for row in source.read(part):
            yield row, _place(row, part)


def _file_name(row: Row) -> str | None:
    return row.image if isinstance(row.image, str) else row.name


def _place(row: Row, part: Part) -> str:
    return f"{part.place}, {row.where.removeprefix(Path(part.place).name).strip()}"


def _called(row: Row, place: str) -> str:
    """What a source calls an image: its id, else its name."""
    image = row.image_id or _file_name(row) or row.key
    if not image:
        raise DataError(f"{place}: no 'image_id' (or 'image') that is text or a whole number.")
    return image


def match_images(names: list[str], references: References) -> list[str]:
    """The image id that the references have for each name or id of an image, else the name itself."""
    return _matched([(Row(where=name, image=None, image_id=name), name) for name in names], references)


def _matched(rows: list[tuple[Row, str]], references: References) -> list[str]:
    """The image id that the references have for each prediction; the prediction's own where they have none."""
    names = [list(filter(None, [row.image_id, _file_name(row)])) for row, _ in rows]
    images = ImagesByName(references.aliases, itertools.chain.from_iterable(names))
    matched = []
    for (row, place), of_row in zip(rows, names, strict=True):
        fitting = list(filter(None, map(images.called, of_row)))
        both = set.intersection(*fitting) if fitting else {_called(row, place)}
        if not both:
            raise DataError(
                f"{place}: id {of_row[0]!r} is image {min(fitting[0])!r} of the references, and file {of_row[1]!r} is image "
                f"{min(fitting[1])!r}. Remove the wrong column of the predictions."
            )
        if len(both) > 1:
            raise DataError(
                f"{place}: {_tails(of_row[-1])[-1]!r} is the name of several images of the references. Give the predictions "
                "the references' own image ids or whole paths."
            )
        matched.append(both.pop())
    return matched


class ImagesByName:
    """Finds images of the references by a name: as it is, by its end, without its ending, by COCO's number.

    Args:
        aliases: the names of each image.
        names: all that will be looked up; an image that one of them is exactly is no other's.
    """

    def __init__(self, aliases: dict[str, set[str]], names: Iterable[str]):
        self.tables = {form: defaultdict(set) for form in FORMS}
        for form, table in self.tables.items():
            for image, its_names in aliases.items():
                for text in itertools.chain.from_iterable(map(form, its_names)):
                    table[text].add(image)
        exact = [self.tables[_whole].get(*_whole(name), ()) for name in names]
        self.taken = set().union(*(images for images in exact if len(images) == 1))

    def called(self, name: str) -> set[str]:
        for form, table in self.tables.items():
            for images in filter(None, map(table.get, form(name))):
                if form is _whole or len(images) > 1:
                    return images
                if images - self.taken:
                    return images
        return set()


def _whole(name: str) -> list[str]:
    return [unicodedata.normalize("NFC", name.replace("\\", "/"))]


def _tails(name: str) -> list[str]:
    """a/b/1.jpg, b/1.jpg, 1.jpg: as much of the name as distinguishes the images."""
    parts = PurePosixPath(*_whole(name)).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _stems(name: str) -> list[str]:
    return [re.sub(r"\.[A-Za-z]{2,5}$", "", tail) for tail in _tails(name)]


def _numbers(name: str) -> list[str]:
    """COCO's file names end in the image id: COCO_val2014_000000000042.jpg is 42."""
    number = re.search(r"(?:^|[_/])(\d{12})$", _stems(name)[0])
    return [str(int(number[1]))] if number else _stems(name)[-1:]


FORMS = (_whole, _tails, _stems, _numbers)


def in_both(predictions: dict, references: dict) -> tuple[dict, dict]:
    """The images that both have, in the references' order; how many are left out is logged."""
    common = [image for image in references if image in predictions]
    if not common:
        first = f"{next(iter(predictions), None)!r} and {next(iter(references))!r}"
        raise DataError(f"--common: predictions and references have no image in common, such as {first}.")
    left_out = len(predictions) - len(common), len(references) - len(common)
    logger.info("%d images in common; left out %d predictions and %d images with references", len(common), *left_out)
    return {image: predictions[image] for image in common}, {image: references[image] for image in common}


def find_images(image_dir: str | os.PathLike | None, references: dict, names: dict | None = None) -> list[Path]:
    """The image file of each image id, found like those of a data set: by its name in `names`, {image id: file name}, or
    by its id, with any ending, or COCO's number."""
    if image_dir is None:
        raise DataError("CLIP-based scores need the images: pass --image_dir, the folder they are in.")
    calls = {image: list(filter(None, [(names or {}).get(image), image])) for image in references}
    find = Finder([image_dir], lambda: itertools.chain.from_iterable(calls.values()))
    files = {image: next(filter(os.path.isfile, map(find, its_names)), None) for image, its_names in calls.items()}
    if absent := [image for image, file in files.items() if file is None]:
        raise DataError(
            f"{image_dir} lacks {len(absent)} of the {len(references)} images (first: {absent[0]!r}). A file must be "
            "named after its image id, with or without an extension such as .jpg."
        )
    return list(map(Path, files.values()))

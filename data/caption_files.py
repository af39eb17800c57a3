"""Reads predictions and references from files, in the formats that people have.

Formats, recognized by content: COCO results `[{"image_id": 1, "caption": "..."}]`; COCO annotations (`images` and
`annotations`) and VizWiz'; Karpathy's JSON (`images` with `sentences`); TextCaps' (`data`); Flickr8k's token.txt and
captions.txt; JSONL, CSV and Parquet with a column of image ids or image files and one of captions, such as infer.py writes; a
plain map `{"1": "caption"}` or `{"1": ["caption", "caption"]}`.

Image ids are compared as text: COCO writes numbers, others file names. Predictions find their references by id, file name,
or base name with or without extension, where only one image has it.
"""

import dataclasses
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow
import pyarrow.parquet

from common.errors import UserError
from common.text import TextError, read_text
from data.checks import check_rows
from data.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, NUMBERED_CAPTION, captions_of, usual_name
from data.formats import annotations, flickr8k
from data.rows import split_name
from data.text_rows import csv_rows

logger = logging.getLogger(__name__)

IDS = ("image_id", "cocoid", "imgid", "id")
CAPTIONS = ("caption", "captions", "prediction", "predicted_caption", "generated_caption", *CAPTION_COLUMNS)
CAPTIONS += ("generated_text", "generated", "hypothesis", "response", "output", "answer", "pred")


class CaptionFileError(UserError):
    """A captions file that cannot be used; the message names the file and the place."""


@dataclasses.dataclass
class Entry:
    """What a file says about one image: `captions`, or the `error` that infer.py wrote instead."""

    image_id: str
    captions: list[str]
    place: str
    name: str | None = None  # of the image's file
    error: str | None = None
    columns: dict = dataclasses.field(default_factory=dict)
    split: str | None = None


@dataclasses.dataclass
class References:
    captions: dict[str, list[str]]  # by image id, in the file's order
    names: dict[str, str]  # file names of those images that have one
    columns: dict[str, dict]  # what else the file says about each image, for scores of subsets


def load_predictions(path: str | os.PathLike, references: References | None = None) -> dict[str, str]:
    """{image id: caption}, exactly one caption per image; with references, by their image ids. Images with an
    error from infer.py instead of a caption are an error if the references have them, else only counted."""
    entries = list(_entries(Path(path)))
    ids = _matched([entry.name or entry.image_id for entry in entries], entries, references)
    predictions: dict[str, str] = {}
    failed = {}
    for entry, image_id in zip(entries, ids, strict=True):
        if entry.error is not None:
            failed[image_id] = entry.error
            continue
        if image_id in predictions or len(entry.captions) != 1:
            raise CaptionFileError(
                f"{entry.place}: image {image_id!r} has more than one predicted caption. Scores compare one caption per "
                "image with all its references: keep one."
                if entry.captions
                else f"{entry.place}: image {image_id!r} has an empty list of captions. A prediction may be an empty string, "
                "but it must be there."
            )
        predictions[image_id] = entry.captions[0]
    needed = [image for image in failed if references and image in references.captions and image not in predictions]
    if needed:
        shown = "; ".join(f"{image!r}: {failed[image]}" for image in needed[:3])
        raise CaptionFileError(
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
    """The references in a file; from Karpathy's JSON, those of `split`."""
    found = References({}, {}, {})
    splits = Counter()
    for entry in _entries(Path(path)):
        if entry.split is not None and split is not None:
            splits[entry.split] += 1
            if entry.split != split:
                continue
        if not entry.captions:
            raise CaptionFileError(f"{entry.place}: image {entry.image_id!r} has no reference captions.")
        for text in entry.captions:
            found.captions.setdefault(entry.image_id, []).extend(_captions(text, entry.place, written=True))
        if entry.name:
            found.names[entry.image_id] = entry.name
        found.columns.setdefault(entry.image_id, {}).update(entry.columns)
    if not found.captions and splits:
        raise CaptionFileError(
            f"{path} has no image of split {split!r}; it has {', '.join(sorted(splits))}: pass --split."
        )
    return found


def _matched(names: list[str], entries: list[Entry], references: References | None) -> list[str]:
    """The image id that the references have for each entry; the entry's own where they have none."""
    if references is None:
        return [entry.image_id for entry in entries]
    tables: list[dict[str, str | None]] = []
    for short in (str, _base, _stem, _number):
        table: dict[str, str | None] = {}
        for image_id in references.captions:
            for name in {short(name) for name in (image_id, references.names.get(image_id)) if name} - {None}:
                table[name] = None if table.get(name, image_id) != image_id else image_id  # None: ambiguous
        tables.append(table)
    found = []
    for entry, name in zip(entries, names, strict=True):
        image_id = entry.image_id if entry.image_id in references.captions else None
        for short, table in zip((str, _base, _stem, _number), tables, strict=True):
            if image_id is not None:
                break
            candidates = [short(text) for text in (entry.image_id, name)]
            hits = [text for text in candidates if text is not None and text in table]
            if hits and table[hits[0]] is None:
                raise CaptionFileError(
                    f"{entry.place}: {hits[0]!r} is the name of several images of the references. Give the predictions "
                    "the references' own image ids or whole paths."
                )
            image_id = table[hits[0]] if hits else None
        found.append(entry.image_id if image_id is None else image_id)
    return found


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _stem(name: str) -> str:
    base = _base(name)
    return re.sub(r"\.[A-Za-z]{2,5}$", "", base)


def _number(name: str) -> str | None:
    """COCO's file names end in the image id: COCO_val2014_000000000042.jpg is 42."""
    number = re.search(r"(?:^|_)(\d{12})$", _stem(name))
    return str(int(number[1])) if number else None


def find_images(image_dir: str | os.PathLike | None, references: dict, names: dict | None = None) -> list[Path]:
    """The image file of each image id: the file of that name, with any extension, or COCO's, which ends in the number;
    or the one named in `names`, {image id: file name}."""
    if image_dir is None:
        raise CaptionFileError("CLIP-based scores need the images: pass --image_dir, the folder they are in.")
    files: dict[str, Path] = {}
    for path in sorted(Path(image_dir).iterdir()):
        number = re.search(r"(?:^|_)(\d{12})$", path.stem)
        for name in (path.name, path.stem, str(int(number[1])) if number else path.name):
            files.setdefault(name, path)
    found = {image_id: files.get(image_id) for image_id in references}
    for image_id, name in (names or {}).items():
        if image_id in found and found[image_id] is None:
            found[image_id] = files.get(_base(name))
    if absent := [image_id for image_id, path in found.items() if path is None]:
        raise CaptionFileError(
            f"{image_dir} lacks {len(absent)} of the {len(references)} images (first: {absent[0]!r}). A file must be "
            "named after its image id, with or without an extension such as .jpg."
        )
    return list(found.values())


def _entries(path: Path) -> Iterator[Entry]:
    """Everything in the file."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path)
        return
    if path.suffix.lower() in (".csv", ".tsv"):
        for row, place in csv_rows(path):
            yield _entry(row, f"{path.parent / place}", cells=True)
        return
    if path.is_file() and flickr8k.matches(path):
        for name, caption, place in flickr8k.rows_of(path):
            yield Entry(name, _captions(caption, f"{path.parent / place}"), place, name)
        return
    try:
        text = read_text(path)
    except TextError as error:
        raise CaptionFileError(str(error)) from None
    if not text.strip():
        raise CaptionFileError(f"{path} is empty.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() not in (".jsonl", ".ndjson") and "\n{" not in text.strip():
            raise CaptionFileError(
                f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
            ) from None
        yield from _lines(path, text)
        return
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from _coco(content, path)
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        yield from _karpathy(content["images"], path)
    elif isinstance(content, dict) and isinstance(content.get("data"), list):
        for index, row in enumerate(content["data"]):
            yield _entry(row, f"{path}, data[{index}]")
    elif isinstance(content, list):
        for index, entry in enumerate(content):
            yield _entry(entry, f"{path}, [{index}]")
    elif isinstance(content, dict) and ("image_id" in content or "image" in content):  # JSONL of one line
        yield _entry(content, f"{path}, line 1")
    elif isinstance(content, dict):
        for image_id, captions in content.items():
            place = f"{path}, key {image_id!r}"
            yield Entry(image_id, _captions(captions, place), place)
    else:
        raise CaptionFileError(f"{path} holds a {type(content).__name__}, not a list or an object of captions.")


def _lines(path: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise CaptionFileError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
        yield _entry(entry, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=1000):
            for number, row in enumerate(batch.to_pylist()):
                yield _entry(row, f"{path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise CaptionFileError(f"{path} is not a complete Parquet file: {error}") from None


def _coco(content: dict, path: Path) -> Iterator[Entry]:
    images = {}
    for image in content.get("images") or []:
        if isinstance(image, dict) and "id" in image:
            images[str(image["id"])] = image
    for index, row in enumerate(content["annotations"]):
        if isinstance(row, dict) and annotations.is_rejected(row):
            continue
        entry = _entry(row, f"{path}, annotations[{index}]")
        image = images.get(entry.image_id, {})
        entry.name = image.get("file_name") or entry.name
        entry.columns = _scalars(image, entry.columns)
        yield entry


def _karpathy(images: list, path: Path) -> Iterator[Entry]:
    for index, image in enumerate(images):
        place = f"{path}, images[{index}]"
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
            raise CaptionFileError(f"{place}: no 'sentences'. Known formats are COCO's and Karpathy's.")
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in image["sentences"]]
        name = image.get("filename") or image.get("file_name")
        image_id = image.get("cocoid", name if name else image.get("imgid"))
        split = image.get("split")
        known = _split(split) if isinstance(split, str) else None
        columns = _scalars(image, {})
        yield Entry(str(image_id), _captions(captions, place), place, name, columns=columns, split=known)


def _split(name: str) -> str:
    try:
        return split_name(name, "references")
    except ValueError:
        return name


def _scalars(row: dict, more: dict) -> dict:
    return {key: value for key, value in row.items() if isinstance(value, str | int | float | bool)} | more


def _entry(entry: object, place: str, cells: bool = False) -> Entry:
    """`cells`: it comes from a text table, where a number may be an id and a list may be written out."""
    if not isinstance(entry, dict):
        raise CaptionFileError(
            f'{place}: expected an object like {{"image_id": 1, "caption": "..."}}, found {entry!r:.80}.'
        )
    columns = _scalars(entry, {})
    if cells:
        entry = {usual_name(name): value for name, value in entry.items()}
    name = next((_path(entry[key]) for key in IMAGE_COLUMNS if _path(entry.get(key)) is not None), None)
    image_id = next((entry[key] for key in IDS if entry.get(key) is not None), name)
    if isinstance(image_id, bool) or not isinstance(image_id, str | int):
        header = f" Its header: {', '.join(entry)}." if cells else ""
        raise CaptionFileError(f"{place}: no 'image_id' (or 'image') that is text or a whole number.{header}")
    image_id = str(image_id)
    for key in CAPTIONS:
        if key in entry and not (cells and entry[key] is None):
            return Entry(image_id, _captions(entry[key], f"{place}, {key}", cells), place, name, columns=columns)
    if numbered := [value for key, value in entry.items() if NUMBERED_CAPTION.fullmatch(key.lower()) and value]:
        return Entry(image_id, _captions(numbered, place), place, name, columns=columns)
    if entry.get("error") is not None:
        return Entry(image_id, [], place, name, str(entry["error"]))
    if cells:
        return Entry(image_id, [""], place, name, columns=columns) if _has_captions(entry) else _none(entry, place)
    return _none(entry, place)


def _has_captions(entry: dict) -> bool:
    return any(key in entry for key in CAPTIONS)


def _none(entry: dict, place: str):
    raise CaptionFileError(
        f"{place}: neither 'caption' nor 'captions'; it has {', '.join(map(repr, entry))}. Name theirs 'caption'."
    )


def _path(value: object) -> str | None:
    if isinstance(value, dict):  # an image as the datasets library writes it
        value = value.get("path")
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else None


def _captions(value: object, place: str, written: bool = False) -> list[str]:
    """`written`: a list written as text is a list of captions; else text is taken literally, as in a JSON prediction."""
    captions = [value] if isinstance(value, str) and not written else captions_of({"": value}, [""], place)
    for caption in captions:
        if not isinstance(caption, str):
            raise CaptionFileError(f"{place}: a caption must be text, found {type(caption).__name__} {caption!r:.80}.")
        check_rows(caption, place)
    return captions

"""Reading predictions and references from files.

Formats, told apart by content:
- COCO results: `[{"image_id": 1, "caption": "..."}]` (predictions)
- COCO annotations: `{"annotations": [{"image_id": 1, "caption": "..."}]}` (references)
- JSONL: one object a line with `image_id` (or `image`) and `caption` or `captions`
- a plain map: `{"1": "caption"}` or `{"1": ["caption", "caption"]}`

Image ids are compared as strings: COCO writes numbers, others file names.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError


class CaptionFileError(UserError):
    """A captions file that cannot be used; the message names the file and the place."""


def load_predictions(path: str | os.PathLike) -> dict[str, str]:
    """{image id: caption}, exactly one caption an image."""
    predictions: dict[str, str] = {}
    for image_id, captions, place in _entries(Path(path)):
        if image_id in predictions or len(captions) != 1:
            raise CaptionFileError(
                f"{place}: image {image_id!r} has more than one predicted caption. Scores compare one caption an image "
                "with all its references: keep one."
                if captions
                else f"{place}: image {image_id!r} has an empty list of captions. A prediction may be an empty string, "
                "but it must be there."
            )
        predictions[image_id] = captions[0]
    return predictions


def load_references(path: str | os.PathLike) -> dict[str, list[str]]:
    """{image id: captions}, in the file's order; captions of one image may be spread over many entries."""
    references: dict[str, list[str]] = {}
    for image_id, captions, place in _entries(Path(path)):
        if not captions:
            raise CaptionFileError(f"{place}: image {image_id!r} has no reference captions.")
        references.setdefault(image_id, []).extend(captions)
    return references


def find_images(image_dir: str | os.PathLike | None, references: dict) -> list[Path]:
    """The image file of each image id: the file of that name, with any ending, or COCO's, which ends in the number."""
    if image_dir is None:
        raise CaptionFileError("CLIP-based scores look at the images: pass --image_dir, the folder they lie in.")
    files: dict[str, Path] = {}
    for path in sorted(Path(image_dir).iterdir()):
        number = re.search(r"(?:^|_)(\d{12})$", path.stem)
        for name in (path.name, path.stem, str(int(number[1])) if number else path.name):
            files.setdefault(name, path)
    if absent := [image_id for image_id in references if image_id not in files]:
        raise CaptionFileError(
            f"{image_dir} lacks {len(absent)} of the {len(references)} images (first: {absent[0]!r}). A file must be "
            "called like its image id, with or without an ending such as .jpg."
        )
    return [files[image_id] for image_id in references]


def _entries(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """(image id, captions, where that stands) of everything in the file."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise CaptionFileError(f"{path} is empty.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() not in (".jsonl", ".ndjson") and "\n{" not in text.strip():
            raise CaptionFileError(
                f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg})."
            ) from None
        yield from _lines(path, text)
        return
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        for index, entry in enumerate(content["annotations"]):
            yield _entry(entry, f"{path}, annotations[{index}]")
    elif isinstance(content, list):
        for index, entry in enumerate(content):
            yield _entry(entry, f"{path}, [{index}]")
    elif isinstance(content, dict) and ("image_id" in content or "image" in content):  # JSONL of one line
        yield _entry(content, f"{path}, line 1")
    elif isinstance(content, dict):
        for image_id, captions in content.items():
            place = f"{path}, key {image_id!r}"
            yield image_id, _captions(captions, place), place
    else:
        raise CaptionFileError(f"{path} holds a {type(content).__name__}, not a list or an object of captions.")


def _lines(path: Path, text: str) -> Iterator[tuple[str, list[str], str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise CaptionFileError(f"{path}, line {number}: no JSON ({error.msg}).") from None
        yield _entry(entry, f"{path}, line {number}")


def _entry(entry: object, place: str) -> tuple[str, list[str], str]:
    if not isinstance(entry, dict):
        raise CaptionFileError(
            f'{place}: expected an object like {{"image_id": 1, "caption": "..."}}, found {entry!r:.80}.'
        )
    image_id = entry.get("image_id", entry.get("image"))
    if isinstance(image_id, bool) or not isinstance(image_id, str | int):
        raise CaptionFileError(f"{place}: no 'image_id' (or 'image') that is a text or a whole number.")
    for key in ("caption", "captions"):
        if key in entry:
            return str(image_id), _captions(entry[key], f"{place}, {key}"), place
    raise CaptionFileError(f"{place}: neither 'caption' nor 'captions'; it has {', '.join(map(repr, entry))}.")


def _captions(value: object, place: str) -> list[str]:
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise CaptionFileError(f"{place}: a caption must be text, found {type(caption).__name__} {caption!r:.80}.")
    return captions

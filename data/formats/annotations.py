"""Annotation files of every common kind, recognized by content, one file or one per split.

COCO, VizWiz and nocaps: {"images": [...], "annotations": [...]}, with or without file names (BLIP's *_gt.json).
TextCaps: {"data": [...]}. R2Gen: a list per split. LLaVA: conversations. A map of names to captions, or to objects with
them (kohya's meta_cap.json). Else a list of objects, one per line, or a table (CSV, TSV), with an image (a name, or the
image itself in base64), captions, and optionally `image_id`, `split` and other columns.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.text import TextError, read_text
from data.columns import as_id, caption_key, object_rows
from data.finder import folders_beside
from data.rows import SPLIT_NAMES, Options, Part, Row, split_in
from data.text_rows import ENDINGS, LINES, TABLES, first_character, jsonl_rows, table_objects

logger = logging.getLogger(__name__)

NAME = "annotations"
ABOUT = "JSON, JSONL, CSV, COCO or VizWiz annotations, one file or one per split"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder")


def matches(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS if path.is_file() else path.is_dir() and bool(files_of(path))


def parts(path: Path, options: Options) -> list[Part]:
    files = files_of(path)
    if not files:
        raise DataError(f"{path}: no annotation file for train, validation or test (JSON, JSONL, CSV) is there")
    of_split: dict = {}
    for file, split in files:
        if split is not None and of_split.setdefault(split, file) is not file and path.is_dir():
            raise DataError(
                f"{path}: {of_split[split].name} and {file.name} are both for {split}. Remove or rename one"
            )
    return [Part(NAME, str(file), split=split, folders=folders_beside(file)) for file, split in files]


def files_of(path: Path) -> list[tuple[Path, str | None]]:
    """A file, or one file per split in a folder or its `annotations` folder: train.jsonl, captions_val2014.json,
    processed_val.json, ...; or the only table of a folder. Returns (file, split or None)."""
    if path.is_file():
        return [(path, split_in(path.stem))]
    tables: list[Path] = []
    for folder in (path, path / "annotations"):
        listed = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [file for file in listed if file.suffix.lower() in ENDINGS and not file.name.startswith(".")]
        # COCO ships captions_ next to instances_; VizWiz' processed_ files are made from the official ones.
        for prefix in ("processed_", "captions_", ""):
            chosen = [
                (file, split_in(file.stem)) for file in files if file.name.startswith(prefix) and split_in(file.stem)
            ]
            if chosen:
                return chosen
        tables += files
    tables = [file for file in tables if file.suffix.lower() != ".json"] or tables
    return [(tables[0], None)] if len(tables) == 1 else []


def read(part: Part, options: Options) -> Iterator[Row]:
    file = Path(part.place)
    try:
        if file.suffix.lower() in (*LINES, *TABLES) or first_character(file) == "[":
            yield from object_rows(table_objects(file), str(file), options, part.split)
            return
        text = read_text(file)
    except TextError as error:
        raise DataError(str(error)) from None
    if not text.strip():
        raise DataError(f"{file} is empty")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n{" not in text:
            raise DataError(f"{file}: not valid JSON: {error}. One object per line belongs in a .jsonl file") from None
        content = [row for _, row in jsonl_rows(file)]
    if not isinstance(content, dict | list):
        raise DataError(f"{file} holds a {type(content).__name__}, not a list or an object of captions")
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from coco_rows(content, file, part.split, options)
        return
    for split, objects in lists_in(content, file).items():
        entries = ((entry, f"{file.name} entry {number}") for number, entry in enumerate(objects))
        yield from object_rows(entries, str(file), options, split or part.split)


def lists_in(content, file: Path) -> dict[str | None, list]:
    """{split or None: rows} of a JSON file: its list, the only list of objects in it, a list per split, a map of image
    names to captions or to objects, or the object itself."""
    if isinstance(content, list):
        return {None: content}
    lists = {
        key: value for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    if len(lists) > 1 and all(key.lower() in SPLIT_NAMES for key in lists):
        return {SPLIT_NAMES[key.lower()]: value for key, value in lists.items()}
    if len(lists) == 1 and not ({"image", "image_id"} & set(content)):
        return {None: next(iter(lists.values()))}
    if {"image", "image_id"} & set(content):  # JSON lines of one line
        return {None: [content]}
    if content and all(is_captions(value) for value in content.values()):
        return {None: [{"image": name, "captions": captions} for name, captions in content.items()]}
    if content and all(isinstance(value, dict) and caption_key(value) for value in content.values()):
        return {None: [{"image": name, **value} for name, value in content.items()]}
    raise DataError(
        f"{file}: an object with the keys {', '.join(list(content)[:8])}. Expected a list of objects, or "
        "COCO annotations (keys images and annotations)"
    )


def is_captions(value) -> bool:
    """Also of an image without any, which is then named as such."""
    texts = value if isinstance(value, list) else [value]
    return all(
        text is None or isinstance(text, str) or (isinstance(text, dict) and caption_key(text)) for text in texts
    )


def coco_rows(content: dict, file: Path, split: str | None, options: Options) -> Iterator[Row]:
    """COCO's annotation JSON, and VizWiz' official one, whose rejected captions (spam) and precanned ones ("Quality
    issues are too severe ...") are left out, as in its official evaluation. Ids are compared as text: some files write
    them as numbers in one place and as text in another. An image without a file name is found by its id."""
    captions: dict = {}
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict) or annotation.get("image_id") is None or not caption_key(annotation):
            raise DataError(f"{file} annotation {number}: no caption or image_id. Is this a file of captions?")
        if is_rejected(annotation):
            options.dropped["rejected or precanned captions"] += 1
            continue
        captions.setdefault(as_id(annotation["image_id"]), []).append(annotation[caption_key(annotation)])
    images = content.get("images")
    if images is None or not (images or options.images):
        images = [{"id": image_id} for image_id in captions]
    names: dict = {}
    for image in images:
        image_id = as_id(image.get("id", image.get("image_id")))
        name = image.get("file_name") or image.get("filename") or image.get("image")
        if names.setdefault(image_id, name) != name:
            raise DataError(f"{file}: image id {image_id} names two images: {names[image_id]} and {name}")
        if image_id not in captions and options.captions:
            options.dropped["images without captions"] += 1
            continue
        yield Row(
            f"{file.name} image {image_id}",
            name or image_id,
            captions.pop(image_id, []),
            name=name,
            image_id=image_id,
            split=SPLIT_NAMES.get(str(image.get("split")).lower(), split),
            columns={
                "image": name,
                **{key: value for key, value in image.items() if not isinstance(value, dict | list)},
            },
            used=("image", *(key for key in image if key not in ("text_detected", "domain"))),
        )
    if captions.keys() - names.keys():
        raise DataError(f"{file}: captions of image id {min(captions)}, which is not among its images")


def is_rejected(annotation: dict) -> bool:
    """Whether VizWiz' official evaluation leaves a caption out."""
    return bool(annotation.get("is_rejected") or annotation.get("is_precanned"))

"""Annotation files of every common kind, recognized by content, one file or one per split.

COCO, VizWiz and nocaps: {"images": [...], "annotations": [...]}, with or without file names (BLIP's *_gt.json).
TextCaps: {"data": [...]}. R2Gen: a list per split. LLaVA: conversations. A map of names to captions, or to objects with
them (kohya's meta_cap.json). Else a list of objects, one per line, or a table (CSV, TSV), with an image (a name, or the
image itself in base64), captions, and optionally `image_id`, `split` and other columns.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.logs import say_once
from common.text import read_text
from data.columns import as_id, caption_key, first_of, object_rows
from data.finder import folders_beside
from data.rows import SPLIT_NAMES, Options, Part, Row, scalars, split_in
from data.text_rows import ENDINGS, LINES, TABLES, first_character, jsonl_rows, read_json, table_objects

logger = logging.getLogger(__name__)

NAME = "annotations"
ABOUT = "JSON, JSONL, CSV, COCO or VizWiz annotations, one file or one per split"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder", "saved")
EXTRAS = {"text_detected", "domain"}  # of VizWiz and nocaps: columns of an image that data.load keeps


def matches(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS if path.is_file() else bool(files_of(path))


def parts(path: Path, options: Options) -> list[Part]:
    files = files_of(path)
    if not files:
        raise DataError(f"{path}: no annotation file for train, validation or test (JSON, JSONL, CSV) is there")
    of_split: dict = {}
    for file in files:
        other = of_split.setdefault(split_in(file.stem) or file, file)
        if other != file:
            raise DataError(
                f"{path}: {other.name} and {file.name} are both for {split_in(file.stem)}. Remove or rename one"
            )
    beside = {*path.glob("*"), *path.glob("annotations/*")}.difference(files)
    if others := sorted(file.name for file in beside if file.suffix.lower() in (*LINES, *TABLES)):
        read = " and ".join(file.name for file in files)
        say_once(logger, "%s: read from %s, not from %s", path, read, " and ".join(others[:5]))
    return [Part(NAME, str(file), split=split_in(file.stem), folders=folders_beside(file)) for file in files]


def files_of(path: Path) -> list[Path]:
    """A file, or one file per split in a folder or its `annotations` folder: train.jsonl, captions_val2014.json,
    processed_val.json, ...; or the only table of a folder."""
    if path.is_file():
        return [path]
    tables: list[Path] = []
    for folder in (path, path / "annotations"):
        files = [file for file in sorted(folder.glob("[!.]*")) if file.suffix.lower() in ENDINGS]
        # COCO ships captions_ next to instances_; VizWiz' processed_ files are made from the official ones.
        for prefix in ("processed_", "captions_", ""):
            if of_splits := [file for file in files if file.name.startswith(prefix) and split_in(file.stem)]:
                return of_splits
        tables += files
    tables = [file for file in tables if file.suffix.lower() != ".json"] or tables
    return tables if len(tables) == 1 else []


def read(part: Part, options: Options) -> Iterator[Row]:
    file = Path(part.place)
    if file.suffix.lower() in (*LINES, *TABLES) or first_character(file) == "[":
        yield from object_rows(table_objects(file), str(file), options, part.split)
        return
    content = json_content(file)
    if isinstance(content.get("annotations"), list):
        yield from coco_rows(content, file, part.split, options)
        return
    for split, objects in lists_in(content, file).items():
        entries = ((entry, f"{file.name} entry {number}") for number, entry in enumerate(objects))
        yield from object_rows(entries, str(file), options, split or part.split)


def json_content(file: Path) -> dict:
    """The object that a JSON file holds; of JSON lines {"rows": [...]}."""
    try:
        content = read_json(file)
    except DataError:
        text = read_text(file)
        if not text.strip():
            raise DataError(f"{file} is empty") from None
        if "\n{" not in text:
            raise
        content = {"rows": [row for _, row in jsonl_rows(file)]}
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a list or an object of captions")
    return content


def lists_in(content: dict, file: Path) -> dict[str | None, list]:
    """{split or None: rows} of a JSON file's object: the only list of objects in it, a list per split, a map of image
    names to captions or to objects, or the object itself."""
    if {"image", "image_id"} & content.keys():  # JSON lines of one line
        return {None: [content]}
    lists = {name: value for name, value in content.items() if isinstance(value, list) and dict in map(type, value[:1])}
    if len(lists) == 1:
        return {None: next(iter(lists.values()))}
    if lists and {name.lower() for name in lists} <= SPLIT_NAMES.keys():
        return {SPLIT_NAMES[name.lower()]: value for name, value in lists.items()}
    if all(map(is_captions, content.values())):
        return {None: [entry_of(name, value) for name, value in content.items()]}
    raise DataError(
        f"{file}: an object with the keys {', '.join(list(content)[:8])}. Expected a list of objects, a list for each of train, "
        "validation and test, or COCO annotations (keys images and annotations)"
    )


def is_captions(value) -> bool:
    """Also of an image without any, which is then named as such."""
    texts = value if isinstance(value, list) else [value]
    return all(text is None or isinstance(text, str) or caption_key(text) for text in texts)


def entry_of(name: str, value) -> dict:
    return {**value, "image": name} if isinstance(value, dict) else {"image": name, "captions": value}


def coco_rows(content: dict, file: Path, split: str | None, options: Options) -> Iterator[Row]:
    """COCO's annotation JSON, and VizWiz' official one. Ids are compared as text: some files write them as numbers in one
    place and as text in another. An image without a file name is found by its id."""
    captions = coco_captions(content["annotations"], file, options)
    names: dict = {}
    images = content.get("images")
    if images is None or not (images or options.images):
        images = [{"id": image_id} for image_id in captions]
    for image in images:
        image_id = as_id(image.get("id", image.get("image_id")))
        name = first_of(("file_name", "filename", "image"), image)
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
            columns={"image": name, **scalars(image)},
            used=("image", *(image.keys() - EXTRAS)),
        )
    if captions.keys() - names.keys():
        raise DataError(f"{file}: captions of image id {min(captions)}, which is not among its images")


def coco_captions(annotations: list, file: Path, options: Options) -> dict[str, list]:
    """{image id: captions}, without those of VizWiz that were rejected (spam) or are precanned ("Quality issues are too
    severe ..."), as in its official evaluation."""
    captions: dict[str, list] = {}
    for number, annotation in enumerate(annotations):
        key = caption_key(annotation)
        if key is None or annotation.get("image_id") is None:
            raise DataError(f"{file} annotation {number}: no caption or image_id. Is this a file of captions?")
        if annotation.get("is_rejected") or annotation.get("is_precanned"):
            options.dropped["rejected or precanned captions"] += 1
        else:
            captions.setdefault(as_id(annotation["image_id"]), []).append(annotation[key])
    return captions

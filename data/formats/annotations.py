"""Annotation files of every common kind, recognized by content, one file or one per split.

COCO, VizWiz and nocaps: {"images": [...], "annotations": [...]}, with or without file names (BLIP's *_gt.json).
TextCaps: {"data": [...]}. LLaVA: conversations. A map of names to captions. Else a list of objects, one per line, or a
table (CSV, TSV), with an image (a path, or the image itself in base64), captions, and optionally `image_id`, `split`
and other columns.
"""

from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from data.columns import caption_key, dict_rows
from data.finder import Finder
from data.rows import SPLIT_NAMES, Options, Record, split_of_file
from data.text_rows import csv_rows, jsonl_rows, read_json

NAME = "annotations"
ABOUT = "JSON, JSONL, CSV, COCO or VizWiz annotations, one file or one per split"
YIELDS_TO = ("flickr8k", "karpathy", "imagefolder")

KINDS = ("json", "jsonl", "ndjson", "csv", "tsv")


def matches(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower().lstrip(".") in KINDS
    return path.is_dir() and bool(files_of(path))


def files_of(path: Path) -> list[tuple[Path, str | None]]:
    """A file, or one file per split in a folder or its `annotations` folder: train.jsonl, captions_val2014.json,
    processed_val.json, ...; or the only table of a folder. Returns (file, split or None)."""
    if path.is_file():
        return [(path, split_of_file(path))]
    found: dict[str, list[Path]] = {}
    for folder in (path, path / "annotations"):
        files = [file for kind in KINDS for file in sorted(folder.glob(f"*.{kind}")) if not file.name.startswith(".")]
        for file in files:
            found.setdefault(file.suffix, []).append(file)
        # COCO ships captions_ next to instances_; VizWiz' processed_ files are made from the official ones.
        for prefix in ("processed_", "captions_", ""):
            named = [(file, split_of_file(file)) for file in files if file.name.startswith(prefix)]
            chosen = [(file, split) for file, split in named if split]
            if chosen:
                return chosen
    tables = [file for kind in (".jsonl", ".ndjson", ".csv", ".tsv") for file in found.get(kind, [])]
    tables = tables or found.get(".json", [])
    return [(tables[0], None)] if len(tables) == 1 else []


def read(path: Path, options: Options) -> Iterator[Record]:
    files = files_of(path)
    if not files:
        raise DataError(f"{path}: no annotation file for train, validation or test (JSON, JSONL, CSV) is there")
    seen: dict = {}
    for file, split in files:
        if split is not None and seen.setdefault(split, file) is not file and path.is_dir():
            raise DataError(f"{path}: {seen[split].name} and {file.name} are both for {split}. Remove or rename one")
    for file, split in files:
        find = Finder([Path(options.image_dir)] if options.image_dir else [], beside=file)
        if file.suffix.lower() in (".csv", ".tsv"):
            rows = csv_rows(file)
        elif file.suffix.lower() == ".json":
            content = read_json(file)
            if isinstance(content, dict) and isinstance(content.get("annotations"), list):
                yield from coco_rows(content, file, split, find, options)
                continue
            rows = ((row, f"{file.name} entry {number}") for number, row in enumerate(list_in(content, file)))
        else:
            rows = ((row, f"{file.name} line {number}") for number, row in jsonl_rows(file))
        columns = options.image_column, options.caption_column
        yield from dict_rows(rows, str(file), *columns, find, split, captions=options.captions)


def list_in(content, file: Path) -> list:
    """The rows of a JSON file: its list, the only list of objects in it, or a map of image names to captions."""
    if isinstance(content, list):
        return content
    lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return lists[0]
    if content and all(is_captions(value) for value in content.values()) and len(content) > 1:
        return [{"image": name, "captions": captions} for name, captions in content.items()]
    raise DataError(
        f"{file}: an object with the keys {', '.join(list(content)[:8])}. Expected a list of objects, or "
        "COCO annotations (keys images and annotations)"
    )


def is_captions(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(c, str) for c in value)
    )


def coco_rows(content: dict, file: Path, split: str | None, find: Finder, options: Options) -> Iterator[Record]:
    """COCO's annotation JSON, and VizWiz' official one, whose rejected captions (spam) and precanned ones ("Quality
    issues are too severe ...") are left out, as in its official evaluation. Ids are compared as text: some files write
    them as numbers in one place and as text in another. An image without a file name is found by its id."""
    captions: dict = {}
    for number, annotation in enumerate(content["annotations"]):
        text = annotation.get("caption", annotation.get(caption_key(annotation)))
        if text is None or "image_id" not in annotation:
            raise DataError(f"{file} annotation {number}: no caption or image_id. Is this a file of captions?")
        if is_rejected(annotation):
            options.dropped["rejected or precanned captions"] += 1
            continue
        captions.setdefault(as_id(annotation["image_id"]), []).append(text)
    images = content.get("images")
    if images is None:
        images = [{"id": image_id} for image_id in captions]
    known: dict = {}
    for image in images:
        image_id = as_id(image.get("id", image.get("image_id")))
        name = image.get("file_name") or image.get("filename") or image.get("image")
        if known.setdefault(image_id, name) != name:
            raise DataError(f"{file}: image id {image_id} names two images: {known[image_id]} and {name}")
        if image_id not in captions and options.captions:
            options.dropped["images without captions"] += 1
            continue
        where = f"{file.name} image {image_id}"
        place = find(name) if name else find.by_id(image_id)
        if place is None:
            place = find(f"{image_id}.jpg")  # for the message, or for callers that read captions only
        yield Record(
            where,
            place,
            captions.pop(image_id, []),
            name=name or Path(place).name,
            image_id=image_id,
            split=SPLIT_NAMES.get(str(image.get("split")).lower(), split),
            extras={key: value for key, value in image.items() if key in ("text_detected", "domain")},
        )
    if captions.keys() - known.keys():
        raise DataError(f"{file}: captions of image id {min(captions)}, which is not among its images")


def is_rejected(annotation: dict) -> bool:
    """Whether VizWiz' official evaluation leaves a caption out."""
    return bool(annotation.get("is_rejected") or annotation.get("is_precanned"))


def as_id(value) -> str:
    """An id as text: 6, 6.0 and "6" are the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

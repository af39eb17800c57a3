"""WebDataset: tar files in which files of the same name, extensions aside, form a sample: an image of any kind, and its
caption in a .txt, .caption or .json file."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets

from common.errors import DataError
from common.files import version_of
from common.remote import is_remote, open_remote
from common.text import decode
from data.columns import caption_key
from data.images import ENDINGS, ImageError, is_image
from data.rows import Options, Part, Row, split_of_file
from data.tables import local_files
from data.walk import files_below

NAME = "webdataset"
ABOUT = "tar files of images with .txt or .json captions"
TEXTS = ("txt", "text", "caption", "captions", "cap")
TARS = (".tar", ".tar.gz", ".tgz")


def matches(path: Path) -> bool:
    return path.name.lower().endswith(TARS) or (path.is_dir() and bool(files_below(path, TARS)))


def parts(path: Path, options: Options) -> list[Part]:
    return [Part(NAME, str(file), split=split_of_file(file), folders=("",)) for file in local_files(path, TARS)]


def tables(path: Path, options: Options) -> dict:
    """{split: table} with image, captions, __key__ and __url__."""
    files: dict[str, list[str]] = {}
    for part in parts(path, options):
        files.setdefault(part.split or "train", []).append(part.place)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
            "__key__": datasets.Value("string"),
            "__url__": datasets.Value("string"),
            "json": datasets.Value("string"),
        }
    )
    group = options.group_column if options.group_column not in features else None  # it is in the json
    if group is not None:
        features[group] = datasets.Value("string")
    tables = {}
    for split, tars in files.items():
        # Size and modification time are part of the arguments, so that a changed file is not taken from the cache.
        shards = [(tar, version_of(tar)) for tar in tars]
        skip = options.skip_bad_samples and split == "train"
        if options.streaming:
            tables[split] = datasets.IterableDataset.from_generator(
                table_rows, features=features, gen_kwargs={"shards": shards, "skip_bad_samples": skip}
            )
            continue
        bad: list = []
        for tar, _ in shards if skip else ():
            bad += [sample for sample in samples(tar) if sample["fault"]]
        options.dropped["samples without an image or a caption"] += len(bad)
        options.bad_samples += [
            {"image_id": sample["key"], "image": sample["where"], "reason": sample["fault"]} for sample in bad
        ]
        tables[split] = datasets.Dataset.from_generator(
            table_rows,
            features=features,
            cache_dir=options.cache_dir,
            gen_kwargs={"shards": shards, "skip_bad_samples": skip, "group": group},
        )
    options.dropped += {}  # drops zero counts
    return tables


def table_rows(shards: list, skip_bad_samples: bool, group: str | None = None) -> Iterator[dict]:
    """
    Args:
        group: a name in each sample's json that becomes a column.
    """
    for tar, _ in shards:
        for sample in samples(tar):
            if sample["fault"]:
                if skip_bad_samples:
                    continue
                raise DataError(f"{sample['fault']}. With --skip_bad_samples such samples are left out of training")
            row = {name: sample[name] for name in ("image", "captions", "json")}
            if group is not None:
                value = json.loads(sample["json"] or "{}").get(group)
                row[group] = None if value is None else str(value)
            yield row | {"__key__": sample["key"], "__url__": tar}


def read(part: Part, options: Options) -> Iterator[Row]:
    opened = open_remote(part.place) if is_remote(part.place) else None
    try:
        for sample in samples(part.place, captions=options.captions, opened=opened):
            image = sample["image"] or ImageError(sample["fault"])
            inner = json.loads(sample["json"] or "{}")
            columns = (
                {k: v for k, v in inner.items() if not isinstance(v, dict | list)} if isinstance(inner, dict) else {}
            )
            name = image["path"] if isinstance(image, dict) else sample["key"]
            yield Row(sample["where"], image, sample["captions"], name=name, split=part.split, columns=columns)
    finally:
        if opened is not None:
            opened.close()


def samples(tar: str, captions: bool = True, opened=None) -> Iterator[dict]:
    """The samples of a tar file in order, read as a stream.

    Args:
        captions: whether a sample without one is faulty.
        opened: the tar file as an open binary file, if it is not local.

    Returns:
        {"key", "where", "image" ({"path", "bytes"} or None), "captions", "json" (text or None), "fault" (None or what is
        missing), "members" ([(name, bytes)])} for each.
    """
    name = os.path.basename(tar)
    key, members = None, []
    for member, content in members_of(tar, opened):
        folder, _, base = member.rpartition("/")
        stem = f"{folder}/{base.split('.', 1)[0]}" if folder else base.split(".", 1)[0]
        if stem != key and members:
            yield _sample(key, members, name, captions)
            members = []
        key = stem
        members.append((member, content))
    if members:
        yield _sample(key, members, name, captions)


def members_of(tar: str, opened=None) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a tar, except what macOS adds.

    Raises:
        DataError: the tar is broken or cut off; it names the last intact file.
    """
    last = None
    try:
        with tarfile.open(tar if opened is None else None, "r|*", fileobj=opened) as archive:
            for member in archive:
                base = member.name.rpartition("/")[2]
                if not member.isfile() or base.startswith("._") or "__MACOSX" in member.name.split("/"):
                    continue
                content = archive.extractfile(member).read()
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name.removeprefix("./"), content
                last = member.name
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        after = f" after {last}" if last else ""
        raise DataError(f"{tar}: the tar file is broken or cut off{after} ({error}). Fetch it again") from None


def _sample(key: str, members: list, tar: str, needs_captions: bool) -> dict:
    where = f"{tar} sample {key}"
    image = text = None
    endings = [name.rpartition("/")[2].partition(".")[2].lower() for name, _ in members]
    by_ending = dict(zip(endings, members, strict=True))
    for ending, (name, content) in by_ending.items():
        if image is None and (
            f".{ending.rpartition('.')[2]}" in ENDINGS or (ending not in (*TEXTS, "json") and is_image(content))
        ):
            image = {"path": name, "bytes": content}
    for ending in TEXTS:
        if text is None and ending in by_ending:
            text = decode(by_ending[ending][1], where)
    raw = decode(by_ending["json"][1], where) if "json" in by_ending else None
    try:
        inner = json.loads(raw or "{}")
    except ValueError as error:
        raise DataError(f"{where}: its .json is not valid JSON: {error}") from None
    fault, found = None, [text]
    if text is None and isinstance(inner, dict) and raw:
        found = inner.get(caption_key(inner))
        if found is None and needs_captions:
            fault = f"{where}: the json of this sample has no caption. Its keys: {', '.join(inner)}"
        found = found if isinstance(found, list) else [found]
    if image is None:
        fault = f"{where}: has no image, only {', '.join(name for name, _ in members)}"
    elif found == [None] and needs_captions and fault is None:
        fault = f"{where}: has no caption (a .txt or .json file), only {', '.join(name for name, _ in members)}"
    return {
        "key": key,
        "where": where,
        "image": image,
        "captions": found,
        "json": raw,
        "fault": fault,
        "members": members,
    }

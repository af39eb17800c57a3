"""WebDataset: tar files in which files of the same name, extensions aside, form a sample: an image of any kind, and its
caption in a .txt, .caption or .json file."""

import itertools
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets

from common.errors import DataError
from common.files import version_of
from common.remote import open_binary
from common.text import decode
from data.columns import QUESTION, caption_key, captions_of, question_of
from data.images import ImageError, is_image_file
from data.rows import Options, Part, Row, scalars, split_of_file, text_or_none
from data.tables import IMAGE, TEXT, loading, local_files
from data.walk import files_below

NAME = "webdataset"
ABOUT = "tar files of images with .txt or .json captions"
TEXTS = ("txt", "text", "caption", "captions", "cap")
TARS = (".tar", ".tar.gz", ".tgz")


def matches(path: Path) -> bool:
    return path.name.lower().endswith(TARS) or bool(files_below(path, TARS))


def parts(path: Path, options: Options) -> list[Part]:
    return [Part(NAME, str(file), split=split_of_file(file), folders=("",)) for file in local_files(path, TARS)]


def tables(path: Path, options: Options) -> dict:
    """{split: table} with image, captions, __key__, __url__ and json, the group column of the json, and what conversations ask."""
    texts = dict.fromkeys(["__key__", "__url__", "json", QUESTION, *filter(None, [options.group_column])], TEXT)
    features = datasets.Features({"image": IMAGE, "captions": datasets.List(TEXT)} | texts)
    tars = defaultdict(list)
    for part in parts(path, options):
        # The version is an argument, so that a changed file is not taken from the cache.
        tars[part.split or "train"].append((part.place, version_of(part.place)))
    tables = {}
    for split, shards in tars.items():
        skip = options.skip_bad_samples and split == "train"
        arguments = {"shards": shards, "skip_bad_samples": skip, "columns": ("image", "captions", *texts)}
        if options.streaming:
            tables[split] = datasets.IterableDataset.from_generator(table_rows, features=features, gen_kwargs=arguments)
            continue
        if skip:
            count_faults(shards, options)
        with loading(str(path), NAME):
            table = datasets.Dataset.from_generator(
                table_rows, features=features, cache_dir=options.cache_dir, gen_kwargs=arguments
            )
        tables[split] = table.remove_columns([QUESTION]) if table.unique(QUESTION) == [None] else table
    return tables


def count_faults(shards: list, options: Options) -> None:
    for sample in itertools.chain.from_iterable(samples(tar) for tar, _ in shards):
        if sample["fault"]:
            options.drop("samples without an image or a caption", sample["key"], sample["where"], sample["fault"])


def table_rows(shards: list, skip_bad_samples: bool, columns: tuple) -> Iterator[dict]:
    for tar, _ in shards:
        for sample in samples(tar):
            if not sample["fault"]:
                row = {name: text_or_none(value) for name, value in sample["inner"].items()}
                row |= {"__key__": sample["key"], "__url__": tar, QUESTION: sample["question"]}
                row |= {name: sample[name] for name in ("image", "captions", "json")}
                yield {name: row.get(name) for name in columns}
            elif not skip_bad_samples:
                raise DataError(f"{sample['fault']}. With --skip_bad_samples such samples are left out of training")


def read(part: Part, options: Options) -> Iterator[Row]:
    for sample in samples(part.place, captions=options.captions):
        image = ImageError(sample["fault"]) if sample["fault"] else sample["image"]
        name = image["path"] if isinstance(image, dict) else sample["key"]
        columns = scalars(sample["inner"])
        where, captions, question = sample["where"], sample["captions"], sample["question"]
        yield Row(where, image, captions, name=name, split=part.split, columns=columns, question=question)


def samples(tar: str, captions: bool = True) -> Iterator[dict]:
    """The samples of a tar file, a path or an address, in order, read as a stream.

    Args:
        captions: whether a sample without one is faulty.

    Returns:
        {"key", "where", "image" ({"path", "bytes"} or None), "captions", "question" (of a conversation), "json" (text or None),
        "inner" (its object), "fault" (None or what is missing), "members" ([(name, bytes)])} for each.
    """
    for key, members in itertools.groupby(members_of(tar), lambda member: stem_of(member[0])):
        yield _sample(key, list(members), os.path.basename(tar), captions)


def stem_of(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def members_of(tar: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a tar, except what macOS adds.

    Raises:
        DataError: the tar is broken or cut off; it names the last intact file.
    """
    after = ""
    with open_binary(tar) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    base = member.name.rpartition("/")[2]
                    if base.startswith("._") or "__MACOSX" in member.name.split("/"):
                        continue
                    content = archive.extractfile(member).read()
                    if len(content) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member.name.removeprefix("./"), content
                    after = f" after {member.name}"
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{tar}: the tar file is broken or cut off{after} ({error}). Fetch it again") from None


def _sample(key: str, members: list, tar: str, needs_captions: bool) -> dict:
    where = f"{tar} sample {key}"
    by_ending = {name.rpartition("/")[2].partition(".")[2].lower(): (name, content) for name, content in members}
    images = [{"path": name, "bytes": content} for name, content in members if is_image_file(name, content)]
    image = next(iter(images), None)
    paths = [image["path"] for image in images]
    rivals = [path for path in paths if "." not in path.rpartition("/")[2].partition(".")[2]]  # no mask: x.seg.png
    text = next(filter(None, map(by_ending.get, TEXTS)), None)
    raw = decode(by_ending["json"][1], where) if "json" in by_ending else None
    try:
        inner = json.loads(raw or "{}")
    except ValueError as error:
        raise DataError(f"{where}: its .json is not valid JSON: {error}") from None
    inner = inner if isinstance(inner, dict) else {}
    own = caption_key(inner)
    captions = captions_of(inner, [own], where) if text is None else [decode(text[1], where)]
    fault, names = None, ", ".join(name for name, _ in members)
    if image is None:
        fault = f"{where}: has no image, only {names}"
    elif len(rivals) > 1:
        fault = f"{where}: has {len(rivals)} images, {', '.join(rivals)}. A caption belongs to one image"
    elif captions == [None] and needs_captions:
        fault = f"{where}: has no caption (a .txt or .json file), only {names}"
        if raw is not None:
            fault = f"{where}: the json of this sample has no caption. Its keys: {', '.join(inner)}"
    return {
        "key": key,
        "where": where,
        "image": image,
        "captions": captions,
        "question": question_of(inner.get(own), where) if text is None else None,
        "json": raw,
        "inner": inner,
        "fault": fault,
        "members": members,
    }

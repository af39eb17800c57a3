"""Writes captions in the form that the file's name says. One function per format:

    write(rows, target, images)    rows() yields {"image", "caption" or "error", columns ...} for each image in order,
                                   whenever it is called; target is a local path that does not exist; images() yields
                                   what captioning.sources does for the same images, for formats that hold or copy them

Rows are streamed; what is written appears complete or not at all, since the caller renames it.
"""

import csv
import functools
import io
import itertools
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from captioning.shards import short
from common.errors import DataError, UserError
from common.files import write_text
from common.remote import is_remote, open_remote
from data.formats import webdataset
from data.images import ENDINGS, ImageError

logger = logging.getLogger(__name__)
BATCH = 5_000


def write_jsonl(rows: Callable[[], Iterator[dict]], target: Path, images) -> None:
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for row in rows():
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def write_csv(rows, target: Path, images) -> None:
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        for row in rows():
            writer.writerow({name: _cell(value) for name, value in row.items()})


def write_parquet(rows, target: Path, images) -> None:
    schema = schema_of(rows)
    with pq.ParquetWriter(target, schema) as writer:
        for batch in _batches(rows(), BATCH):
            writer.write_table(table_of(batch, schema))


def write_coco(rows, target: Path, images) -> None:
    """COCO's results, as evaluate.py --predictions and other scorers read them. The id is the source's, else COCO's
    number in the file's name, else that name; where two images have one id, all have the whole names of `image`."""
    ids = [short(str(_coco_id(row))) for row in rows() if "caption" in row]
    names = len(set(ids)) < len(ids)
    if names:
        logger.warning(
            "%d images share their image_id with another: the ids are the images' whole names", len(ids) - len(set(ids))
        )
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(row for row in rows() if "caption" in row):
            entry = {"image_id": row["image"] if names else _coco_id(row), "caption": row["caption"]}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry, ensure_ascii=False))
        file.write("[]\n" if file.tell() == 0 else "\n]\n")


def write_metadata(rows, target: Path, images, folder: Path, ending: str) -> None:
    """metadata.jsonl or metadata.csv of `load_dataset("imagefolder")`: `file_name`, relative to `folder`, which holds the
    images; those that are inside a source are written there."""
    copies: dict[str, str] = {}
    if any(not os.path.exists(row["image"]) for row in rows() if "caption" in row):
        different = Different()
        for row in images():
            if not (isinstance(row["image"], ImageError) or os.path.exists(row["name"])):
                copies[row["name"]] = _copy(row["image"], folder, f"images/{_safe(row['name'])}", different)

    def entries():
        for row in rows():
            if "caption" in row:
                columns = {key: value for key, value in row.items() if key not in ("image", "file_name")}
                yield {"file_name": copies.get(row["image"]) or _below(row["image"], folder)} | columns

    (write_csv if ending == ".csv" else write_jsonl)(entries, target, images)


def check_folder(output: str) -> None:
    if is_remote(output):
        raise DataError(f"--output {output}: metadata.jsonl and metadata.csv are written into a local folder of images")


def check_below(row: dict, folder: Path) -> None:
    """DataError if an image is a file that a metadata file in `folder` cannot name."""
    if isinstance(row["image"], str) and os.path.exists(row["name"]):
        _below(row["name"], folder)


def write_tar(rows, target: Path, images) -> None:
    """One tar file of all samples: each image, its caption as .txt, and its row as .json, which has its own name. The
    images' endings are made the same where they differ, as `datasets` wants them."""
    endings = {_stem(row["image"])[1] for row in rows() if "caption" in row}
    ending = endings.pop() if len(endings) == 1 else ".jpg"
    captions, different = rows(), Different()
    with tarfile.open(target, "w") as tar:
        for row, image in zip(captions, images(), strict=True):
            if row["image"] != image["name"]:
                raise DataError(
                    f"{image['name']}: the source has changed while this was running. Start the same command again"
                )
            if "caption" in row:
                # A sample's name ends at its first dot, and `datasets` leaves out names that begin with a dot or __.
                key = re.sub(r"(^|/)__+", r"\1_", _stem(inside(image["relative"]))[0].replace(".", "_"))
                key = different(key, lambda number, key=key: f"{key}-{number}")
                _add(tar, f"{key}{ending}", _content(image["image"]))
                _add(tar, f"{key}.txt", row["caption"].encode())
                _add(tar, f"{key}.json", json.dumps(row, ensure_ascii=False, default=str).encode())


def check_tars(tars: list[str]) -> list[str]:
    """The tars. DataError if two have one name."""
    names = Counter(map(os.path.basename, tars))
    if twice := next((name for name in names if names[name] > 1), None):
        raise DataError(f"{twice} is the name of more than one tar of the source: caption each folder separately")
    return tars


def write_tars(rows, target: Path, images, tars: list[str]) -> None:
    """The tar files of the source again, each sample with its caption as .txt; one it had is kept as .source.txt."""
    check_tars(tars)
    target.mkdir()
    captions = rows()
    row = next(captions, None)
    for tar in tars:
        opened = open_remote(tar) if is_remote(tar) else None
        with tarfile.open(target / os.path.basename(tar), "w") as out:
            for sample in webdataset.samples(tar, captions=False, opened=opened):
                name = sample["image"]["path"] if sample["image"] else sample["key"]
                for member, content in sample["members"]:
                    kept = re.sub(r"\.txt$", ".source.txt", member, flags=re.IGNORECASE)
                    _add(out, kept, content)
                if row is not None and row["image"].startswith(f"{os.path.basename(tar)}/{name}"):
                    if "caption" in row:
                        _add(out, f"{sample['key']}.txt", row["caption"].encode())
                    row = next(captions, None)
        if opened is not None:
            opened.close()


class Texts:
    """Where the text of each image goes: x.txt for x.jpg, next to it or below `folder`; x.jpg.txt where another image would
    have x.txt too, or x.txt is one of the images.

    Args:
        rows: those of all images, with a name or a place of their own.

    Raises:
        UserError: an image is inside a source, and there is no `folder`; two images would have the same text; or a folder
            cannot be written to.
    """

    def __init__(self, rows: Iterator[dict], folder: Path | None):
        self.folder, self.images, self.stems, self.shared = folder, set(), set(), set()
        self.real = functools.lru_cache(maxsize=1000)(os.path.realpath)
        writable, called_txt = set(), []
        for row in rows:
            if folder is None and not (isinstance(row["image"], str) and os.path.isfile(row["image"])):
                raise UserError(f"{row['name']} is inside a source: name a folder for the .txt files with --output.")
            image, text = self._place(row), text_of(self._place(row))
            if short(image) in self.images:
                if folder is None:  # the same file by another name
                    continue
                raise UserError(
                    f"{row['name']}: another image has this name in its source, and both would have the text {text}. "
                    "Caption each source into a folder of its own, or name a table: --output captions.jsonl."
                )
            self.images.add(short(image))
            (self.shared if _same(text) in self.stems else self.stems).add(_same(text))
            if text.parent not in writable and not text.exists():
                check_writable(text.parent)
                writable.add(text.parent)
            if image.endswith(".txt"):
                called_txt.append(image)
        if clash := next((image for image in called_txt if short(image.removesuffix(".txt")) in self.images), None):
            raise UserError(
                f"{clash} is an image, in the place of another's text. Name a table: --output captions.jsonl."
            )

    def _place(self, row: dict) -> str:
        """The path of the image, or of its copy in the folder."""
        place = row["image"] if self.folder is None else str(self.folder / inside(row["relative"]))
        return os.path.join(self.real(os.path.dirname(place)), os.path.basename(place))

    def of(self, row: dict) -> Path:
        """The path of the text of an image."""
        image = self._place(row)
        usual = str(text_of(image))
        alone = _same(usual) not in self.shared and not {short(usual), short(usual.removesuffix(".txt"))} & self.images
        return Path(usual if alone else f"{image}.txt")


def check_writable(folder: Path) -> bool:
    """UserError if no file can be made in the folder, or where it will be."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written to. Name another folder for the .txt files with --output FOLDER.")
    return True


def text_of(image: str) -> Path:
    """The usual place of the text of an image: x.txt next to x.jpg."""
    return Path(os.path.splitext(image)[0] + ".txt")


def write_text_beside(target: Path, caption: str) -> bool:
    """The text of an image; False if there is one already, which is left as it is."""
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, caption + "\n")
    return True


# ---------------------------------------------------------------- the form that a name says

FORMATS = {
    "jsonl": "x.jsonl",
    "csv": "x.csv",
    "parquet": "x.parquet, or a folder for several files",
    "coco": "x.json, COCO's results",
    "metadata": "metadata.jsonl or metadata.csv in the folder of the images",
    "tar": "x.tar, or with --output_format tar a folder for copies of the source's tars",
    "txt": "--output_format txt: a .txt next to each image, or in the folder --output",
}


def form_of(output: str | None, output_format: str | None) -> str:
    """The key of FORMATS that a name and --output_format say.

    Raises:
        DataError: an extension that is not one of these.
    """
    if output_format is not None:
        if output_format not in FORMATS:
            raise DataError(f"--output_format {output_format}: is not one of {', '.join(FORMATS)}")
        if output is None and output_format != "txt":
            raise DataError(f"--output_format {output_format} needs --output, where to write it")
        return output_format
    name = re.split(r"[/\\]", output.rstrip("/\\"))[-1]
    ending = os.path.splitext(name)[1].lower()
    if output.endswith(("/", "\\")) or not ending or (not is_remote(output) and os.path.isdir(output)):
        return "parquet"
    if name in ("metadata.jsonl", "metadata.csv"):
        return "metadata"
    known = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".csv": "csv",
        ".parquet": "parquet",
        ".json": "coco",
        ".tar": "tar",
    }
    if ending not in known:
        raise DataError(
            f"--output {output}: the extension {ending} does not say what to write: {'; '.join(FORMATS.values())}"
        )
    return known[ending]


def is_folder(output: str, form: str) -> bool:
    return form in ("parquet", "tar") and os.path.splitext(output.rstrip("/\\"))[1].lower() not in (".parquet", ".tar")


# ---------------------------------------------------------------- helpers


def _columns(rows) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows():
        columns.update(dict.fromkeys(row))
    return list(columns)


def _cell(value):
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | bool) else value


def schema_of(rows, text: tuple[str, ...] = ("image", "caption"), nulls: bool = False) -> pa.Schema:
    """Types that hold every row: a column of several types becomes text, and one without values unless `nulls`. The
    columns `text` come first."""
    schemas = [pa.schema([(name, pa.string()) for name in text])]
    for batch in _batches(rows(), BATCH):
        found = []
        for name in dict.fromkeys(key for row in batch for key in row):
            try:
                found.append((name, pa.array([row.get(name) for row in batch]).type))
            except pa.ArrowException:
                found.append((name, pa.string()))
        schemas.append(common_schema([*schemas[-1:], pa.schema(found)], nulls=True))
    return common_schema(schemas[-1:], nulls)


def common_schema(schemas: list[pa.Schema], nulls: bool = False) -> pa.Schema:
    """One schema for tables of all of these; a column without any value is text, unless `nulls`."""
    types: dict[str, pa.DataType] = {}
    for name, kind in (field for schema in schemas for field in zip(schema.names, schema.types, strict=True)):
        known = types.get(name, pa.null())
        if pa.types.is_null(known):
            types[name] = kind
        elif not pa.types.is_null(kind) and kind != known:
            numbers = all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in (kind, known))
            types[name] = pa.float64() if numbers else pa.string()
    return pa.schema([(n, pa.string() if pa.types.is_null(k) and not nulls else k) for n, k in types.items()])


def table_of(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """Rows as a table; other values in a text column are written as JSON."""

    def fit(value, kind):
        if value is None or not pa.types.is_string(kind) or isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False, default=str)

    columns = {field.name: [fit(row.get(field.name), field.type) for row in rows] for field in schema}
    return pa.table(columns, schema=schema)


def _batches(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    return iter(lambda: list(itertools.islice(rows, size)), [])


def _coco_id(row: dict):
    image_id = row.get("image_id")
    if image_id is None:
        name = re.split(r"[/\\]", row["image"])[-1]
        number = re.search(r"(?:^|_)(\d{12})\.\w+$", name)
        return int(number[1]) if number else name
    return int(image_id) if isinstance(image_id, str) and re.fullmatch(r"[1-9]\d{0,17}|0", image_id) else image_id


def _below(image: str, folder: Path) -> str:
    try:
        return Path(os.path.abspath(image)).relative_to(os.path.abspath(folder)).as_posix()
    except ValueError:
        raise DataError(
            f"{image} is not below {folder}: metadata.jsonl and metadata.csv name images relative to their own folder. "
            "Write the file into the folder of the images"
        ) from None


def inside(name: str) -> str:
    """The name without anything that leads out of the folder it is put in: a source's names are not to be trusted."""
    parts = re.split(r"[/\\]", name)
    return "/".join(part.replace(":", "_") for part in parts if part.strip(". ")) or "image"


def _safe(name: str) -> str:
    return "".join(_stem(inside(re.sub(r"[^\w.\-/\\]+", "_", name))))


def _stem(name: str) -> tuple[str, str]:
    """(stem, ending) of the name of an image; all of a name that has no image's ending is its stem. The number that makes
    a name differ from others is no part of its ending."""
    stem, ending = os.path.splitext(re.sub(r"(#\d+)+$", "", name))
    return (stem, ending.lower()) if ending.lower() in ENDINGS else (name, ".jpg")


def _content(image) -> bytes:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = image["path"] if isinstance(image, dict) else image
    with open_remote(path) if is_remote(path) else open(path, "rb") as file:
        return file.read()


def _copy(image, folder: Path, name: str, different: "Different") -> str:
    """Writes an image into the folder, under a name that no other image of the run has, nor a file that is there and is
    another. Returns the name."""
    content, (stem, ending) = _content(image), os.path.splitext(name)
    while True:
        free = different(name, lambda number: f"{stem}-{number}{ending}")
        target = folder / free
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if target.read_bytes() == content:
            return free


def _same(name) -> int:
    """Equal for names that some file system takes for the same."""
    folded = unicodedata.normalize("NFC", str(name)).casefold()
    return xxhash.xxh3_64_intdigest(folded.encode("utf-8", "surrogateescape"))


class Different:
    """Makes names differ from each other.

    Args:
        same: equal for names that are the same; by default in any case and Unicode form, as some file systems have it.
    """

    def __init__(self, same: Callable = _same):
        self.same, self.taken = same, {}

    def __call__(self, name: str, numbered: Callable[[int], str]) -> str:
        """The name, or if it is taken what `numbered` makes of the first free number."""
        free = name
        while self.same(free) in self.taken:
            self.taken[self.same(name)] += 1
            free = numbered(self.taken[self.same(name)])
        self.taken[self.same(free)] = 1
        return free


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))

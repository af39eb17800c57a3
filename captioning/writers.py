"""Writes captions in the form that the file's name says. One function per format:

    write(rows, target, images)    rows() yields {"image", "caption" or "error", columns ...} for each image in order,
                                   whenever it is called; target is a local path that does not exist; images() yields
                                   what captioning.sources does for the same images, for formats that hold or copy them

Rows are streamed; what is written appears complete or not at all, since the caller renames it.
"""

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.files import write_text
from common.remote import is_remote, open_remote
from data.formats import webdataset
from data.images import ImageError

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
    number in the file's name, else that name."""
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(row for row in rows() if "caption" in row):
            entry = {"image_id": _coco_id(row), "caption": row["caption"]}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry, ensure_ascii=False))
        file.write("[]\n" if file.tell() == 0 else "\n]\n")


def write_metadata(rows, target: Path, images, folder: Path, kind: str) -> None:
    """metadata.jsonl or metadata.csv of `load_dataset("imagefolder")`: `file_name`, relative to `folder`, which holds the
    images; those that are inside a source are written there."""
    copies = {row["name"]: row for row in _inside(images)} if _any_inside(rows) else {}
    names: dict[str, str] = {}
    for name in copies:
        names[name] = f"images/{_safe(name)}"
    for row in images() if copies else ():
        if row["name"] in names:
            _copy(row["image"], folder / names[row["name"]])

    def entries():
        for row in rows():
            if "caption" in row:
                name = names.get(row["image"]) or _below(row["image"], folder)
                yield {"file_name": name} | {
                    key: value for key, value in row.items() if key not in ("image", "file_name")
                }

    (write_csv if kind == ".csv" else write_jsonl)(entries, target, images)


def write_tar(rows, target: Path, images) -> None:
    """One tar file of all samples: each image, its caption as .txt, and its row as .json."""
    captions = rows()
    with tarfile.open(target, "w") as tar:
        for row, image in zip(captions, _matching(rows, images), strict=True):
            if "caption" not in row:
                continue
            stem, ending = os.path.splitext(inside(image["relative"]))
            stem = stem.replace(".", "_")  # a sample's name ends at its first dot
            _add(tar, stem + (ending.lower() or ".jpg"), _content(image["image"]))
            _add(tar, f"{stem}.txt", row["caption"].encode())
            _add(tar, f"{stem}.json", json.dumps(row, ensure_ascii=False, default=str).encode())


def write_tars(rows, target: Path, images, tars: list[str]) -> None:
    """The tar files of the source again, each sample with its caption as .txt; one it had is kept as .source.txt."""
    names = [os.path.basename(tar) for tar in tars]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{twice[0]} is the name of more than one tar of the source: caption each folder separately")
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


def text_of(image: str | None, relative: str, folder: Path | None) -> Path:
    """Where the text of an image goes: x.txt next to x.jpg, or below `folder`."""
    return (Path(image) if folder is None else folder / inside(relative)).with_suffix(".txt")


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
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _coco_id(row: dict):
    image_id = row.get("image_id")
    if image_id is None:
        name = re.split(r"[/\\]", row["image"])[-1]
        number = re.search(r"(?:^|_)(\d{12})\.\w+$", name)
        return int(number[1]) if number else name
    return int(image_id) if isinstance(image_id, str) and re.fullmatch(r"[1-9]\d{0,17}|0", image_id) else image_id


def _any_inside(rows) -> bool:
    return any(not os.path.exists(row["image"]) for row in rows() if "caption" in row)


def _inside(images) -> Iterator[dict]:
    for row in images():
        if isinstance(row["image"], dict) or is_remote(row["image"]):
            yield {"name": row["name"]}


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
    name = inside(re.sub(r"[^\w.\-/\\]+", "_", name))
    return name if os.path.splitext(name)[1] else f"{name}.jpg"


def _content(image) -> bytes:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = image["path"] if isinstance(image, dict) else image
    with open_remote(path) if is_remote(path) else open(path, "rb") as file:
        return file.read()


def _copy(image, target: Path) -> None:
    if isinstance(image, ImageError) or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_content(image))


def _matching(rows, images) -> Iterator[dict]:
    """The images of the rows, in their order: rows that are no longer in the source have none."""
    wanted = rows()
    row = next(wanted, None)
    for image in images():
        if row is not None and image["name"] == row["image"]:
            yield image
            row = next(wanted, None)
    if row is not None:
        raise DataError(f"{row['image']} was captioned before and is no longer in the source. Name another --output")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))

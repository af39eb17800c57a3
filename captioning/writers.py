"""Writes captions in the form that the file's name says. One function per form:

    write(captions, target)    `captions` are Captions; target is a local path that does not exist

Rows are streamed; what is written appears complete or not at all, since the caller renames it.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from captioning.names import Different, folded, inside, printable, short, stem_and_ending
from common.errors import DataError, UserError
from common.files import can_write, nearest_existing, whole, write_text
from common.remote import is_remote, open_binary
from common.text import json_line
from data.formats import webdataset
from data.images import ImageError
from jobs.tables import batches, json_of, schema_of, table_of

logger = logging.getLogger(__name__)
CHANGED = "the source has changed while this was running. Start the same command again"


@dataclass
class Captions:
    """What an output is made of; rows() and images() yield the same images in the same order, whenever they are called."""

    rows: Callable[[], Iterator[dict]]  # {"image", "caption", of several "captions", or "error", columns ...}
    images: Callable[[], Iterator[dict]]  # what captioning.sources yields, for forms that hold or copy the images
    output: str  # the value of --output
    tars: list[str]  # the source's files, for copies of them

    def captioned(self) -> Iterator[dict]:
        return (row for row in self.rows() if "error" not in row)

    def one_by_one(self) -> Iterator[dict]:
        """A row for each caption."""
        for row in self.rows():
            captions = row.pop("captions") if is_several(row) else []
            yield from [row | {"caption": caption} for caption in captions] or [row]


def is_several(row: dict) -> bool:
    """Whether a row has several captions: `captions` beside a caption are a column of the source."""
    return "caption" not in row and "error" not in row


def texts_of(row: dict) -> list[tuple[str, str]]:
    """(end of its file's name, caption) of a row: .txt, of several .1.txt, .2.txt, ..."""
    if is_several(row):
        return [(f".{number}.txt", caption) for number, caption in enumerate(row["captions"], 1)]
    return [(".txt", row["caption"])] if "caption" in row else []


def write_jsonl(captions: Captions, target: Path) -> None:
    _write_lines(captions.rows(), target)


def write_csv(captions: Captions, target: Path) -> None:
    _write_table(captions.one_by_one, target)


def write_parquet(captions: Captions, target: Path) -> None:
    several = any(map(is_several, captions.rows()))
    schema = schema_of(captions.rows, ("image",) if several else ("image", "caption"))
    with pq.ParquetWriter(target, schema) as writer:
        for batch in batches(captions.rows()):
            writer.write_table(table_of(batch, schema))


def write_coco(captions: Captions, target: Path) -> None:
    """COCO's results, as evaluate.py --predictions and other scorers read them. The id is the source's, else COCO's
    number in the file's name, else that name; where two images have one id, all have the whole names of `image`. Several
    captions are a list, which those scorers do not read."""
    number_of_id = Counter(short(str(_coco_id(row))) for row in captions.captioned())
    doubled = number_of_id.total() - len(number_of_id)
    if doubled:
        logger.warning("%d images share their image_id with another: the ids are the images' whole names", doubled)
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        file.write("[")
        for before, row in zip(itertools.chain(["\n"], itertools.repeat(",\n")), captions.captioned(), strict=False):
            name = "captions" if is_several(row) else "caption"
            entry = {"image_id": row["image"] if doubled else _coco_id(row), name: row[name]}
            file.write(before + json.dumps(entry, ensure_ascii=False))
        file.write("\n]\n")


def write_metadata(captions: Captions, target: Path) -> None:
    """metadata.jsonl or metadata.csv of `load_dataset("imagefolder")`: `file_name`, relative to the output's folder, which
    holds the images; those that are inside a source are written there."""
    folder = Path(captions.output).parent
    different = Different(_numbered_before_ending)
    copies = {
        row["name"]: _copy(row, folder, different)
        for row in captions.images()
        if not (isinstance(row["image"], ImageError) or os.path.exists(row["name"]))
    }

    def entries():
        for row in captions.captioned():
            image = row.pop("image")
            if image in copies or os.path.exists(image):  # else it is in a source of an earlier run
                name = copies.get(image) or _below(image, folder)
                yield {"file_name": name} | row | {"file_name": name}

    if captions.output.endswith(".csv"):
        _write_table(dataclasses.replace(captions, rows=entries).one_by_one, target)
    else:
        _write_lines(entries(), target)


def check_metadata(output: str, images: Iterator[dict]) -> None:
    """DataError if one of the images is a file that a metadata file there cannot name."""
    if is_remote(output):
        raise DataError(f"--output {output}: metadata.jsonl and metadata.csv are written into a local folder of images")
    for row in images:
        if os.path.exists(row["name"]):
            _below(row["name"], Path(output).parent)


def write_tar(captions: Captions, target: Path) -> None:
    """One tar file of all samples: each image, its caption as .txt, and its row as .json, which has its own name. The
    images' endings are made the same where they differ, as `datasets` wants them."""
    endings = {stem_and_ending(row["image"])[1] for row in captions.captioned()}
    ending = endings.pop() if len(endings) == 1 else ".jpg"
    different = Different("{}-{}".format)
    with tarfile.open(target, "w") as tar:
        for row, image in itertools.zip_longest(captions.rows(), captions.images(), fillvalue={}):
            if row.get("image") != image.get("name"):
                raise DataError(f"{image.get('name') or row['image']}: {CHANGED}")
            if texts := texts_of(row):
                # A sample's name ends at its first dot, and `datasets` leaves out names that begin with a dot or __.
                stem, _ = stem_and_ending(inside(image["relative"]))
                key = different(re.sub(r"(^|/)__+", r"\1_", stem.replace(".", "_")))
                _add(tar, f"{key}{ending}", _content(image["image"]))
                for end, text in texts:
                    _add(tar, f"{key}{end}", text.encode())
                _add(tar, f"{key}.json", json_line(row).rstrip("\n").encode())


def write_tars(captions: Captions, target: Path) -> None:
    """The tar files of the source again, each sample with its caption as .txt; one it had is kept as .source.txt."""
    target.mkdir()
    rows = captions.rows()
    behind_last = {"image": ""}
    row = next(rows, behind_last)
    for tar in captions.tars:
        base = os.path.basename(tar)
        with tarfile.open(target / base, "w") as copy:
            for sample in webdataset.samples(tar, captions=False):
                for member, content in sample["members"]:
                    _add(copy, re.sub(r"\.txt$", ".source.txt", member, flags=re.IGNORECASE), content)
                name = printable(f"{base}/{sample['image']['path'] if sample['image'] else sample['key']}")
                if row["image"].startswith(name):
                    for end, text in texts_of(row):
                        _add(copy, f"{sample['key']}{end}", text.encode())
                    row = next(rows, behind_last)
    if row is not behind_last:
        raise DataError(f"{row['image']}: {CHANGED}")


def check_tars(tars: list[str]) -> None:
    """DataError if two tars have one name."""
    for name, number in Counter(map(os.path.basename, tars)).items():
        if number > 1:
            raise DataError(f"{name} is the name of more than one tar of the source: caption each folder separately")


# ---------------------------------------------------------------- a text beside each image


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
        check_writable, named_as_texts = functools.cache(check_folder_writable), []
        for row in rows:
            if folder is None and (not isinstance(row["image"], str) or is_remote(row["image"])):
                raise UserError(f"{row['name']} is inside a source: name a folder for the .txt files with --output.")
            image = self._place(row)
            text = text_of(image)
            if short(image) in self.images:
                if folder is None and row.get("prompt") is None:  # the same file by another name
                    continue
                if row.get("prompt") is not None:
                    raise UserError(
                        f"{row['name']}: this image is asked several prompts, and all answers would have the text {text}. Name "
                        "a table: --output captions.jsonl."
                    )
                raise UserError(
                    f"{row['name']}: another image has this name in its source, and both would have the text {text}. "
                    "Caption each source into a folder of its own, or name a table: --output captions.jsonl."
                )
            self.images.add(short(image))
            (self.shared if folded(str(text)) in self.stems else self.stems).add(folded(str(text)))
            if not text.exists():
                check_writable(text.parent)
            named_as_texts += [image] * image.endswith(".txt")
        if clash := next((i for i in named_as_texts if short(i.removesuffix(".txt")) in self.images), None):
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
        is_image = {short(usual), short(usual.removesuffix(".txt"))} & self.images
        return Path(f"{image}.txt" if is_image or folded(usual) in self.shared else usual)


def check_folder_writable(folder: Path) -> None:
    """UserError if no file can be made in the folder, or where it will be."""
    if not can_write(folder):
        raise UserError(
            f"{nearest_existing(folder)} cannot be written to. Name another folder for the .txt files with --output FOLDER."
        )


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
FORM_OF_NAME = {"metadata.jsonl": "metadata", "metadata.csv": "metadata"}
FORM_OF_ENDING = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".json": "coco",
                  ".tar": "tar", "": "parquet"}  # fmt: skip
FORM_OF_FOLDER = {"parquet": "parquets", "tar": "tars"}
WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet, "coco": write_coco,
           "metadata": write_metadata, "tar": write_tar, "tars": write_tars}  # fmt: skip


def form_of(output: str | None, output_format: str | None) -> str:
    """The key of WRITERS that a name and --output_format say, "parquets" for a folder of Parquet files, or "txt".

    Raises:
        DataError: an extension that is not one of these.
    """
    if output is None:
        if output_format != "txt":
            raise DataError(f"--output_format {output_format} needs --output, where to write it")
        return "txt"
    name = re.split(r"[/\\]", output)[-1]
    ending = os.path.splitext(name)[1].lower()
    of_name = "parquet" if os.path.isdir(output) else FORM_OF_NAME.get(name, FORM_OF_ENDING.get(ending))
    form = output_format or of_name
    if form is None:
        raise DataError(
            f"--output {output}: the extension {ending} does not say what to write: {'; '.join(FORMATS.values())}"
        )
    return form if ending in (".parquet", ".tar") else FORM_OF_FOLDER.get(form, form)


# ---------------------------------------------------------------- tables


def _write_lines(rows: Iterator[dict], target: Path) -> None:
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(json_line, rows))


def _write_table(rows: Callable[[], Iterator[dict]], target: Path) -> None:
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain.from_iterable(rows()))))
        writer.writeheader()
        for row in rows():
            writer.writerow({name: json_of(v) if isinstance(v, dict | list | bool) else v for name, v in row.items()})


# ---------------------------------------------------------------- names and files


def _coco_id(row: dict):
    image_id = row.get("image_id")
    if image_id is None:
        name = re.split(r"[/\\]", row["image"])[-1]
        number = re.search(r"(?:^|_)(\d{12})\.\w+$", name)
        return int(number[1]) if number else name
    return int(image_id) if re.fullmatch(r"[1-9]\d{0,17}|0", str(image_id)) else image_id


def _below(image: str, folder: Path) -> str:
    try:
        return Path(os.path.abspath(image)).relative_to(os.path.abspath(folder)).as_posix()
    except ValueError:
        raise DataError(
            f"{image} is not below {folder}: metadata.jsonl and metadata.csv name images relative to their own folder. "
            "Write the file into the folder of the images"
        ) from None


def _content(image: dict | str) -> bytes:
    image = image if isinstance(image, dict) else {"path": image}
    if image.get("bytes") is not None:
        return image["bytes"]
    with open_binary(image["path"]) as file:
        return file.read()


def _copy(row: dict, folder: Path, different: Different) -> str:
    """Writes an image into the folder, under a name that no other image of the run has, nor a file that is there and is
    another. Returns the name."""
    content = _content(row["image"])
    stem, ending = stem_and_ending(inside(row["name"]))
    name = "images/" + re.sub(r"[^\w.\-/]+", "_", stem) + ending
    while True:
        free = different(name)
        target = folder / free
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as temporary:
                temporary.write_bytes(content)
        if target.read_bytes() == content:
            return free


def _numbered_before_ending(name: str, number: int) -> str:
    stem, ending = os.path.splitext(name)
    return f"{stem}-{number}{ending}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))

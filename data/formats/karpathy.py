"""COCO in Karpathy's splits (`dataset_coco.json`, also of Flickr8k and Flickr30k), and the Hub set with its columns.

restval joins train: 113,287 images. The id is COCO's, so that results are comparable. Missing images of COCO
are fetched, from the data set's own host only.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from common.caches import cache_folder
from common.errors import DataError
from common.files import whole
from common.processes import show_progress
from data.columns import captions_of
from data.finder import folders_beside
from data.rows import Options, Part, Record, Row, scalars, split_name, text_or_none
from data.text_rows import read_json

logger = logging.getLogger(__name__)

NAME = "karpathy"
ABOUT = "dataset_coco.json and similar files"
YIELDS_TO = ("saved",)  # whose dataset_dict.json is called alike

COCO_HOST = "http://images.cocodataset.org"  # the data set's own, and the only one that images are fetched from
CONNECTIONS = 16
COCO_IMAGE = re.compile(r"(train|val|test)(2014|2015|2017)/(COCO_(train|val|test)(2014|2015)_)?\d{12}\.jpg")


def matches(path: Path) -> bool:
    if path.is_file():
        if path.suffix.lower() != ".json":
            return False
        with open(path, encoding="utf-8", errors="replace") as file:
            return '"sentids"' in file.read(65536)
    return any(path.glob("dataset_*.json"))


def parts(path: Path, options: Options) -> list[Part]:
    file = path
    if not path.is_file():
        files = sorted(path.glob("dataset_*.json"))
        if len(files) != 1:
            raise DataError(f"{path}: {len(files)} files are called dataset_*.json. Give the path of the one to load")
        file = files[0]
    return [Part(NAME, str(file), folders=image_folders(file, options))]


def image_folders(file: Path, options: Options) -> tuple[str, ...]:
    """Where the images of COCO, Flickr8k, Flickr30k or RSICD are, and the cache that missing ones of COCO are fetched into."""
    folders = [options.image_dir] if options.image_dir else folders_beside(file)
    return (*folders, str(cache_folder(options.cache_dir) / "coco"))


def read(part: Part, options: Options) -> Iterator[Row]:
    yield from rows_of(read_json(Path(part.place))["images"], Path(part.place).name)


def is_karpathy(columns: Iterable[str]) -> bool:
    """Whether a table has the columns of the Hub set yerevann/coco-karpathy."""
    return {"filename", "split", "sentences"} <= set(columns) and "image" not in columns


def rows_of(rows: Iterable[dict], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows):
        where = f"{name} image {number}"
        if not isinstance(row, dict) or not isinstance(row.get("sentences"), list | tuple):
            raise DataError(f"{where}: no 'sentences'. Known formats are COCO's and Karpathy's.")
        yield Row(
            where,
            os.path.join(row.get("filepath") or "", row["filename"]),
            captions_of(row, ["sentences"], where),
            name=row["filename"],
            image_id=text_or_none(row.get("cocoid")),
            split=split_name(row["split"], where),
            columns=scalars(row),
            used=("filename", *row),
        )


def fetch_missing(records: list[Record], options: Options) -> None:
    """Fetch the images of COCO that are missing into the cache, and put their paths into the records."""
    folder = cache_folder(options.cache_dir) / "coco"
    fetched = {}
    for record in records if not options.image_dir else ():
        name = "/".join(str(record.image).replace(os.sep, "/").split("/")[-2:])
        if COCO_IMAGE.fullmatch(name) and not os.path.exists(record.image):
            fetched[name] = record
    if fetched:
        fetch_images(list(fetched), folder)
    for name, record in fetched.items():
        record.image = str(folder / name)


def fetch_images(names: list[str], folder: Path) -> None:
    """Fetch COCO images ("val2014/COCO_val2014_000000000042.jpg") into a folder, from the data set's own host only.

    Concurrent; a file appears under its name only when complete, so an interrupted run continues where it stopped.

    Raises:
        DataError: names the first image that could not be fetched. What was fetched is kept.
    """
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))

    def fetch(name: str) -> None:
        target = folder / name
        if target.exists():
            return
        for attempt in range(4):
            try:
                answer = session.get(f"{COCO_HOST}/{name}", timeout=30, allow_redirects=False)
                if answer.status_code == 200:
                    content = answer.content
                    if not content.startswith(b"\xff\xd8"):
                        raise DataError(f"{COCO_HOST}/{name}: the response is not a JPEG file")
                    if len(content) != int(answer.headers.get("Content-Length", len(content))):
                        raise requests.ConnectionError("the response was cut off")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with whole(target) as part:
                        part.write_bytes(content)
                    return
                if answer.status_code < 500:
                    raise DataError(f"{COCO_HOST}/{name}: the server returned {answer.status_code}")
                fault = f"the server returned {answer.status_code}"
            except requests.RequestException as error:
                fault = type(error).__name__
            time.sleep(0.2 * 4**attempt if attempt < 3 else 0)
        raise DataError(
            f"{COCO_HOST}/{name}: {fault}. Run again to continue, or give the folder of the images with --image_dir"
        )

    logger.info("fetching %d COCO images into %s", len(names), folder)
    fetch(names[0])  # alone: without a network, one message rather than sixteen
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        for _ in show_progress(pool.map(fetch, names), len(names), "fetching COCO images"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)

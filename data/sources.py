"""Every source of captions: one plain function a format, and `load`, which chooses it.

A format's function yields one `Record` a row, with the path of an image. Sources that hold the images themselves
(Parquet, WebDataset, the Hub, `save_to_disk`) also give their memory-mapped table, and a record has a row of it for an
image. No image is decoded here; captions and names are held in memory, about half a kilobyte an image.
"""

import csv
import glob
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import requests
import xxhash
from tqdm import tqdm

from data import records as rec
from data.records import SPLIT_NAMES, SPLITS, DataError, Record

logger = logging.getLogger(__name__)

FORMATS = {
    "auto": "told from the path",
    "hub": "a Hub data set with an image and a caption column",
    "parquet": "Parquet files, or a folder of the shape of a Hub data set",
    "saved": "a folder made by save_to_disk",
    "webdataset": "tar files of images with .txt or .json captions",
    "flickr8k": "Flickr8k.token.txt or captions.txt beside a folder of images",
    "karpathy": "dataset_coco.json and its kin",
    "annotations": "JSON, JSONL, CSV, COCO or VizWiz annotations, one file or one a split",
    "imagefolder": "a folder of images with metadata.jsonl or metadata.csv",
    "scenes": "the scenes that this repo draws itself",
}
TABLES = ("hub", "parquet", "saved", "webdataset")

IMAGE_COLUMNS = (
    "image",
    "img",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "path",
)
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "txt", "description")
NUMBERED_CAPTION = re.compile(r"captions?_?\d+")  # caption_0 ... caption_4: one column a caption
IMAGE_FOLDERS = ("", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")

COCO_HOST = "http://images.cocodataset.org"  # the data set's own, and the only one that images are fetched from
COCO_FOLDER = re.compile(r"(train|val|test)(2014|2015|2017)")
COCO_FILE = re.compile(r"(COCO_(train|val|test)(2014|2015)_)?\d{12}\.jpg")


def load(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    data_format: str = "auto",
    image_dir: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split_seed: int = 42,
    streaming: bool = False,
    skip_bad_samples: bool = False,
    cache_dir: str | None = None,
    splits: tuple[str, ...] | None = None,
    max_samples: dict[str, int] | None = None,
    bad_samples: list | None = None,
    require_images: bool = True,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load captioned images, one record an image, and say on one log line what was found and dropped.

    Args:
        dataset_name: a local file or folder, a pattern of tar files, the id of a Hub data set, or `scenes`.
        dataset_config_name: configuration of a Hub set. For `scenes`, `shuffled` pairs images with others' captions.
        data_format: one of `FORMATS`; `auto` tells it from the path.
        image_dir: folder of the images, where they are not beside the annotations.
        image_column, caption_column: for columns of unusual names.
        split_seed: seed of the 90/5/5 split over images, for a source without splits.
        streaming: return an IterableDatasetDict. Parquet, WebDataset and Hub sets are then read as they are needed;
            `stream_records` says what cannot be checked so. Other formats are loaded as ever (they are only
            captions and paths) and keep every check.
        skip_bad_samples: drop missing images and bad captions instead of raising, but for those of the source's own
            validation and test splits.
        cache_dir: cache of `datasets`, and of the COCO images that are fetched.
        splits: these splits only. Images of other splits are then neither fetched (COCO-Karpathy) nor compared.
        max_samples: at most so many records of a split, e.g. {"train": 1000}: the first ones.
        bad_samples: a list that receives {"image_id", "image", "reason"} for each row skipped.
        require_images: False for whoever reads captions alone: image files may then be missing, and none is fetched.

    Returns:
        Those of train, validation and test that exist, with columns `image_id` (str), `image` ({"path", "bytes"},
        undecoded), `captions` (list of str) and the source's other columns. A split of the source keeps its order; a
        drawn one is ordered by id.

    Raises:
        DataError, ImageError: both ValueErrors, saying what is wrong, where, and what to do.
    """
    dataset_name, options = str(dataset_name), (image_column, caption_column)
    if data_format not in FORMATS:
        raise DataError(f"data_format {data_format!r} is unknown. Known: {', '.join(FORMATS)}")
    wanted = [*(splits or ()), *(max_samples or {})]
    for split in wanted:
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}. Splits are called {', '.join(SPLITS)}")
    source = detect_format(dataset_name) if data_format == "auto" else data_format
    path = Path(dataset_name).expanduser()
    if source not in ("hub", "webdataset", "scenes") and not path.exists():
        raise DataError(f"{dataset_name}: no such file or folder")

    if source == "scenes":
        from data import scenes  # late: no other source needs it

        dataset = scenes.load(shuffled=dataset_config_name == "shuffled")
        dataset = choose(dataset, splits, max_samples, dataset_name)
        logger.info("%s: %s; drawn by this repo", dataset_name, counts(dataset))
        return as_streams(dataset) if streaming else dataset

    dropped: Counter = Counter()
    bad_samples = [] if bad_samples is None else bad_samples
    table = None
    if source in TABLES:
        tables = load_tables(dataset_name, source, dataset_config_name, cache_dir, streaming)
        karpathy = is_karpathy(tables)
        only_paths = karpathy or image_column_holds_paths(tables, *options)
        if streaming and only_paths:  # small, so it is loaded like other annotations
            tables = load_tables(dataset_name, source, dataset_config_name, cache_dir, streaming=False)
        if karpathy:
            source = "karpathy"
            rows = karpathy_rows((row for table in tables.values() for row in table), dataset_name)
        elif streaming and not only_paths:
            dataset = stream_records(tables, *options, split_seed, skip_bad_samples, dataset_name)
            dataset = choose(dataset, splits, max_samples, dataset_name)
            logger.info(
                "%s (%s, streaming): splits %s; not checked in a stream: rows of one image that are not neighbours, "
                "equal images in two official splits, duplicate ids",
                dataset_name,
                source,
                ", ".join(dataset),
            )
            return dataset
        else:
            rows, table = table_rows(tables, *options, image_dir or (path if path.is_dir() else path.parent))
    elif source == "karpathy":
        file = karpathy_file(path)
        rows = karpathy_rows(read_json(file)["images"], file.name)
    elif source == "flickr8k":
        rows = flickr8k_rows(path, image_dir, dropped)
    elif source == "imagefolder":
        rows = image_folder_rows(path, *options)
    else:
        rows = annotation_rows(path, *options, image_dir, dropped)

    records = rec.merge(rows, skip_bad_samples, dropped, bad_samples)
    official, complete = rec.splits_of_source(records)
    if official and complete:  # before images are looked for: those of unwanted splits need not be there
        require_splits(wanted, [split for split in SPLITS if any(r.split == split for r in records)], dataset_name)
        records = [record for record in records if splits is None or record.split in splits]
        if max_samples:
            records = first_of_each_split(records, max_samples)
    if source == "karpathy":
        locate_karpathy_images(records, image_dir, path, rec.cache_folder(cache_dir), fetch=require_images)
    if not records:
        raise DataError(f"{dataset_name}: no captioned image found{in_words(dropped)}")

    if table is None:
        sizes, read = rec.file_sizes(records), rec.read_file
    else:
        sizes, _, read = rec.table_images(table)
        sizes = [sizes[record.image] for record in records]
    if require_images:
        records, sizes = rec.drop_missing(records, sizes, skip_bad_samples, dropped, bad_samples)
    sizes = [size or 0 for size in sizes]
    records = rec.unite(records, rec.same_content([record.image for record in records], sizes, read), official, dropped)
    rec.name_records(records)
    how = rec.draw_splits(records, split_seed, official, complete)
    dataset = choose(rec.to_dataset(records, table), splits, max_samples, dataset_name)
    detected = " detected" if data_format == "auto" else ""
    logger.info("%s (%s%s): %s; %s%s", dataset_name, source, detected, counts(dataset), how, in_words(dropped))
    return as_streams(dataset) if streaming else dataset


def detect_format(dataset_name: str) -> str:
    """The format of a path, from the names of the files there."""
    if dataset_name == "scenes":
        return "scenes"
    path = Path(dataset_name).expanduser()
    if path.is_file():
        if path.suffix == ".tar":
            return "webdataset"
        if path.suffix == ".parquet":
            return "parquet"
        if path.name.endswith("token.txt") or path.name == "captions.txt":
            return "flickr8k"
        if path.suffix in (".json", ".jsonl", ".csv", ".tsv"):
            with open(path, encoding="utf-8", errors="replace") as file:
                karpathy = path.suffix == ".json" and '"sentids"' in file.read(65536)
            return "karpathy" if karpathy else "annotations"
        raise DataError(f"{dataset_name}: cannot tell the format of this file. {format_choices()}")
    if path.is_dir():
        found = []
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return "saved"
        if flickr8k_file(path):
            found.append("flickr8k")
        if any(path.glob("dataset_*.json")):
            found.append("karpathy")
        if metadata_files(path):
            found.append("imagefolder")
        if not found and annotation_files(path):
            found.append("annotations")
        if any(path.glob("*.tar")) or any(file for split in SPLIT_NAMES for file in (path / split).glob("*.tar")):
            found.append("webdataset")
        if any(path.rglob("*.parquet")):
            found.append("parquet")
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"{dataset_name}: could be {' or '.join(found)}. Say which with --data_format")
        raise DataError(f"{dataset_name}: no captions of a known format in this folder. {format_choices()}")
    if dataset_name.endswith(".tar"):
        return "webdataset"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset_name) or path.suffix in (
        ".json",
        ".jsonl",
        ".csv",
        ".parquet",
    ):
        raise DataError(f"{dataset_name}: no such file or folder, and not the id of a Hub data set")
    return "hub"


def format_choices() -> str:
    return "Say it with --data_format: " + "; ".join(f"{name} ({what})" for name, what in FORMATS.items())


def split_of_file(path: Path) -> str | None:
    """captions_val2014.json -> validation; None where the name says no split."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------- Flickr8k


def flickr8k_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    for pattern in ("Flickr8k.token.txt", "captions.txt", "*/Flickr8k.token.txt", "*/captions.txt"):
        for file in sorted(path.glob(pattern)):
            return file
    return None


def flickr8k_rows(path: Path, image_dir, dropped: Counter) -> Iterator[Record]:
    """Flickr8k as first published (`Flickr8k.token.txt`: name#number TAB caption) or as on Kaggle (`captions.txt`: CSV
    with the header image,caption). `Flickr_8k.{train,dev,test}Images.txt` beside it, where they are, say the splits."""
    file = flickr8k_file(path)
    if file is None:
        raise DataError(f"{path}: neither Flickr8k.token.txt nor captions.txt is there")
    split_of: dict[str, str] = {}
    words = {"train": "train", "validation": "dev", "test": "test"}
    lists = {split: file.parent / f"Flickr_8k.{word}Images.txt" for split, word in words.items()}
    there = [split for split, names in lists.items() if names.exists()]
    if 0 < len(there) < 3:
        absent = ", ".join(str(names) for names in lists.values() if not names.exists())
        raise DataError(f"{absent}: missing. Put all three official split files there, or none")
    for split in there:
        for name in lists[split].read_text(encoding="utf-8").split():
            if split_of.setdefault(name, split) != split:
                raise DataError(f"{lists[split]}: image {name} is also in the list of {split_of[name]}")

    roots = [file.parent, file.parent.parent] if path.is_file() or file.parent != path else [path]
    folders = [Path(root, folder) for root in roots for folder in IMAGE_FOLDERS]
    folders += [folder / folder.name for folder in folders]  # Kaggle archives nest a folder in one of the same name
    folders += [root / "Flickr8k_Dataset" / "Flicker8k_Dataset" for root in roots]
    find = finder([Path(image_dir)] if image_dir else folders)
    unlisted = set()
    for name, caption, where in flickr8k_captions(file):
        if split_of and name not in split_of:
            unlisted.add(name)
            dropped["images in none of the official split lists"] = len(unlisted)
            continue
        image = find(name)
        if name.endswith(".jpg.1") and not os.path.exists(image):
            dropped[f"caption rows of {name}, a slip of the published file"] += 1
            continue
        yield Record(where, image, [caption], name=name, split=split_of.get(name))


def flickr8k_captions(file: Path) -> Iterator[tuple[str, str, str]]:
    with open(file, encoding="utf-8", newline="") as lines:
        if file.suffix == ".txt" and not file.name.endswith("token.txt"):
            reader = csv.reader(lines)
            header = next(reader, [])
            if [name.strip() for name in header] != ["image", "caption"]:
                raise DataError(f"{file}: the first line is {header}, expected the header image,caption")
            for row in reader:
                if row:
                    yield row[0].strip(), ",".join(row[1:]), f"{file.name} line {reader.line_num}"
            return
        for number, line in enumerate(lines, 1):
            name, tab, caption = line.rstrip("\r\n").partition("\t")
            if not name.strip() and not tab:
                continue
            if not tab:
                raise DataError(f"{file} line {number}: no tab between image and caption: {line.strip()[:80]!r}")
            yield name.rsplit("#", 1)[0], caption, f"{file.name} line {number}"


# ---------------------------------------------------------------- COCO in Karpathy's splits


def karpathy_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("dataset_*.json"))
    if len(files) != 1:
        raise DataError(f"{path}: {len(files)} files are called dataset_*.json. Give the path of the one to load")
    return files[0]


def is_karpathy(tables: dict) -> bool:
    columns = next(iter(tables.values())).column_names or ()
    return {"filename", "split", "sentences"} <= set(columns) and "image" not in columns


def karpathy_rows(rows: Iterable[dict], name: str) -> Iterator[Record]:
    """`dataset_coco.json` (also of Flickr8k and Flickr30k), or the columns of the Hub set yerevann/coco-karpathy.

    restval joins train: 113,287 images. The image is its path below the image folder until
    `locate_karpathy_images`. The id is COCO's, so that results compare with everyone's.
    """
    for number, row in enumerate(rows):
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in row["sentences"]]
        where = f"{name} image {number}"
        image_id = row.get("cocoid")
        yield Record(
            where,
            os.path.join(row.get("filepath") or "", row["filename"]),
            captions,
            name=row["filename"],
            image_id=None if image_id is None else str(image_id),
            split=rec.split_name(row["split"], where),
        )


def locate_karpathy_images(records: list[Record], image_dir, path: Path, cache: Path, fetch: bool = True) -> None:
    """Put the path of each image's file into its record, from a local folder, else from the cache, into which missing
    COCO images are first fetched. Without `fetch` a missing image keeps its path below the image folder."""
    base = path if path.is_dir() else path.parent
    roots = [Path(image_dir)] if image_dir else [base / folder for folder in IMAGE_FOLDERS]
    find, find_flat = finder([*roots, cache / "coco"]), finder(roots)
    wanted = []
    for record in records:
        folder, name = os.path.split(record.image)
        found = find(record.image)
        if not os.path.exists(found) and os.path.exists(find_flat(name)):
            found = find_flat(name)
        if not os.path.exists(found) and not image_dir and COCO_FOLDER.fullmatch(folder) and COCO_FILE.fullmatch(name):
            found = str(cache / "coco" / folder / name)
            wanted.append(f"{folder}/{name}")
        record.image = found if fetch or os.path.exists(found) else record.image
    if wanted and fetch:
        fetch_coco_images(wanted, cache / "coco")


def fetch_coco_images(names: list[str], folder: Path, connections: int = 16) -> None:
    """Fetch COCO images ("val2014/COCO_val2014_000000000042.jpg") into a folder, from the data set's own host only.

    Concurrent; a file appears under its name only when whole, so a broken-off run continues where it stopped.

    Raises:
        DataError: naming the first image that could not be had. What was fetched stays.
    """
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=connections))

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
                        raise DataError(f"{COCO_HOST}/{name}: what came is no JPEG file")
                    if len(content) != int(answer.headers.get("Content-Length", len(content))):
                        raise requests.ConnectionError("the answer broke off")
                    rec.write_atomically(target, content)
                    return
                if answer.status_code < 500:
                    raise DataError(f"{COCO_HOST}/{name}: the server answers {answer.status_code}")
                fault = f"the server answers {answer.status_code}"
            except requests.RequestException as error:
                fault = type(error).__name__
            time.sleep(0.2 * 4**attempt if attempt < 3 else 0)
        raise DataError(
            f"{COCO_HOST}/{name}: {fault}. Run again to continue, or give the folder of the images with --image_dir"
        )

    logger.info("fetching %d COCO images into %s", len(names), folder)
    fetch(names[0])  # alone: without a network, one message rather than sixteen
    pool = ThreadPoolExecutor(connections)
    try:
        for _ in tqdm(pool.map(fetch, names), total=len(names), desc="COCO images", mininterval=1):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- annotation files: JSON, JSONL, CSV, COCO, VizWiz


def annotation_files(path: Path) -> list[tuple[Path, str | None]]:
    """A file, or one file a split in a folder or its `annotations` folder: train.jsonl, captions_val2014.json,
    processed_val.json, ... Returns (file, split or None)."""
    if path.is_file():
        return [(path, split_of_file(path))]
    for folder in (path, path / "annotations"):
        files = [
            file
            for kind in ("json", "jsonl", "csv", "tsv")
            for file in sorted(folder.glob(f"*.{kind}"))
            if split_of_file(file)
        ]
        # COCO ships captions_ beside instances_; VizWiz' processed_ files are made from the official ones.
        for prefix in ("processed_", "captions_", ""):
            chosen = [(file, split_of_file(file)) for file in files if file.name.startswith(prefix)]
            if chosen:
                return chosen
    return []


def annotation_rows(path: Path, image_column, caption_column, image_dir, dropped: Counter) -> Iterator[Record]:
    """Annotation files of every common kind, told by their content.

    COCO and VizWiz: {"images": [...], "annotations": [...]}. Else a list of objects, one object a line, or a CSV file,
    with `image` (a path), `captions` or `caption`, and maybe `image_id`, `split` and further columns.
    """
    files = annotation_files(path)
    if not files:
        raise DataError(f"{path}: no annotation file for train, validation or test (JSON, JSONL, CSV) is there")
    seen: dict = {}
    for file, split in files:
        if split is not None and seen.setdefault(split, file) is not file and path.is_dir():
            raise DataError(f"{path}: {seen[split].name} and {file.name} are both for {split}. Remove or rename one")
    for file, split in files:
        find = finder([Path(image_dir)] if image_dir else [], beside=file)
        if file.suffix in (".csv", ".tsv"):
            rows = csv_rows(file)
        else:
            content = read_json(file) if file.suffix == ".json" else jsonl_rows(file)
            if isinstance(content, dict) and {"images", "annotations"} <= set(content):
                yield from coco_rows(content, file, split, find, dropped)
                continue
            if isinstance(content, dict):
                raise DataError(
                    f"{file}: an object with the keys {', '.join(list(content)[:8])}. Expected a list of objects, or "
                    "COCO annotations (keys images and annotations)"
                )
            rows = (
                ((row, f"{file.name} line {number}") for number, row in content)
                if file.suffix == ".jsonl"
                else ((row, f"{file.name} entry {number}") for number, row in enumerate(content))
            )
        yield from dict_rows(rows, str(file), image_column, caption_column, find, split)


def coco_rows(content: dict, file: Path, split: str | None, find, dropped: Counter) -> Iterator[Record]:
    """COCO's annotation JSON, and VizWiz' official one, whose rejected captions (spam) and precanned ones ("Quality
    issues are too severe ...") are left out, as in its official evaluation."""
    captions: dict = {}
    for number, annotation in enumerate(content["annotations"]):
        if "caption" not in annotation or "image_id" not in annotation:
            raise DataError(f"{file} annotation {number}: no caption or image_id. Is this a file of captions?")
        if annotation.get("is_rejected") or annotation.get("is_precanned"):
            dropped["rejected or precanned captions"] += 1
            continue
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    known: dict = {}
    for image in content["images"]:
        if known.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            raise DataError(
                f"{file}: image id {image['id']} names two images: {known[image['id']]} and {image['file_name']}"
            )
        if image["id"] not in captions:
            dropped["images without captions"] += 1
            continue
        yield Record(
            f"{file.name} image {image['id']}",
            find(image["file_name"]),
            captions.pop(image["id"]),
            name=image["file_name"],
            image_id=str(image["id"]),
            split=split,
            extras={"text_detected": image["text_detected"]} if "text_detected" in image else {},
        )
    if captions.keys() - known.keys():
        raise DataError(f"{file}: captions of image id {min(map(str, captions))}, which is not among its images")


def read_json(file: Path):
    try:
        with open(file, encoding="utf-8-sig") as content:
            return json.load(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON: {error}. One object a line belongs into a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}). Save it as UTF-8") from None


def jsonl_rows(file: Path) -> Iterator[tuple[int, dict]]:
    with open(file, encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} line {number}: not valid JSON: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} after line {number}: not UTF-8 text ({error}). Save it as UTF-8") from None


def csv_rows(file: Path) -> Iterator[tuple[dict, str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
        try:
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{file} line {reader.line_num}: more fields than the header has. Quote captions with commas"
                    )
                captions = row.get("captions")
                if captions and captions.lstrip().startswith("["):  # a list has no other form in CSV
                    row["captions"] = json.loads(captions)
                yield row, f"{file.name} line {reader.line_num}"
        except (csv.Error, json.JSONDecodeError) as error:
            raise DataError(f"{file} line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} after line {reader.line_num}: not UTF-8 text ({error}). Save it as UTF-8"
            ) from None


def dict_rows(rows, source: str, image_column, caption_column, find, split: str | None) -> Iterator[Record]:
    """Rows with named columns and an image's path in one of them.

    Args:
        rows: (dict, where) pairs.
        split: the split of every row, unless it has a `split` of its own.
    """
    image_name = caption_names = None
    for row, where in rows:
        if not isinstance(row, dict):
            raise DataError(f"{source}, {where}: expected an object with image and captions, got {type(row).__name__}")
        if image_name is None:
            image_name, caption_names = find_columns(list(row), image_column, caption_column, f"{source}, {where}")
        image = row.get(image_name)
        if not isinstance(image, str) or not image.strip():
            raise DataError(f"{source}, {where}: column {image_name} holds {image!r}, expected the path of an image")
        if re.match(r"https?://", image):
            raise DataError(
                f"{source}, {where}: column {image_name} holds an address ({image[:80]}). Images are not fetched from "
                "addresses in a data set: download them, and give their names and --image_dir"
            )
        own_split = row.get("split")
        image_id = row.get("image_id")
        yield Record(
            where,
            find(image),
            captions_of(row, caption_names, where),
            name=os.path.basename(image) if os.path.isabs(image) else image,
            image_id=None if image_id is None else str(image_id),
            split=split if own_split is None else rec.split_name(own_split, f"{source}, {where}"),
            extras={
                key: value
                for key, value in row.items()
                if key not in (image_name, *caption_names, "image_id", "split", "image", "captions")
            },
        )


def find_columns(columns: list[str], image_column, caption_column, source: str, image_columns=()):
    """The image column and the caption columns, by their usual names.

    Args:
        image_columns: columns that are known to hold images (their `datasets` type is Image).
    """
    for option, name in (("image_column", image_column), ("caption_column", caption_column)):
        if name is not None and name not in columns:
            raise DataError(f"{source}: no column {name!r} (--{option}). Columns present: {', '.join(columns)}")
    image = image_column or next((name for name in (*image_columns, *IMAGE_COLUMNS) if name in columns), None)
    captions = [caption_column or next((name for name in CAPTION_COLUMNS if name in columns and name != image), None)]
    if captions == [None]:
        captions = sorted(name for name in columns if NUMBERED_CAPTION.fullmatch(name)) or [None]
    if captions == [None] and "json" in columns:  # WebDataset: the caption is inside
        captions = ["json"]
    for option, name in (("image", image), ("caption", captions[0])):
        if name is None:
            raise DataError(
                f"{source}: no {option} column. Columns present: {', '.join(columns)}. Name it with --{option}_column"
            )
    return image, captions


def captions_of(row: dict, names: list[str], where: str) -> list:
    """The raw captions of a row, whether in one column or several, a string, a list, or inside WebDataset's json."""
    captions = []
    for name in names:
        value = row.get(name)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if name == "json":
            value = json.loads(value) if isinstance(value, str) else value
            value = value or {}
            inner = next((key for key in CAPTION_COLUMNS if value.get(key) is not None), None)
            if inner is None:
                raise DataError(f"{where}: the json of this sample has no caption. Its keys: {', '.join(value)}")
            value = value[inner]
        captions += value if isinstance(value, (list, tuple)) else [value]
    return captions


def finder(folders: list, beside: Path | None = None):
    """A function from an image's name in the annotations to the path of its file.

    Args:
        folders: where to look, in this order.
        beside: the annotation file, with no folder given: images are looked for beside it, and in the usual folders
            there, those of its split (train2014, val, ...) first.
    """
    if beside is not None and not folders:
        named = re.findall(r"(?:train|val|test)(?:2014|2015|2017)?", beside.stem)
        roots = [beside.parent, beside.parent / "images", beside.parent.parent, beside.parent.parent / "images"]
        folders = [root / folder for folder in ["", *named] for root in roots]
        folders += [root / folder for root in roots for folder in (*IMAGE_FOLDERS[1:], "train2014", "val2014")]
    folders = [os.path.abspath(folder) for folder in folders]

    def find(name: str) -> str:
        for folder in folders:
            path = os.path.join(folder, name)
            if os.path.exists(path):
                return os.path.normpath(path)
        return os.path.normpath(os.path.join(folders[0], name))

    return find


# ---------------------------------------------------------------- a folder of images with metadata


def metadata_files(path: Path) -> list[tuple[Path, str | None]]:
    folders = [(path, None)] + [(path / word, split) for word, split in SPLIT_NAMES.items()]
    return [
        (folder / name, split)
        for folder, split in folders
        for name in ("metadata.jsonl", "metadata.csv")
        if (folder / name).is_file()
    ]


def image_folder_rows(path: Path, image_column, caption_column) -> Iterator[Record]:
    """The `imagefolder` layout of `datasets`: metadata.jsonl or metadata.csv with file_name and a caption column, beside
    the images, or one in each of train, validation and test."""
    files = metadata_files(path)
    if not files:
        raise DataError(f"{path}: neither metadata.jsonl nor metadata.csv is there, or in its train, validation, test")
    for file, split in files:
        rows = (
            csv_rows(file)
            if file.suffix == ".csv"
            else ((row, f"{file.name} line {number}") for number, row in jsonl_rows(file))
        )
        for record in dict_rows(rows, str(file), image_column, caption_column, finder([file.parent]), split):
            folder = record.name.replace("\\", "/").split("/")[0]
            if record.split is None and folder in SPLIT_NAMES and "/" in record.name:
                record.split = SPLIT_NAMES[folder]  # one metadata file, images in train/, validation/, test/
            if split is not None:
                record.name = f"{file.parent.name}/{record.name}"
            yield record


# ---------------------------------------------------------------- tables: Parquet, Hub, save_to_disk, WebDataset


def load_tables(dataset_name: str, source: str, config: str | None, cache_dir, streaming: bool) -> dict:
    """What `datasets` loads, one table a split of train, validation and test (restval joins train)."""
    path = Path(dataset_name).expanduser()
    try:
        if source == "saved":
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.Dataset):
                loaded = datasets.DatasetDict({"train": loaded})
            if streaming:
                loaded = as_streams(loaded)
        elif source == "webdataset":
            loaded = datasets.load_dataset(
                "webdataset", data_files=tar_files(dataset_name), cache_dir=cache_dir, streaming=streaming
            )
        elif path.is_file():
            loaded = datasets.load_dataset(
                "parquet",
                data_files={split_of_file(path) or "train": str(path)},
                cache_dir=cache_dir,
                streaming=streaming,
            )
        else:
            loaded = datasets.load_dataset(
                str(path) if path.exists() else dataset_name, config, cache_dir=cache_dir, streaming=streaming
            )
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub and their network libraries have no common base
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{dataset_name}: could not be loaded as {source} ({type(error).__name__}: {reason[0] if reason else ''}). "
            + (
                "Check the path and the files"
                if path.exists() or source == "webdataset"
                else "Check the id on huggingface.co, the network, and HF_HUB_OFFLINE; local data need a path that exists"
            )
        ) from None
    tables: dict = {}
    for name, table in loaded.items():
        if name not in SPLIT_NAMES:
            raise DataError(
                f"{dataset_name}: split {name!r} is none of train, validation, test. Splits present: "
                f"{', '.join(loaded)}. Save a copy with renamed splits (save_to_disk), or choose another configuration"
            )
        if streaming and table.features is None:  # not said by the source: taken from its first rows
            table = table._resolve_features()
        tables.setdefault(SPLIT_NAMES[name], []).append(table)
    join = datasets.concatenate_datasets
    return {split: parts[0] if len(parts) == 1 else join(parts) for split, parts in tables.items()}


def tar_files(dataset_name: str) -> dict[str, list[str]]:
    """Tar files of a folder (with train, validation, test folders, or splits in the names), file or pattern."""
    path = Path(dataset_name).expanduser()
    files = sorted(path.rglob("*.tar")) if path.is_dir() else [Path(name) for name in sorted(glob.glob(str(path)))]
    if not files:
        raise DataError(f"{dataset_name}: no tar file matches")
    found: dict[str, list[str]] = {}
    for file in files:
        split = SPLIT_NAMES.get(file.parent.name) or split_of_file(file) or "train"
        found.setdefault(split, []).append(str(file))
    return found


def image_and_caption_columns(table, image_column, caption_column, source: str):
    features = table.features or {}
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return find_columns(list(table.column_names), image_column, caption_column, source, typed)


def image_column_holds_paths(tables: dict, image_column, caption_column) -> bool:
    table = next(iter(tables.values()))
    image_name, _ = image_and_caption_columns(table, image_column, caption_column, "the data set")
    return table.features[image_name].dtype in ("string", "large_string")


def table_rows(
    tables: dict, image_column, caption_column, image_dir
) -> tuple[Iterable[Record], datasets.Dataset | None]:
    """Rows of tables with an image and a caption column: (records, table of the images).

    Where the image column holds paths, records have these and the table is None.
    """
    parts = [part.flatten_indices() if part._indices is not None else part for part in tables.values()]
    table = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    image_name, caption_names = image_and_caption_columns(table, image_column, caption_column, "the data set")
    split_of_row = [split for split, part in zip(tables, parts, strict=True) for _ in range(len(part))]
    if image_column_holds_paths(tables, image_column, caption_column):
        paths = table[image_name]
    else:
        names_apart = [name for name in ("image", "captions") if name in table.column_names]
        table = table.remove_columns([name for name in names_apart if name not in (image_name, *caption_names)])
        table = table.rename_column(image_name, "image") if image_name != "image" else table
        table = table.cast_column("image", datasets.Image(decode=False))
        sizes, names, _ = rec.table_images(table)
        paths = table["image"] if all(size is None for size in sizes) else None
    if paths is not None:
        rows = table.remove_columns([name for name in (image_name, "image") if name in table.column_names])
        paths = (image["path"] if isinstance(image, dict) else image for image in paths)
        named = (
            (row | {image_name: path}, f"{split} row {number}")
            for number, (row, path, split) in enumerate(zip(rows, paths, split_of_row, strict=True))
        )
        find = finder([image_dir])
        records = dict_rows(named, "the data set", image_name, caption_column, find, None)
        return with_splits(records, split_of_row), None

    wanted = [name for name in (*caption_names, "image_id", "split") if name in table.column_names]
    rows = table.select_columns(wanted)

    def records():
        for number, row in enumerate(rows):
            where = f"{split_of_row[number]} row {number}"
            own_split, image_id = row.get("split"), row.get("image_id")
            yield Record(
                where,
                number,
                captions_of(row, caption_names, where),
                name=names[number],
                image_id=None if image_id is None else str(image_id),
                split=split_of_row[number] if own_split is None else rec.split_name(own_split, where),
            )

    return records(), table.remove_columns(wanted)


def with_splits(records: Iterable[Record], splits: list[str]) -> Iterator[Record]:
    """Records of table rows, with the table's split for those without one of their own."""
    for record, split in zip(records, splits, strict=True):
        record.split = record.split or split
        yield record


# ---------------------------------------------------------------- streams


def stream_records(tables: dict, image_column, caption_column, seed: int, skip_bad_samples: bool, source: str):
    """Records of tables that are read as they are needed, with the columns that `load` gives.

    A source without splits gets 90/5/5 by a hash of the image's bytes (of its path, where there are none), so that
    equal images are in the same split wherever they lie. What a stream cannot see: rows of one image merge only where
    they are neighbours, so an image may come as several records (of one split); images that are in two official
    splits are not found; nor are duplicate ids, or images that cannot be read (these raise when they are reached).

    Returns:
        IterableDatasetDict; its shards are those of the source, so that workers and processes share them.
    """
    held_out = {"validation": (0.0, rec.HELD_OUT), "test": (rec.HELD_OUT, 2 * rec.HELD_OUT)}
    if set(tables) == {"train"}:
        plan = {"train": ("train", 2 * rec.HELD_OUT, 1.0)}
        plan |= {split: ("train", *bounds) for split, bounds in held_out.items()}
    elif set(tables) == {"train", "test"}:
        plan = {"train": ("train", rec.HELD_OUT, 1.0), "validation": ("train", *held_out["validation"])}
        plan["test"] = ("test", 0.0, 1.0)
    else:
        plan = {split: (split, 0.0, 1.0) for split in tables}
    streams = {}
    for split, (name, low, high) in plan.items():
        table = tables[name]
        image, captions = image_and_caption_columns(table, image_column, caption_column, source)
        if "split" in table.features:
            raise DataError(
                f"{source}: its rows name their own split, which a stream cannot follow. Leave out --streaming"
            )
        table = table.cast_column(image, datasets.Image(decode=False))
        extras = {
            name: feature
            for name, feature in table.features.items()
            if name not in (image, *captions, "image_id", "image", "captions", "split")
        }
        features = {
            "image_id": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
        }
        streams[split] = datasets.IterableDataset.from_generator(
            stream_split,
            features=datasets.Features(features | extras),
            gen_kwargs={
                "shards": [table.shard(table.num_shards, shard) for shard in range(table.num_shards)],
                "columns": (image, tuple(captions), tuple(extras)),
                "bounds": (low, high),
                "seed": seed,
                "skip_bad_samples": skip_bad_samples and split == "train",
            },
        )
    return datasets.IterableDatasetDict(streams)


def stream_split(shards: list, columns: tuple, bounds: tuple, seed: int, skip_bad_samples: bool) -> Iterator[dict]:
    """One split of one or more shards: neighbouring rows of the same image as one record."""
    image_name, caption_names, extra_names = columns
    for shard in shards:
        record = digest = None
        for number, row in enumerate(shard):
            image = row[image_name]
            content = image["bytes"] if image["bytes"] is not None else str(image["path"]).encode()
            known, digest = digest, xxhash.xxh3_128_hexdigest(content)
            place = xxhash.xxh3_64_intdigest(digest.encode(), seed=seed) / 2**64
            if not bounds[0] <= place < bounds[1]:
                continue
            name = os.path.basename(image["path"] or "") or digest
            image_id = str(row["image_id"]) if row.get("image_id") is not None else name
            captions = rec.clean_captions(
                captions_of(row, caption_names, f"row {number}"),
                f"row {number}",
                image_id,
                (lambda message: None) if skip_bad_samples else None,
            )
            if record is not None and digest == known:
                record["captions"] += captions
                continue
            if record is not None and record["captions"]:
                yield record
            record = {"image_id": image_id, "image": image, "captions": captions}
            record |= {extra: row[extra] for extra in extra_names}
        if record is not None and record["captions"]:
            yield record


def as_streams(dataset: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    return datasets.IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in dataset.items()})


# ---------------------------------------------------------------- choosing and telling


def choose(dataset, splits, max_samples, source: str):
    """The wanted splits, cut to their first `max_samples` records."""
    require_splits([*(splits or ()), *(max_samples or {})], list(dataset), source)
    chosen = {name: rows for name, rows in dataset.items() if splits is None or name in splits}
    for name, number in (max_samples or {}).items():
        if name in chosen:
            rows = chosen[name]
            if isinstance(rows, datasets.IterableDataset):
                chosen[name] = rows.take(number)
            else:
                chosen[name] = rows.select(range(min(number, len(rows))))
    return type(dataset)(chosen)


def require_splits(wanted: list[str], present: list[str], source: str) -> None:
    for split in wanted:
        if split not in present:
            raise DataError(f"{source}: there is no {split} split. Splits present: {', '.join(present)}")


def first_of_each_split(records: list[Record], max_samples: dict[str, int]) -> list[Record]:
    taken: Counter = Counter()
    kept = []
    for record in records:
        taken[record.split] += 1
        if taken[record.split] <= max_samples.get(record.split, taken[record.split]):
            kept.append(record)
    return kept


def counts(dataset: datasets.DatasetDict) -> str:
    images = {name: len(rows) for name, rows in dataset.items()}
    captions = {name: sum(map(len, rows["captions"][:])) for name, rows in dataset.items()}
    by_split = ", ".join(f"{name} {images[name]:,} / {captions[name]:,}" for name in dataset)
    return f"{sum(images.values()):,} images, {sum(captions.values()):,} captions ({by_split})"


def in_words(dropped: Counter) -> str:
    return "; dropped: " + ", ".join(f"{number:,} {what}" for what, number in dropped.items()) if dropped else ""

"""Caption images: files, folders, globs, lists, and every data set that train.py reads.

    python infer.py photo.jpg                           prints path<TAB>caption
    python infer.py photos/ --output captions.jsonl     a row per image, in order: image, caption, the source's columns
    python infer.py shards/*.tar --output out.parquet   what is written is said by the name: see docs/data.md
    python infer.py photos/ --output_format txt         a .txt beside each image
    python infer.py s3://bucket/photos --output s3://bucket/captions.csv
    torchrun --nproc_per_node 2 infer.py photos/ --output captions.jsonl

With --output a stopped run resumes where it was when the same command is given again, each image once and none lost,
in any number of processes.
"""

from arguments import INFER_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(INFER_GROUPS, positional="paths")  # answers --help and mistakes before torch is imported

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch

import data
from captioner import Captioner
from common.errors import UserError
from common.files import write_json
from common.processes import processes, show_progress
from common.resumable import check_settings, open_part, parts, settings_file, whole_lines, write_row
from data import writers
from data.cache import cache_folder
from data.formats import webdataset
from data.image_rows import image_rows, left_out, source_files
from data.remote import file_system, is_remote, local_copy, upload
from data.rows import Options

logger = logging.getLogger("infer")


def main():
    model_args, generation_args, args, paths = parse(INFER_GROUPS, positional="paths")
    form = writers.form_of(args.output, args.output_format) if args.output or args.output_format else None
    state = processes(patience=timedelta(days=7))  # who is done waits for the others
    if form is None and state.num_processes > 1:
        raise UserError("Several processes need --output, a file to bring their captions together in.")
    rows = functools.partial(read_rows, paths, args)
    next(rows(), None)  # what is wrong with the paths is said before the model is loaded
    captioner = Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        **vars(generation_args),
    )
    if form is None:
        for row in caption(captioner, rows, args):
            print(f"{row['image']}\t{row.get('caption', 'error: ' + row.get('error', ''))}", flush=True)
    elif form == "txt":
        write_texts(captioner, rows, args, state)
    else:
        settings = {"model": model_args.model_name_or_path, "revision": model_args.model_revision}
        write_output(captioner, rows, args, form, settings | captioner.description(), paths, state)
    if state.is_main_process:
        say_left_out(paths)


def read_rows(paths: list[str], args):
    """The images to caption: see data.image_rows."""
    options = Options(
        image_dir=args.image_dir,
        image_column=args.image_column,
        config=args.dataset_config_name,
        format=args.data_format,
    )
    return image_rows(paths, options)


def say_left_out(paths: list[str]) -> None:
    """Count, by ending, the files of folders that are no images."""
    counted = Counter()
    for folder in [path for path in paths if not is_remote(path) and os.path.isdir(path)]:
        counted += left_out(folder)
    if counted:
        what = ", ".join(f"{number} {ending}" for ending, number in counted.most_common())
        logger.warning("left out, as they are no images: %s", what)


class Share(torch.utils.data.IterableDataset):
    """This process's share of the rows that are left, in batches that its loader workers take in turn."""

    def __init__(self, rows, done: set[bytes], index: int, count: int, batch_size: int):
        self.rows, self.done, self.index, self.count, self.batch_size = rows, done, index, count, batch_size

    def __iter__(self):
        left = (row for row in self.rows() if key(row["name"]) not in self.done)
        share = itertools.islice(left, self.index, None, self.count)
        worker = torch.utils.data.get_worker_info()
        for number, row in enumerate(share):
            if worker is None or number // self.batch_size % worker.num_workers == worker.id:
                # The id carries the row from a worker's process to what is written of it.
                place = row["image"] if isinstance(row["image"], str) else None
                row_id = json.dumps([row["name"], row["columns"], row["relative"], place], default=str)
                yield {"image": row["image"], "image_id": row_id}


def caption(captioner, rows, args, done: set[bytes] = frozenset(), index: int = 0, count: int = 1):
    """{"image", the columns, "caption" or "error"} of each image in order; errors only if these are to be skipped."""
    stream = captioner.stream(
        Share(rows, done, index, count, args.per_device_eval_batch_size),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        skip_bad_images=args.skip_bad_images,
    )
    try:
        for row_id, captions in show_progress(stream, None):
            name, columns, relative, place = json.loads(row_id)
            failed = isinstance(captions, data.ImageError)
            taken = {"image": name, "relative": relative, "place": place} | {
                f"source_{column}" if column in ("image", "caption", "error", "relative", "place") else column: value
                for column, value in columns.items()
            }
            yield taken | ({"error": str(captions)} if failed else {"caption": captions[0]})
    except data.ImageError as error:
        # A loader's worker process hands its error over as a text that holds the whole traceback.
        reason = str(error).strip().splitlines()[-1].removeprefix("data.images.ImageError: ")
        raise data.ImageError(
            f"{reason}. With --skip_bad_images such images are written down with their error"
        ) from None


def write_texts(captioner, rows, args, state) -> None:
    """A .txt beside each image, or below --output. One that is there is left as it is, so a stopped run resumes."""
    folder = Path(args.output) if args.output else None
    if args.output and is_remote(args.output):
        raise UserError("--output_format txt writes beside local images or into a local folder.")
    written, there = 0, set()
    for row in rows():
        if folder is None and not (isinstance(row["image"], str) and os.path.isfile(row["image"])):
            raise UserError(f"{row['name']} lies inside a source: name a folder for the .txt files with --output.")
        if writers.text_of(row["image"], row["relative"], folder).exists():
            there.add(key(row["name"]))
    state.wait_for_everyone()
    for row in caption(captioner, rows, args, there, state.process_index, state.num_processes):
        if "caption" in row:
            target = writers.text_of(row["place"], row["relative"], folder)
            written += writers.write_text_beside(target, row["caption"])
        else:
            logger.warning("%s", row["error"])
    logger.info("%d .txt files written; %d images had one, which is left as it is", written, len(there))


def write_output(captioner, rows, args, form: str, settings: dict, paths: list[str], state) -> None:
    """Caption what is left into part files, a line as soon as it is known, and bring them together at the end."""
    output = local_output(args.output)
    with state.main_process_first():
        prepare_output(output, settings, form, args.output, state)
    done = {key(json.loads(line)["image"]) for part in parts(output) for line in whole_lines(part)}
    if output.exists():
        done |= {key(row["image"]) for row in writers.read_back(output, form)}
    if isinstance(next(rows())["image"], str):  # files: they are counted without being read
        names = [row["name"] for row in rows()]
        before = sum(key(name) in done for name in names) if done else 0
        logger.info("%d images, %d of them captioned before", len(names), before)
    else:
        logger.info("%d images captioned before", len(done))
    state.wait_for_everyone()  # all have read what was done before anyone adds to it
    with open_part(output, state.process_index) as file:
        for row in caption(captioner, rows, args, done, state.process_index, state.num_processes):
            row.pop("relative"), row.pop("place")
            write_row(file, row)
    state.wait_for_everyone()
    if state.is_main_process:
        bring_together(output, rows, form, args, paths)


def local_output(output: str) -> Path:
    """Where the output is made: itself, or for an address a place in the cache, from which it is put there."""
    if not is_remote(output):
        return Path(output.rstrip("/\\"))
    file_system(output)  # a missing package is said before anything is captioned
    folder = cache_folder() / "outputs" / hashlib.sha256(output.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / output.rstrip("/").rsplit("/", 1)[-1]


def prepare_output(output: Path, settings: dict, form: str, name: str, state) -> None:
    """Refuses to add to captions of another model or other settings, which stand in OUTPUT.settings.json."""
    if (output.is_dir() and not writers.is_folder(name, form)) or not output.parent.is_dir():
        raise UserError(f"--output {name}: name a file in a folder that exists.")
    if is_remote(name) and not output.exists() and state.is_main_process:
        system, path = file_system(name)
        if system.exists(path):
            shutil.copy(local_copy(name), output) if system.isfile(path) else shutil.copytree(local_copy(name), output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        next(writers.read_back(output, form), None)  # refuses what nothing can be added to
    if output.exists() or parts(output):
        check_settings(output, settings)
    if state.is_main_process:
        write_json(settings_file(output), settings)


def key(path: str) -> bytes:
    """A short stand-in for a path, so that a million of them fit in little memory."""
    return hashlib.blake2b(os.fsencode(path), digest_size=12).digest()


def bring_together(output: Path, rows, form: str, args, paths: list[str]) -> None:
    """One output of all parts, in the order of the source, then of what earlier runs captioned besides."""
    with contextlib.ExitStack() as stack:
        if output.exists() and (output.is_file() or any(output.iterdir())):
            before = output.with_name(f"{output.name}.part-before")
            with open(before, "w", encoding="utf-8") as file:
                for row in writers.read_back(output, form):
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        files = [stack.enter_context(open(path, "rb")) for path in parts(output)]
        places: dict[bytes, tuple[int, int]] = {}
        for number, file in enumerate(files):
            position = 0
            for line in file:
                if line.endswith(b"\n"):  # a kill cuts the last one in two
                    places[key(json.loads(line)["image"])] = (number, position)
                position += len(line)
        order = [name for row in rows() if (name := key(row["name"])) in places]
        wanted = set(order)
        order += [name for name in places if name not in wanted]

        def merged():
            for name in order:
                number, position = places[name]
                files[number].seek(position)
                yield json.loads(files[number].readline())

        temporary = output.with_name(f"{output.name}.new")
        if temporary.is_dir():
            shutil.rmtree(temporary)
        write = writer(form, output, args, paths)
        write(merged, temporary, rows)
    if output.is_dir():
        shutil.rmtree(output)
    temporary.replace(output)
    for part in parts(output):
        part.unlink()
    if is_remote(args.output):
        upload(output, args.output)
    logger.info("%d captions in %s", len(places), args.output)


def writer(form: str, output: Path, args, paths: list[str]):
    """The function of data.writers for a form of output."""
    if form == "metadata":
        return functools.partial(writers.write_metadata, folder=output.parent, kind=output.suffix)
    folder = writers.is_folder(args.output, form)
    if form == "tar" and folder:
        return functools.partial(writers.write_tars, tars=source_files(paths, webdataset.TARS))
    if form == "parquet" and folder:
        return writers.write_parquet_folder
    forms = {"jsonl": writers.write_jsonl, "csv": writers.write_csv, "parquet": writers.write_parquet}
    return (forms | {"coco": writers.write_coco, "tar": writers.write_tar})[form]


if __name__ == "__main__":
    run(main)

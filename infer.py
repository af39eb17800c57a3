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

import functools
import itertools
import json
import logging
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch

import data
from captioner import Captioner
from common.errors import UserError
from common.processes import processes, show_progress
from common.resumable import open_part, write_row
from data import writers
from data.caption_output import bring_together, captioned_before, key, local_output, prepare_output
from data.image_rows import image_rows, left_out
from data.remote import is_remote
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
        prepare_output(output, args.output, form, settings, state)
    done = captioned_before(output, form)
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
        bring_together(output, args.output, form, rows, paths)


if __name__ == "__main__":
    run(main)

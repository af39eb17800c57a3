"""Caption images: files, folders, globs, lists, and every dataset that train.py reads.

    python infer.py photo.jpg                           prints path<TAB>caption
    python infer.py photos/ --output captions.jsonl     a row per image, in order: image, caption, the source's columns
    python infer.py shards/*.tar --output out.parquet   the format follows from the name: see docs/data.md
    python infer.py photos/ --output_format txt         a .txt next to each image
    python infer.py s3://bucket/photos --output s3://bucket/captions.csv
    torchrun --nproc_per_node 2 infer.py photos/ --output captions.jsonl
    python infer.py --status captions.jsonl             the progress of a run that writes there, here or elsewhere

With --output, images are processed in shards, each written whole or not at all: the same command resumes a stopped run
with the shards that are left, in any number of processes, and the output has each image exactly once. For a million
images and clusters, see docs/scale.md.
"""

from arguments import INFER_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(INFER_GROUPS, positional="paths")  # answers --help and mistakes before torch is imported

import functools
import itertools
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

from captioner import Captioner
from captioning import output as caption_output
from captioning import writers
from captioning.rows import ImageRows, caption
from captioning.shards import ImageSource
from captioning.sources import image_rows, left_out
from common.errors import UserError
from common.processes import default_workers, own_share, show_progress
from common.remote import is_remote
from data.rows import Options
from jobs import progress, queue
from jobs.shards import reachable

logger = logging.getLogger("infer")


def main():
    model_args, generation_args, args, paths = parse(INFER_GROUPS, positional="paths")
    form = writers.form_of(args.output, args.output_format) if args.output or args.output_format else None
    share = own_share()
    if form is None and share[1] > 1:
        raise UserError("Several processes need --output, a file that collects their captions.")
    if form in (None, "txt") and args.engine == "ray":
        raise UserError("--engine ray needs an --output other than .txt files: a local path or an address.")
    load = functools.partial(load_captioner, model_args, generation_args, args)
    failed = []
    if form in (None, "txt"):
        rows = functools.partial(image_rows, paths, options(args))
        next(rows(), None)  # reports bad paths before the model is loaded
        print_captions(load(), rows, args) if form is None else write_texts(load(), rows, args, share)
    else:
        failed = write_output(load, args, form, paths, share)
    if share[0] == 0:
        say_left_out(paths)
    if failed:
        sys.exit(1)


def load_captioner(model_args, generation_args, args) -> tuple[Captioner, dict]:
    """The captioner, and the settings that must stay the same during a run."""
    model_args.complete()  # applies --device, also in a worker process
    captioner = Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        **vars(generation_args),
    )
    named = {"model": model_args.model_name_or_path, "revision": model_args.model_revision}
    return captioner, named | captioner.description()


def options(args) -> Options:
    """Options for reading the sources."""
    return Options(
        image_dir=args.image_dir,
        image_column=args.image_column,
        config=args.dataset_config_name,
        format=args.data_format,
    )


def say_left_out(paths: list[str]) -> None:
    """Report how many files in the folders are not images, by extension."""
    counted = Counter()
    for folder in [path for path in paths if not is_remote(path) and os.path.isdir(path)]:
        counted += left_out(folder)
    if counted:
        what = ", ".join(f"{number} {ending}" for ending, number in counted.most_common())
        logger.warning("left out, as they are not images: %s", what)


def print_captions(loaded, rows, args) -> None:
    for row in show_progress(caption(loaded[0], ImageRows(rows, args.per_device_eval_batch_size), args), None):
        print(f"{row['image']}\t{row.get('caption', 'error: ' + row.get('error', ''))}", flush=True)


def write_texts(loaded, rows, args, share: tuple[int, int]) -> None:
    """Write a .txt next to each image, or below --output. Existing ones are kept, so a stopped run resumes."""
    folder = Path(args.output) if args.output else None
    if args.output and is_remote(args.output):
        raise UserError("--output_format txt writes next to local images or into a local folder.")
    written, there = 0, Counter()

    def left():
        for row in itertools.islice(rows(), share[0], None, share[1]):
            if folder is None and not (isinstance(row["image"], str) and os.path.isfile(row["image"])):
                raise UserError(f"{row['name']} is inside a source: name a folder for the .txt files with --output.")
            if writers.text_of(row["image"], row["relative"], folder).exists():
                there["before"] += 1
            else:
                yield row

    for row in show_progress(caption(loaded[0], ImageRows(left, args.per_device_eval_batch_size), args), None):
        if "caption" in row:
            target = writers.text_of(row["place"], row["relative"], folder)
            written += writers.write_text_beside(target, row["caption"])
        else:
            logger.warning("%s", row["error"])
    logger.info("%d .txt files written; existing ones are left as they are", written)


def write_output(load, args, form: str, paths: list[str], share: tuple[int, int]) -> list[str]:
    """Caption the remaining shards, then build the output from all shards. Returns those that failed."""
    folder = caption_output.shard_folder(args.output, form)
    folder.check()
    source = ImageSource(paths, options(args))
    size = args.shard_size or folder.size(1000, queue.sharing(args, share), source.first)
    shards = source.shards(size)
    work = CaptionShards(load, args, source, folder, caption_output.stale_files(folder, shards))
    begin = functools.partial(progress.begin, folder, shards, size, "images", share)
    there = functools.partial(reachable, folder.name)
    queue.run(work, begin, there, args, len(shards))
    queue.Patient(functools.partial(caption_output.finish, folder, shards, form, source, paths), there)()
    return queue.Patient(functools.partial(progress.failures, folder, shards), there)()


class CaptionShards:
    """Captions a shard and writes its file. Each worker has one of these."""

    def __init__(self, load, args, source: ImageSource, folder, stale: list[str]):
        self.load, self.args, self.source, self.folder = load, args, source, folder
        self.earlier = caption_output.Earlier(folder, stale)

    def start(self) -> dict:
        """Load the model; returns the settings that must stay the same during a run."""
        self.captioner, self.settings = self.load()
        if self.args.dataloader_num_workers is None:
            self.args.dataloader_num_workers = default_workers()
        return self.settings

    def __call__(self, shard, tick) -> dict:
        started, known, captioned = time.time(), {}, []
        rows = functools.partial(self.source.rows, shard)
        if shard.kind == "rows" and (self.earlier.stale or self.args.dataloader_num_workers):
            listed = list(rows())  # else each DataLoader worker would read the source up to here
            known = self.earlier.rows([row["key"] for row in listed])
            rows = lambda: (row for row in listed if row["key"] not in known)  # noqa: E731
        for row in caption(self.captioner, ImageRows(rows, self.args.per_device_eval_batch_size), self.args):
            row.pop("relative"), row.pop("place")
            captioned.append(row)
            tick(len(captioned))
        if known:
            found = known | {row["key"]: row for row in captioned}
            captioned = [found[row["key"]] for row in listed]
        return caption_output.write_shard(self.folder, shard, captioned, time.time() - started, self.settings)


if __name__ == "__main__":
    run(main)

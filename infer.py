# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "openai==3.52.0",
#     "peft==0.21.2",
#     "pillow==12.3.0",
#     "psutil==7.2.2",
#     "requests==2.34.2",
#     "torch==2.13.0",
#     "transformers==5.24.0",
# ]
# ///
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
from collections import Counter
from pathlib import Path

from captioner import Captioner
from captioning import output as caption_output
from captioning import server, writers
from captioning.again import Again
from captioning.rows import ImageRows, caption, in_order
from captioning.shards import ImageSource
from captioning.sources import image_rows, left_out
from captioning.work import CaptionShards
from common.errors import UserError
from common.processes import own_share, show_progress
from common.remote import is_remote
from data.rows import Options
from jobs import queue
from jobs.run import Run
from models.loading import asks

logger = logging.getLogger("infer")


def main():
    model_args, generation_args, args, server_args, paths = parse(INFER_GROUPS, positional="paths")
    server.check_flags(model_args, generation_args, server_args, args)
    form = writers.form_of(args.output, args.output_format) if args.output or args.output_format else None
    share = own_share()
    if form is None and share[1] > 1:
        raise UserError("Several processes need --output, a file that collects their captions.")
    if args.only and (form in (None, "txt") or share[1] > 1):
        raise UserError("--only asks for the --output of a finished run, other than .txt files, and for one process.")
    if form in (None, "txt") and args.engine == "ray":
        raise UserError("--engine ray needs an --output other than .txt files: a local path or an address.")
    load = functools.partial(load_captioner, model_args, generation_args, args, server_args)
    failed, asking = [], asked(model_args, generation_args)
    if args.dry_run:
        rows = functools.partial(image_rows, paths, options(args, asking))
        print(server.estimate(load()[0], ImageRows(rows, 1)))
        return
    if form in (None, "txt"):
        rows = functools.partial(image_rows, paths, options(args, asking))
        if form is None:
            next(rows(), None)  # reports bad paths before the model is loaded
            print_captions(load(), rows, args)
        else:
            texts = plan_texts(rows, args)
            write_texts(load(), rows, texts, args, share)
    else:
        failed = write_output(load, args, form, paths, share, server_args.prices, asking)
    if share[0] == 0:
        say_left_out(paths)
    if failed:
        sys.exit(1)


def load_captioner(model_args, generation_args, args, server_args) -> tuple[Captioner | server.ServerCaptioner, dict]:
    """The captioner, and the settings that must stay the same during a run."""
    if server.is_served(model_args.model_name_or_path):
        captioner = server.connect(model_args, generation_args, server_args, args.seed)
        named = {"model": model_args.model_name_or_path, "server": captioner.address}
        return captioner, named | captioner.description() | written_with(args)
    model_args.complete()  # applies --device, also in a worker process
    captioner = Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        own_questions=asked(model_args, generation_args)["own_questions"],
        seed=args.seed,
        **generation_args.settings(),
    )
    named = {"model": model_args.model_name_or_path, "revision": model_args.model_revision}
    named |= {name: value for name in ("max_pixels", "min_pixels") if (value := getattr(model_args, name))}
    return captioner, named | captioner.description() | written_with(args)


def written_with(args) -> dict:
    """What is added to captions, and removed."""
    return {name: value for name in ("strip", "prefix", "suffix") if (value := getattr(args, name))}


def asked(model_args, generation_args) -> dict:
    """What the images' own prompts are made of."""
    return asks(model_args.model_name_or_path, model_args.model_revision, generation_args.settings()["prompt"])


def options(args, asked: dict | None = None) -> Options:
    """Options for reading the sources."""
    return Options(
        **asked or {},
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
        endings = ", ".join(f"{number} {ending}" for ending, number in counted.most_common())
        logger.warning("left out, as they are not images: %s", endings)


def print_captions(loaded, rows, args) -> None:
    captions = in_order(caption(loaded[0], ImageRows(rows, args.per_device_eval_batch_size), args))
    for row, outcome in captions if sys.stdout.isatty() else show_progress(captions, None):
        for _, text in writers.texts_of(outcome) or [("", f"error: {outcome.get('error')}")]:
            print(f"{row['name']}\t{text}", flush=True)
    loaded[0].say_cut()


def plan_texts(rows, args) -> writers.Texts:
    """Where the .txt files go: next to the images, or below --output."""
    if args.output and is_remote(args.output):
        raise UserError("--output_format txt writes next to local images or into a local folder.")
    texts = writers.Texts(rows(), Path(args.output) if args.output else None)
    if texts.shared:
        logger.warning("some images share their name up to its ending: their texts are called x.jpg.txt and x.png.txt")
    return texts


def write_texts(loaded, rows, texts: writers.Texts, args, share: tuple[int, int]) -> None:
    """Write a .txt for each image. Existing ones are kept, so a stopped run resumes."""
    written = 0

    def mine():
        for row in itertools.islice(rows(), share[0], None, share[1]):
            yield row | {"target": str(texts.of(row))}

    number = loaded[1].get("num_return_sequences", 1)
    last = f".{number}.txt" if number > 1 else ".txt"
    left = lambda row: not os.path.exists(row["target"].removesuffix(".txt") + last)  # noqa: E731
    captions = caption(loaded[0], ImageRows(mine, args.per_device_eval_batch_size, left), args)
    for row, outcome in show_progress(captions, None):
        for end, text in writers.texts_of(outcome):
            written += writers.write_text_beside(Path(row["target"].removesuffix(".txt") + end), text)
        if "error" in outcome:
            logger.warning("%s", outcome["error"])
    logger.info("%d .txt files written; existing ones are left as they are", written)
    loaded[0].say_cut()


def write_output(
    load, args, form: str, paths: list[str], share: tuple[int, int], prices=(None, None), asked: dict | None = None
) -> list[str]:
    """Caption the remaining shards, then build the output from all shards. Returns those that failed."""
    folder = caption_output.shard_folder(args.output, form)
    folder.check()
    source = ImageSource(paths, options(args, asked))
    caption_output.check_names(args.output, form, source)
    size = args.shard_size or folder.size(1000, queue.sharing(args, share), source.stream())
    shards = source.shards(size)
    earlier = caption_output.Earlier(folder, shards)
    again = Again(args.only, folder, shards) if args.only else None
    run_of_all = again or Run(folder, shards, size, "images", share, lambda left: earlier.count(source, left))
    return run_of_all.complete(
        CaptionShards(load, args, source, folder, earlier, again),
        lambda: caption_output.finish(folder, shards, form, source, paths, prices),
        args,
    )


if __name__ == "__main__":
    run(main)

"""Caption images: files, folders, globs, or lists of them.

    python infer.py photo.jpg                          prints path<TAB>caption
    python infer.py photos/ --output captions.jsonl    writes {"image": ..., "caption": ...} a line, in order
    torchrun --nproc_per_node 2 infer.py photos/ --output captions.jsonl

With --output the same command resumes a run that was stopped, each image once and none lost,
in any number of processes.
"""

from arguments import INFER_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(INFER_GROUPS, positional="paths")  # answers --help and mistakes before torch is imported

import contextlib
import glob
import hashlib
import json
import logging
import os
from datetime import timedelta
from pathlib import Path

import data
from captioner import Captioner
from common.errors import UserError
from common.files import write_json
from common.processes import processes, show_progress
from common.resumable import check_settings, open_part, parts, settings_file, whole_lines, write_row

logger = logging.getLogger("infer")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm"}


def main():
    model_args, generation_args, args, paths = parse(INFER_GROUPS, positional="paths")
    state = processes(patience=timedelta(days=7))  # who is done waits for the others
    images = find_images(paths)
    captioner = Captioner.from_pretrained(
        model_args.model_name_or_path,
        bf16=args.bf16,
        fast_jpeg=model_args.fast_jpeg,
        loading=model_args.loading(),
        **vars(generation_args),
    )
    if not args.output:
        if state.num_processes > 1:
            raise UserError("Several processes need --output, a file to bring their captions together in.")
        for path, captions in caption(captioner, images, args):
            print(
                f"{path}\t{f'error: {captions}' if isinstance(captions, data.ImageError) else captions[0]}", flush=True
            )
        return

    output = Path(args.output)
    settings = {"model": model_args.model_name_or_path, "revision": model_args.model_revision} | captioner.description()
    with state.main_process_first():
        prepare_output(output, settings, state)
    done = {key(json.loads(line)["image"]) for part in written(output) for line in whole_lines(part)}
    left = [path for path in images if key(path) not in done]
    logger.info("%d images, %d of them captioned before", len(images), len(images) - len(left))
    state.wait_for_everyone()  # all have read what was done before anyone adds to it
    with open_part(output, state.process_index) as file:
        for path, captions in caption(captioner, left[state.process_index :: state.num_processes], args):
            failed = isinstance(captions, data.ImageError)
            row = {"image": path, "error": str(captions)} if failed else {"image": path, "caption": captions[0]}
            write_row(file, row)
    state.wait_for_everyone()
    if state.is_main_process:
        bring_together(output, images)


def caption(captioner, images: list[str], args):
    """(path, [caption]) of each image in order; (path, ImageError) of an unreadable one if these are to be skipped."""
    samples = [{"image": path, "image_id": path} for path in images]
    stream = captioner.stream(
        samples,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        skip_bad_images=args.skip_bad_images,
    )
    return show_progress(stream, len(samples))


def find_images(paths: list[str]) -> list[str]:
    """The images that files, folders (searched through), globs and lists (.txt, .jsonl) name, each once, in order."""
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            inside = (
                os.path.join(folder, name) for folder, _, names in sorted(os.walk(path)) for name in sorted(names)
            )
            images = [file for file in inside if os.path.splitext(file)[1].lower() in EXTENSIONS]
            if not images:
                raise UserError(f"{path}: there is no image in this folder ({' '.join(sorted(EXTENSIONS))}).")
        elif path.endswith((".txt", ".jsonl")) and os.path.isfile(path):
            images = read_list(path)
        elif os.path.exists(path):
            images = [path]
        else:
            images = sorted(glob.glob(path, recursive=True))
            if not images:
                raise UserError(f"{path}: there is no such file or folder, and no file that fits it as a pattern.")
        found.update(dict.fromkeys(images))
    return list(found)


def read_list(path: str) -> list[str]:
    """Images named in a list, a line each: a path, or in .jsonl an object with "image". Relative to the list."""
    folder, images = os.path.dirname(path), []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line := line.strip():
            try:
                name = json.loads(line)["image"] if path.endswith(".jsonl") else line
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}, line {number}: expected an object with "image", got {line[:80]}') from None
            images.append(name if os.path.exists(name) else os.path.join(folder, name))
    if not images:
        raise UserError(f"{path}: the list is empty.")
    return images


def prepare_output(output: Path, settings: dict, state) -> None:
    """Refuses to add to captions of another model or other settings, which stand in OUTPUT.settings.json."""
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: name a file in a folder that exists.")
    if written(output):
        check_settings(output, settings)
    if state.is_main_process:
        write_json(settings_file(output), settings)


def written(output: Path) -> list[Path]:
    """The finished file, if it is there, and those that processes were still writing."""
    return [path for path in (output, *parts(output)) if path.exists()]


def key(path: str) -> bytes:
    """A short stand-in for a path, so that a million of them fit in little memory."""
    return hashlib.blake2b(os.fsencode(path), digest_size=12).digest()


def bring_together(output: Path, images: list[str]) -> None:
    """One file of all parts, in the order of `images`, then of what earlier runs captioned besides."""
    places: dict[bytes, tuple[int, int]] = {}
    temporary = output.with_name(output.name + ".new")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in written(output)]
        for number, file in enumerate(files):
            position = 0
            for line in file:
                if line.endswith(b"\n"):  # a kill cuts the last one in two
                    places[key(json.loads(line)["image"])] = (number, position)
                position += len(line)
        merged = stack.enter_context(open(temporary, "wb"))
        wanted = dict.fromkeys(map(key, images))
        for name in (*wanted, *(name for name in places if name not in wanted)):
            number, position = places[name]
            files[number].seek(position)
            merged.write(files[number].readline())
    temporary.replace(output)
    for part in parts(output):
        part.unlink()
    logger.info("%d captions in %s", len(places), output)


if __name__ == "__main__":
    run(main)

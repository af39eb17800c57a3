"""The output of infer.py: part files while it runs, then one output of them in the form that its name says.

In what follows `output` is the local path where it is made, `name` what --output says (a path or an address), `form` a
key of data.writers.FORMATS, and `rows()` what data.image_rows gives of the source, as often as it is called.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from common.caches import cache_folder
from common.errors import UserError
from common.files import write_json
from common.resumable import check_settings, parts, settings_file, whole_lines
from data import writers
from data.formats import webdataset
from data.image_rows import source_files
from data.remote import file_system, is_remote, local_copy, upload

logger = logging.getLogger(__name__)


def local_output(name: str) -> Path:
    """Where the output is made: itself, or for an address a place in the cache, from which it is put there."""
    if not is_remote(name):
        return Path(name.rstrip("/\\"))
    file_system(name)  # a missing package is said before anything is captioned
    folder = cache_folder() / "outputs" / hashlib.sha256(name.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name.rstrip("/").rsplit("/", 1)[-1]


def prepare_output(output: Path, name: str, form: str, settings: dict, state) -> None:
    """Refuses to add to captions of another model or other settings, of which OUTPUT.settings.json tells."""
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


def captioned_before(output: Path, form: str) -> set[bytes]:
    """Keys of the images whose rows are in part files or in a finished output."""
    done = {key(json.loads(line)["image"]) for part in parts(output) for line in whole_lines(part)}
    if output.exists():
        done |= {key(row["image"]) for row in writers.read_back(output, form)}
    return done


def key(path: str) -> bytes:
    """A short stand-in for a path, so that a million of them fit in little memory."""
    return hashlib.blake2b(os.fsencode(path), digest_size=12).digest()


def bring_together(output: Path, name: str, form: str, rows, paths: list[str]) -> None:
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
        order = [row_key for row in rows() if (row_key := key(row["name"])) in places]
        wanted = set(order)
        order += [row_key for row_key in places if row_key not in wanted]

        def merged():
            for row_key in order:
                number, position = places[row_key]
                files[number].seek(position)
                yield json.loads(files[number].readline())

        temporary = output.with_name(f"{output.name}.new")
        if temporary.is_dir():
            shutil.rmtree(temporary)
        _writer(output, name, form, paths)(merged, temporary, rows)
    if output.is_dir():
        shutil.rmtree(output)
    temporary.replace(output)
    for part in parts(output):
        part.unlink()
    if is_remote(name):
        upload(output, name)
    logger.info("%d captions in %s", len(places), name)


def _writer(output: Path, name: str, form: str, paths: list[str]):
    """The function of data.writers for a form of output."""
    if form == "metadata":
        return functools.partial(writers.write_metadata, folder=output.parent, kind=output.suffix)
    folder = writers.is_folder(name, form)
    if form == "tar" and folder:
        return functools.partial(writers.write_tars, tars=source_files(paths, webdataset.TARS))
    if form == "parquet" and folder:
        return writers.write_parquet_folder
    forms = {"jsonl": writers.write_jsonl, "csv": writers.write_csv, "parquet": writers.write_parquet}
    return (forms | {"coco": writers.write_coco, "tar": writers.write_tar})[form]

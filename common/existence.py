"""Whether what flags name is there: asked of the file system alone, before anything is imported to read it."""

import glob
import os
import re

from common.errors import DataError, UserError
from common.flags import Flags

# Of images. Names of TGA files must say what they are: these have no magic bytes.
TGA_ENDINGS = (".tga", ".icb", ".vda", ".vst")
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k",
    ".jpf", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".heic", ".heif", *TGA_ENDINGS,
)  # fmt: skip
ENDING = "|".join(ending[1:] for ending in ENDINGS)  # in a regular expression
OF_FILES = re.compile(r"\.(csv|tsv|jsonl?|txt|parquet|arrow|tar|zip|jpe?g|png|webp)", re.IGNORECASE)


SERVER = "openai:"  # before the name of a model on a server


def check_files(group: Flags) -> None:
    """UserError if a flag names what is not there."""
    for name in (*group.FILES, *group.HUB):
        if path := getattr(group, name):
            if path.startswith(SERVER) and name in group.HUB:
                if not group.SERVED:
                    raise UserError(
                        f"--{name} {path}: models on a server caption in infer.py, evaluate.py and demo.py alone."
                    )
                if path == SERVER:
                    raise UserError(f"--{name} {path}: name the model, openai:MODEL.")
                continue
            check_exists(path, f"--{name} ", hub=name in group.HUB)


def check_exists(path: str, flag: str = "", hub: bool = False) -> None:
    """UserError if there is no such file or folder; with `hub`, nor may it be an id of the Hub."""
    if not exists(path, hub):
        raise UserError(f"{flag}{path}: no such file or folder")


def exists(path: str, hub: bool = False) -> bool:
    """True also for addresses, which are not asked, for a pattern that some file matches, and with `hub` for what may be an
    id of the Hub. DataError for web addresses."""
    refuse_web(path)
    path = os.path.expanduser(path)
    if "://" in path or os.path.exists(path) or (hub and may_be_on_hub(path)):
        return True
    return glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None


def refuse_web(name: str) -> None:
    """DataError if this is a web address: files that strangers name are not fetched."""
    if re.match(r"https?://", name, re.IGNORECASE):
        raise DataError(f"{name[:100]}: files are not fetched from web addresses. Download it and give its path")


def may_be_on_hub(name: str) -> bool:
    """Whether this may be an id of the Hub (owner/name, or an old one without an owner), or 'scenes'."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not OF_FILES.fullmatch(os.path.splitext(name)[1])

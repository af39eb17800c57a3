"""Sources and outputs at an address: s3://, gs://, hf:// and every other file system that fsspec knows, memory:// too."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import fsspec

from common.caches import cache_folder
from common.errors import DataError, Unreachable
from common.existence import refuse_web
from common.files import whole

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_remote(name) -> bool:
    return isinstance(name, str) and ADDRESS.match(name) is not None


def file_system(name: str):
    """(fsspec file system, path there).

    Raises:
        DataError: a web address, whose files are not fetched, or a file system whose package is missing.
    """
    refuse_web(name)
    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", an unknown protocol
        raise DataError(f"{name}: {error}") from None


def open_binary(place):
    """The file at a path or an address, opened to be read."""
    if not is_remote(place):
        return open(place, "rb")
    system, path = file_system(place)
    return system.open(path, "rb")


def list_remote(name: str) -> list[str]:
    """The addresses of a file, of all files below a folder, or of those that match a pattern, sorted."""
    system, path = file_system(name)
    try:
        with reaching(name, FileNotFoundError):
            if system.isfile(path) and not glob.has_magic(name):
                return [name]
            files = list(filter(system.isfile, system.glob(path))) if glob.has_magic(name) else system.find(path)
    except FileNotFoundError:
        files = []
    if not files:
        raise DataError(f"{name}: there is no such file or folder, and no file that matches it as a pattern.")
    return sorted(map(system.unstrip_protocol, files))


def tag_of(info: dict) -> str:
    """What changes when a file does that fsspec lists so."""
    marks = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "created")
    return f"{info.get('size')}-{next((info[mark] for mark in marks if info.get(mark)), '')}"


def local_copy(name: str, cache_dir=None) -> Path:
    """A copy of a file, a folder or the files of a pattern in the cache: fetched once, and again where its size or its
    version has changed. A file appears under its name only when complete."""
    system, path = file_system(name)
    root = re.split(r"[^/]*[*?\[]", path)[0].rstrip("/")
    folder = cache_folder(cache_dir) / "remote" / hashlib.sha256(name.encode()).hexdigest()[:16]
    addresses = list_remote(name)
    for address in addresses:
        inner = file_system(address)[1]
        target = folder / (inner[len(root) :].lstrip("/") or Path(inner).name)
        if not target.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{address}: this name leads out of the folder it would be copied to. Rename it")
        version = hashlib.sha256(tag_of(system.info(inner)).encode()).hexdigest()[:16]
        mark = target.with_name(f".{target.name}.{version}")
        if not (target.exists() and mark.exists()):
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in target.parent.glob(f".{glob.escape(target.name)}.*"):
                old.unlink()
            with reaching(address), whole(target) as part:
                system.get_file(inner, str(part))
            mark.touch()
    return folder / Path(path).name if addresses == [name] else folder / path[len(root) :].lstrip("/")


def upload(source: Path, name: str) -> None:
    """Put a local file, or a folder's files, at an address."""
    system, path = file_system(name)
    with reaching(name):
        if source.is_dir():
            system.put(f"{source}/", path, recursive=True)
        else:
            system.put_file(str(source), path)


@contextlib.contextmanager
def whole_at(place: str):
    """A local path to write a file or a folder to. It appears at `place`, a path or an address, when the block ends
    without an error: whole or not at all, but for a folder at an address."""
    folder, name = (None, "") if is_remote(place) else os.path.split(os.path.abspath(place))
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name[:100]}.") as temporary:
        target = Path(temporary, "output")
        yield target
        if is_remote(place):
            upload(target, place)
        elif target.is_dir():
            shutil.rmtree(place, ignore_errors=True)
            os.replace(target, place)
        else:
            with open(target, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(target, place)


@contextlib.contextmanager
def reaching(name: str, *passing: type[Exception]):
    """Turn server errors of an address into a DataError of one line, an Unreachable where it may work later. Errors of
    the types `passing`, DataErrors and errors of local paths stay what they are."""
    try:
        yield
    except (DataError, *passing):
        raise
    except Exception as error:
        if not is_remote(name):
            raise
        error_class = DataError if isinstance(error, FileNotFoundError | PermissionError) else Unreachable
        raise error_class(
            f"{name}: could not be reached, or was refused ({type(error).__name__}: {str(error)[:300]})"
        ) from None

"""Sources and outputs at an address: s3://, gs://, hf:// and every other file system that fsspec knows, memory:// too."""

import contextlib
import hashlib
import re
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


def open_remote(name: str, mode: str = "rb"):
    """The file, opened; server errors become a DataError of one line."""
    system, path = file_system(name)
    return system.open(path, mode)


def list_remote(name: str) -> list[str]:
    """The addresses of a file, of all files below a folder, or of those that match a pattern, sorted."""
    system, path = file_system(name)
    try:
        with reaching(name, FileNotFoundError):
            if any(sign in name for sign in "*?["):
                found = [file for file in system.glob(path) if system.isfile(file)]
            elif system.isfile(path):
                return [name]
            else:
                found = system.find(path)
    except FileNotFoundError:
        found = []
    if not found:
        raise DataError(f"{name}: there is no such file or folder, and no file that matches it as a pattern.")
    return sorted(system.unstrip_protocol(file) for file in found)


def local_copy(name: str, cache_dir=None) -> Path:
    """A copy of a file, a folder or the files of a pattern in the cache: fetched once, and again where its size or its
    version has changed. A file appears under its name only when complete."""
    system, path = file_system(name)
    pattern = any(sign in name for sign in "*?[")
    root = re.split(r"[^/]*[*?\[]", path)[0].rstrip("/") if pattern else path.rstrip("/")
    folder = cache_folder(cache_dir) / "remote" / hashlib.sha256(f"{name}".encode()).hexdigest()[:16]
    addresses = list_remote(name)
    for address in addresses:
        inner = file_system(address)[1]
        relative = inner[len(root) :].lstrip("/") or Path(inner).name
        target = folder / relative
        if not target.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{address}: this name leads out of the folder it would be copied to. Rename it")
        info = system.info(inner)
        version = hashlib.sha256(repr([info.get(k) for k in ("size", "ETag", "etag", "mtime", "created")]).encode())
        mark = target.with_name(f".{target.name}.{version.hexdigest()[:16]}")
        if target.exists() and mark.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{target.name}.*"):
            old.unlink()
        with reaching(address), whole(target) as part:
            system.get_file(inner, str(part))
        mark.touch()
    if pattern:
        return folder / name[len(name) - len(path) + len(root) :].lstrip("/") if root else folder / path
    return folder / Path(path).name if addresses == [name] else folder


def upload(source: Path, name: str) -> None:
    """Put a local file, or a folder's files, at an address."""
    system, path = file_system(name)
    with reaching(name):
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.is_file():
                    system.put_file(str(file), f"{path.rstrip('/')}/{file.relative_to(source).as_posix()}")
        else:
            system.put_file(str(source), path)


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
        kind = DataError if isinstance(error, FileNotFoundError | PermissionError) else Unreachable
        raise kind(
            f"{name}: could not be reached, or was refused ({type(error).__name__}: {str(error)[:300]})"
        ) from None

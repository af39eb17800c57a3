"""Images that strangers send, as files or in zips: nothing is unpacked before its turn, memory is bounded, and a bad
image is an error in its place."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from common.errors import UserError
from data.images import MAX_PIXELS, open_image

MEMBER_BYTES = 50_000_000  # of a file in a zip, unpacked
DIRECTORY_BYTES = 10_000_000  # of a zip's list of its files, some hundred thousand of them


def list_uploads(paths: list[str], limit: int) -> list[tuple[str, str, str | None]]:
    """(name, path, None) of each uploaded file and (name, path, member) of each file in a zip.

    ValueError if they are more than `limit`, or a zip cannot be read. Zips in zips are not looked into.
    """
    uploads = []
    for path in paths:
        if path.lower().endswith(".zip"):
            uploads += [(name, path, name) for name in _names(Path(path))]
        else:
            uploads.append((Path(path).name, path, None))
    if len(uploads) > limit:
        raise UserError(f"{len(uploads)} files are more than the {limit} that are captioned in one go.")
    return uploads


def read_uploads(uploads: list[tuple], chunk: int) -> Iterator[list[tuple[str, Image.Image | Exception]]]:
    """[(name, image or error), ...] of up to `chunk` uploads at a time, fewer of large images."""
    images, pixels = [], 0
    for name, path, member in uploads:
        image = read_upload(name, path, member)
        images.append((name, image))
        pixels += 0 if isinstance(image, Exception) else image.width * image.height
        if len(images) == chunk or pixels > MAX_PIXELS:
            yield images
            images, pixels = [], 0
    if images:
        yield images


def read_upload(name: str, path: str, member: str | None = None) -> Image.Image | Exception:
    """The image or the error, which names the file as its owner does."""
    try:
        if member is None:
            content = Path(path).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                content = file.read(MEMBER_BYTES + 1)
            if len(content) > MEMBER_BYTES:
                raise UserError(f"{name}: larger than {MEMBER_BYTES // 1_000_000} MB unpacked")
        return open_image({"path": name, "bytes": content})
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        return error  # RuntimeError: encrypted, or packed in a way that zipfile does not know


def _names(path: Path) -> list[str]:
    """The files in a zip, without folders and what macOS adds. The list is read whole, so its size is checked first."""
    try:
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 65_557), os.SEEK_END)
            tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0:
            raise UserError("its list of files is missing")
        if b"PK\6\7" in tail or int.from_bytes(tail[end + 12 : end + 16], "little") > DIRECTORY_BYTES:
            raise UserError("it lists too many files")
        with zipfile.ZipFile(path) as archive:
            return [i.filename for i in archive.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX/")]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(f"{path.name}: not a zip that can be read ({error}).") from None

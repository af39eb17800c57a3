"""One image value to one correct RGB picture: the only place in the repo that opens images."""

import io
import logging
import math
import os
import re
import warnings

import numpy as np
from PIL import Image, PngImagePlugin

from common.errors import UserError
from common.existence import ENDINGS, TGA_ENDINGS
from common.logs import say_once
from common.remote import open_binary

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

logger = logging.getLogger(__name__)

Image.init()
if pillow_heif is not None:
    pillow_heif.register_heif_opener()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` makes it an error
# Of a PNG's notes, which workflows of image generators fill, Pillow refuses more than a megabyte unpacked.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 100_000_000
# An explicit list: Pillow would otherwise also open EPS (which runs Ghostscript) and other formats nobody trains on.
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")
    if name in Image.OPEN
)
# TGA files have no magic bytes: their name must say what they are.
TOLD_BY_CONTENT = tuple(name for name in FORMATS if name != "TGA")
NOT_IMAGES = (".txt", ".text", ".caption", ".captions", ".cap", ".json", ".npz")  # what lies beside images
# How files begin: .mp4 and .mov, .mkv and .webm, .avi.
HEIC = re.compile(rb".{4}ftyp(heic|heix|hevc|mif1|msf1|heim|heis)", re.DOTALL)
VIDEO = re.compile(rb".{4}ftyp(?!avif)|\x1a\x45\xdf\xa3|.{8}AVI ", re.DOTALL)
MAX_PIXELS = 89_478_485  # Pillow's own warning limit: a quarter of a GiB as RGB

ORIENTATION = 0x0112  # the EXIF tag
UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image that cannot be read; the message names the file, the fault and what to do."""


def open_image(value, max_pixels: int | None = None, size: tuple[int, int] | None = None) -> Image.Image:
    """Open an image as RGB, the way a person sees it.

    The EXIF orientation is applied; transparency (RGBA, LA, PA, a palette's or a colour key's) is laid over white;
    CMYK (Adobe's inverted one too), YCbCr, LAB, palettes, grayscale and 1-bit images are converted; of an animation
    (GIF, WebP, APNG) the first frame is taken. Gray with more than 8 bits is scaled, not clipped: 16-bit by 257;
    32-bit integers and floats as `_wide_gray` says.

    Args:
        value: a path, the bytes of a file, a datasets value `{"path": ..., "bytes": ...}` (bytes win), or a PIL image.
        max_pixels: larger images are refused from their header, before any pixel is decoded; default: MAX_PIXELS, and no
            limit for a PIL image that is decoded already. Pillow itself refuses above 178,956,970, whatever is given here.
        size: (height, width) in pixels, after orientation, that are enough. If given, a JPEG is decoded at 1/2, 1/4 or
            1/8 scale (libjpeg's DCT scaling) where both sides stay at least that long. Off by default, as pixels
            then differ a little: over the 800 test photos, resized (bicubic) to half their size, by 3.3 of 255 on
            average (9.2 in the worst photo) if `size` is that half; resized to a quarter, by 1.6 (5.3) if `size` is
            twice the quarter. So give twice what you resize to.

    Returns:
        A new PIL image of mode RGB, without metadata.

    Raises:
        ImageError: missing, empty, truncated, not an image, of an unsupported format, or too large.
    """
    name, source = "image bytes", value
    if isinstance(value, dict):
        name = str(value.get("path") or name)
        source = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(source, ImageError):  # a source says why there is none
        raise source
    if isinstance(source, Image.Image):
        if max_pixels is None and source.format is None:  # opened here before, with another limit, or drawn
            max_pixels = math.inf
        return _decode(source, getattr(source, "filename", "") or "PIL image", max_pixels, size=None)
    if isinstance(source, str | os.PathLike):
        name, source = str(source), _content(source)
    if not isinstance(source, bytes | bytearray | memoryview):
        raise ImageError(
            f"an image is given as {type(source).__name__}: give a path, bytes, a path/bytes dict or a PIL image"
        )
    return _decode(_open(source, name), name, max_pixels, size)


def _content(path: str | os.PathLike) -> bytes:
    try:
        with open_binary(path) as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image file. Check the path, or the folder given as image_dir") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, not an image file") from None
    except Exception as error:  # a null byte in the path, and fsspec's file systems, whose errors share no base class
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ImageError(f"{path}: cannot be read ({reason}). Check the file and its permissions") from None


def is_image_file(name: str, value) -> bool:
    """Whether a file is an image by the ending of its name, or else by its first bytes; `value` as `is_image` takes it."""
    ending = os.path.splitext(name)[1].lower()
    return ending in ENDINGS or (ending not in NOT_IMAGES and is_image(value))


def is_image(value) -> bool:
    """Whether a file (a path) or its bytes open as an image, from the first bytes: no pixel is decoded."""
    try:
        file = value if isinstance(value, str | os.PathLike) else io.BytesIO(value)
        with Image.open(file, formats=TOLD_BY_CONTENT):
            return True
    except Image.DecompressionBombError:
        return True  # an image that is too large is still one; `open_image` says what is wrong
    except Exception:  # also a dangling link, or no permission to read
        return False


def _open(content: bytes, name: str) -> Image.Image:
    if len(content) == 0:
        raise ImageError(f"{name}: the image file is empty (0 bytes). Fetch it again or remove it from the data")
    formats = FORMATS if name.lower().endswith(TGA_ENDINGS) or name == "image bytes" else TOLD_BY_CONTENT
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image is too large ({error}). Downscale it or remove it") from None
    except Exception:
        raise ImageError(f"{name}: {_not_an_image(content[:12])}") from None


def _not_an_image(first: bytes) -> str:
    if HEIC.match(first):
        return "a HEIC image, which pillow-heif opens: pip install pillow-heif, or convert it to JPEG"
    if VIDEO.match(first):
        return "a video: take images out of it, one file each (ffmpeg -i VIDEO -r 1 %04d.png)"
    return (
        "not an image, or one of an unsupported format. "
        f"Convert it to JPEG or PNG, or remove it (supported: {', '.join(FORMATS)})"
    )


def _decode(image: Image.Image, name: str, max_pixels: float | None, size) -> Image.Image:
    width, height = image.size
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: the image is too large ({width} x {height} pixels, more than {max_pixels:,}). "
            "Downscale it, or remove it from the data"
        )
    halved = ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I")
    try:
        if size is not None:
            turned = _orientation(image) >= 5
            image.draft(None, (size[0], size[1]) if turned else (size[1], size[0]))
        image.load()
        orientation = _orientation(image)  # after loading: Pillow rotates a TIFF itself on loading
        image = _to_rgb(image)
        if halved:
            _warn_of_dark(image, name)
        if orientation in UNDO_ORIENTATION:
            image = image.transpose(UNDO_ORIENTATION[orientation])
        image.info.clear()  # the orientation must not be applied again by whoever opens this picture next
        return image
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error and SyntaxError
        reason = "the image is truncated" if "truncated" in str(error) else "the image is damaged"
        raise ImageError(f"{name}: {reason} ({error}). Fetch it again or remove it from the data") from None


def _warn_of_dark(image: Image.Image, name: str) -> None:
    """Of 16 bits per channel Pillow keeps the upper 8: for 12-bit data that leaves 16 values, nearly black."""
    brightest = max(high for _, high in image.getextrema())
    if brightest <= 16:
        say_once(
            logger,
            f"{name}: 16 bits per channel, and the brightest pixel is {brightest} of 255, so it is seen as nearly black. "
            "Stretch such files (12-bit data, say) to the full range first. Warned once",
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data, intact pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new image."""
    if image.mode.startswith(("I", "F")):
        return _wide_gray(image).convert("RGB")
    if image.has_transparency_data:
        if image.mode in ("RGBa", "La"):  # premultiplied: La has no direct way to RGBA
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        laid = Image.new("RGB", image.size)
        for top in range(0, image.height, rows := _strip(image.width)):
            box = (0, top, image.width, min(top + rows, image.height))
            part = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", part.size, (255, 255, 255, 255))
            laid.paste(Image.alpha_composite(white, part).convert("RGB"), box)
        return laid
    return image.convert("RGB")


def _strip(width: int) -> int:
    """Rows of an image that are converted together: a large image needs several times its own memory otherwise."""
    return max(1, 4_000_000 // max(1, width))


OF_12_BITS = "16-bit files whose values end at 4095 are 12-bit data: they are stretched to that range. Warned once"
OF_8_BITS = "a 16-bit file uses 8 bits or fewer, so it is seen as nearly black: is it an 8-bit image? Warned once"


def _wide_gray(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or floats -> 8 bits. The scale of 32-bit and float data is not in the file, so it is the
    narrowest of 0-1 (floats only), 0-255 and 0-65535 that holds every value, else the image's own range."""
    whole = np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(whole.min()), float(whole.max())
    lowest = 0.0
    if image.mode.startswith("I;16"):
        top = 4095.0 if 255 < high <= 4095 else 65535.0
        if 0 < high <= 4095:
            say_once(logger, OF_12_BITS if top == 4095 else OF_8_BITS)
    else:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((scale for scale in scales if low >= 0 and high <= scale), None)
        if top is None:
            lowest, top = low, high - low
    gray = np.empty(whole.shape, np.uint8)
    rows = _strip(image.width)
    for begin in range(0, len(whole), rows):
        part = whole[begin : begin + rows].astype(np.float64)
        gray[begin : begin + rows] = np.round((part - lowest) * 255.0 / (top or 1.0))
    return Image.fromarray(gray)

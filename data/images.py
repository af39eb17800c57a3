"""One image value to one correct RGB picture: the only place of the repo that opens images."""

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageFile

Image.init()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at its limit, `max_pixels` makes an error of it
# An explicit list: Pillow would otherwise also open EPS (which runs Ghostscript) and other formats nobody trains on.
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
    if name in Image.OPEN
)
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


class ImageError(ValueError):
    """An image that cannot be had; the message names the file, the fault and what to do."""


def open_image(value, max_pixels: int = MAX_PIXELS, size: tuple[int, int] | None = None) -> Image.Image:
    """Open an image as RGB, the way a person sees it.

    The EXIF orientation is applied; transparency (RGBA, LA, PA, a palette's or a colour key's) is laid over white;
    CMYK (Adobe's inverted one too), YCbCr, LAB, palettes, grayscale and 1-bit images are converted; of an animation
    (GIF, WebP, APNG) the first frame is taken. Gray with more than 8 bits is scaled, not clipped: 16-bit by 257;
    32-bit integers and floats as `_wide_gray` says.

    Args:
        value: a path, the bytes of a file, a datasets value `{"path": ..., "bytes": ...}` (bytes win), or a PIL image.
        max_pixels: larger images are refused from their header, before any pixel is decoded. Pillow itself refuses
            above 178,956,970, whatever is given here.
        size: (height, width) in pixels, after orientation, that are enough. Given it, a JPEG is decoded at 1/2, 1/4 or
            1/8 scale (libjpeg's DCT scaling) where both sides stay at least that long. Off by default, as pixels
            then differ a little: over the 800 test photos, resized (bicubic) to half their size, by 3.3 of 255 on
            average (9.2 in the worst photo) if `size` is that half; resized to a quarter, by 1.6 (5.3) if `size` is
            twice the quarter. So give twice what you resize to.

    Returns:
        A new PIL image of mode RGB, without metadata.

    Raises:
        ImageError: missing, empty, truncated, no image, of an unsupported format, or too large.
    """
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
        if content is None and path is None:
            raise ImageError('an image value has neither "path" nor "bytes": give one of them')
        name, source = str(path or "image bytes"), path if content is None else content
    elif isinstance(value, Image.Image):
        name, source = getattr(value, "filename", "") or "PIL image", value
    else:
        name, source = "image bytes" if isinstance(value, (bytes, bytearray, memoryview)) else str(value), value

    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels, size=None)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), len(source), name, max_pixels, size)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"an image is given as {type(source).__name__}: give a path, bytes, a path/bytes dict or a PIL image"
        )
    try:
        with open(source, "rb") as file:
            return _open(file, os.fstat(file.fileno()).st_size, name, max_pixels, size)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file. Check the path, or the folder given as image_dir") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(f"{name}: cannot be read ({error}). Check the file and its permissions") from None


def _open(file, length: int, name: str, max_pixels: int, size) -> Image.Image:
    if length == 0:
        raise ImageError(f"{name}: the image file is empty (0 bytes). Fetch it again or remove it from the data")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image is too large ({error}). Downscale it or remove it") from None
    except Exception:
        raise ImageError(
            f"{name}: not an image, or one of an unsupported format. "
            f"Convert it to JPEG or PNG, or remove it (supported: {', '.join(FORMATS)})"
        ) from None
    return _decode(image, name, max_pixels, size)


def _decode(image: Image.Image, name: str, max_pixels: int, size) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: the image is too large ({width} x {height} pixels, more than {max_pixels:,}). "
            "Downscale it, or remove it from the data"
        )
    try:
        if size is not None and isinstance(image, ImageFile.ImageFile):
            turned = _orientation(image) >= 5
            image.draft(None, (size[0], size[1]) if turned else (size[1], size[0]))
        image.load()
        orientation = _orientation(image)  # after loading: Pillow turns a TIFF itself as it loads
        image = _to_rgb(image)
        image = image.transpose(UNDO_ORIENTATION[orientation]) if orientation in UNDO_ORIENTATION else image.copy()
        image.info.clear()  # the orientation must not be applied again by whoever opens this picture next
        return image
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error and SyntaxError
        reason = "the image is truncated" if "truncated" in str(error) else "the image is damaged"
        raise ImageError(f"{name}: {reason} ({error}). Fetch it again or remove it from the data") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data, sound pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):  # premultiplied: La has no direct way to RGBA
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_gray(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or floats -> 8 bits. The scale of 32-bit and float data is not in the file, so it is the
    narrowest of 0-1 (floats only), 0-255 and 0-65535 that holds every value, else the image's own range."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((scale for scale in scales if low >= 0 and high <= scale), None)
        if top is None:
            values, top = values - low, high - low
    return Image.fromarray(np.round(values * 255.0 / (top or 1.0)).astype(np.uint8))

import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from common.logs import say_once
from data import ImageError, open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image, kind="PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pixels(value, **options) -> np.ndarray:
    image = open_image(value, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def checker() -> Image.Image:
    """3 wide, 2 high, every pixel another colour."""
    return Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_claimed_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# ---- what a value may be


def test_path_bytes_dict_and_pil_give_the_same_pixels(tmp_path):
    file = tmp_path / "a.png"
    checker().save(file)
    values = [
        file,
        str(file),
        file.read_bytes(),
        bytearray(file.read_bytes()),
        {"path": str(file), "bytes": None},
        {"path": "elsewhere/a.png", "bytes": file.read_bytes()},
        {"bytes": file.read_bytes()},
        checker(),
    ]
    for value in values:
        np.testing.assert_array_equal(pixels(value), np.asarray(checker()))


@pytest.mark.parametrize("value", [None, 7, {}, {"path": None, "bytes": None}])
def test_a_value_of_another_kind_is_refused(value):
    with pytest.raises(ImageError, match="path"):
        open_image(value)


# ---- orientation

# Where EXIF orientation n puts the stored rows and columns, as the standard's table says: the stored picture that
# shows `upright` when orientation n is applied.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),  # the camera's top is the picture's right: show it turned clockwise
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation, kind):
    upright = np.asarray(checker())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(content), upright)
    again = open_image(open_image(content))  # nobody turns it twice
    np.testing.assert_array_equal(np.asarray(again), upright)


def test_a_turned_jpeg_is_undone_in_draft_mode_too():
    upright = Image.new("RGB", (256, 128), "blue")
    upright.paste("red", (0, 0, 128, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    whole, draft = open_image(content), open_image(content, size=(30, 60))
    assert whole.size == (256, 128)
    assert draft.size == (64, 32)
    for image in (whole, draft):
        left, right = (np.asarray(image)[image.height // 2, image.width * share // 4].astype(int) for share in (1, 3))
        assert left[0] > 240 > 20 > left[2]
        assert right[2] > 240 > 20 > right[0]


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_only_orientations_that_exchange_width_and_height_do_so_in_draft_mode(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.new("RGB", (1024, 256)), "JPEG", exif=exif)
    assert open_image(content, size=(64, 256)).size == (256, 64)


@pytest.mark.parametrize(("brightest", "said"), [(4095, "12-bit data"), (256, "12-bit data"), (255, "8 bits or fewer")])
def test_the_line_about_16_bit_files_names_what_they_hold(brightest, said, caplog):
    say_once.cache_clear()
    open_image(saved(Image.fromarray(np.full((4, 4), brightest, np.uint16)), "PNG"))
    assert said in caplog.text


def test_damaged_exif_does_not_hide_a_sound_image():
    content = saved(checker(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\1" * 20)
    np.testing.assert_array_equal(pixels(content), np.asarray(checker()))


# ---- colour


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black
    expected = [[RED, WHITE, (204, 204, 204)]]
    assert pixels(saved(rgba)).tolist() == np.array(expected).tolist()
    assert pixels(saved(rgba, "TIFF")).tolist() == np.array(expected).tolist()
    assert pixels(rgba).tolist() == np.array(expected).tolist()
    assert pixels(rgba.convert("RGBa"))[0, :2].tolist() == [list(RED), list(WHITE)]

    la = Image.new("LA", (2, 1))
    la.putpixel((0, 0), (0, 255))
    la.putpixel((1, 0), (0, 0))
    assert pixels(saved(la)).tolist() == [[[0] * 3, [255] * 3]]
    assert pixels(la.convert("La")).tolist() == [[[0] * 3, [255] * 3]]
    pa = Image.new("PA", (2, 1))
    pa.putpalette(RED)
    pa.putpixel((0, 0), (0, 255))
    pa.putpixel((1, 0), (0, 0))
    assert pixels(pa).tolist() == [[list(RED), list(WHITE)]]


def test_palettes_with_and_without_transparency():
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pixels(saved(palette)).tolist() == [colours]
    assert pixels(saved(palette, transparency=1)).tolist() == [[colours[0], list(WHITE), colours[2]]]
    assert pixels(saved(palette, transparency=bytes([255, 255, 0]))).tolist() == [[*colours[:2], list(WHITE)]]
    assert pixels(saved(palette, "GIF", transparency=0)).tolist() == [[list(WHITE), *colours[1:]]]


def test_a_colour_key_is_transparent():
    rgb = Image.new("RGB", (2, 1), RED)
    rgb.putpixel((1, 0), (1, 2, 3))
    assert pixels(saved(rgb, transparency=(1, 2, 3))).tolist() == [[list(RED), list(WHITE)]]
    gray = Image.new("L", (2, 1), 9)
    gray.putpixel((1, 0), 77)
    assert pixels(saved(gray, transparency=77)).tolist() == [[[9] * 3, [255] * 3]]


def test_gray_and_one_bit():
    gray = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert pixels(saved(gray)).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(saved(bits)).tolist() == [[[0] * 3, [255] * 3]]


def test_cmyk_and_adobes_inverted_cmyk():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert pixels(saved(cmyk, "TIFF"))[0, 0].tolist() == list(RED)
    content = saved(cmyk, "JPEG", quality=100)
    assert b"Adobe" in content[:200]
    assert np.abs(pixels(content).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces(mode):
    image = Image.new("RGB", (8, 8), (200, 60, 30))
    if mode == "LAB":
        content = saved(Image.new("LAB", (8, 8), (136, 128, 128)), "TIFF")  # L* 53: the middle gray
        assert np.abs(pixels(content).astype(int) - 128).max() <= 3
    else:
        assert np.abs(pixels(image.convert(mode)).astype(int) - (200, 60, 30)).max() <= 4


def test_16_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 257, 257 * 100, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert pixels(saved(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 100, 255]
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert pixels(big_endian)[0, :, 0].tolist() == [0, 1, 100, 255]
    dark = np.array([[0, 200]], np.uint16)  # all below 256, and yet 16-bit data
    assert pixels(saved(Image.fromarray(dark)))[0, :, 0].tolist() == [0, 1]
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(pgm)[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 128, 255], np.int32, [0, 128, 255]),
        ([0, 257 * 9, 65535], np.int32, [0, 9, 255]),
        ([-100, 0, 100], np.int32, [0, 128, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 51.0, 255.0], np.float32, [0, 51, 255]),
        ([0.0, 257.0, 65535.0], np.float32, [0, 1, 255]),
        ([-2.0, 0.0, 2.0], np.float32, [0, 128, 255]),
        ([float("nan"), 0.0, 1.0], np.float32, [0, 0, 255]),
        ([-3.0, -3.0, -3.0], np.float32, [0, 0, 0]),
    ],
)
def test_32_bit_gray_and_floats_are_scaled(values, kind, expected):
    image = Image.fromarray(np.array([values], kind))
    assert pixels(saved(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    assert (pixels(content) == RED).all()


def test_a_phones_multi_picture_jpeg_gives_its_first():
    pictures = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255))]
    content = saved(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.abs(pixels(content).astype(int) - RED).max() <= 2


# ---- bad files


def photo() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return saved(Image.fromarray(noise), "JPEG")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, this is a text", "not an image"),
        (b"%PDF-1.4 not an image", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        (photo()[:20], "not an image|truncated|damaged"),
        (photo()[: len(photo()) // 2], "truncated"),
        (saved(checker())[:45], "truncated|damaged|not an image"),
        (saved(checker(), "GIF")[:20], "truncated|damaged|not an image"),
        (saved(checker(), "WEBP")[:40], "truncated|damaged|not an image"),
        (saved(checker(), "TIFF")[:60], "truncated|damaged|not an image"),
        (png_of_claimed_size(20000, 20000), "too large"),
        (png_of_claimed_size(10000, 9000), "too large"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, content, says):
    file = tmp_path / "bad.jpg"
    file.write_bytes(content)
    for value in (file, {"path": str(file), "bytes": None}, {"path": str(file), "bytes": content}):
        with pytest.raises(ImageError, match=says) as error:
            open_image(value)
        assert str(file) in str(error.value)
        assert error.value.__context__ is None or error.value.__suppress_context__  # no traceback of Pillow's
    with pytest.raises(ImageError, match=says):
        open_image(content)


def test_missing_file_folder_and_impossible_path(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such image file"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("a\0b.jpg")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    file = tmp_path / "locked.png"
    checker().save(file)
    file.chmod(0)
    with pytest.raises(ImageError, match="permission"):
        open_image(file)


def test_max_pixels_is_checked_before_pixels_are_decoded():
    with pytest.raises(ImageError, match="3 x 2 pixels, more than 5"):
        open_image(checker(), max_pixels=5)
    assert open_image(checker(), max_pixels=6).size == (3, 2)


# ---- draft mode


def test_draft_mode_never_goes_below_the_needed_size():
    content = saved(Image.new("RGB", (1000, 600), RED), "JPEG")
    for size, expected in [
        ((600, 1000), (1000, 600)),
        ((301, 100), (1000, 600)),
        ((300, 500), (500, 300)),
        ((75, 125), (125, 75)),
        ((1, 1), (125, 75)),
    ]:
        assert open_image(content, size=size).size == expected
    assert open_image(content).size == (1000, 600)
    assert open_image(saved(checker()), size=(1, 1)).size == (3, 2)  # only JPEG has it


@pytest.mark.parametrize(("share", "margin", "mean", "worst"), [(2, 1, 3.6, 10.0), (4, 2, 1.8, 6.0)])
def test_draft_mode_stays_within_its_stated_tolerance(test_data, share, margin, mean, worst):
    """Real photos, resized to 1/share, decoded at half scale: the differences that the docstring states."""
    differences = []
    for file in sorted((test_data / "flickr8k" / "Flicker8k_Dataset").glob("*.jpg"))[:200]:
        whole = open_image(file)
        width, height = whole.width // share, whole.height // share
        draft = open_image(file, size=(height * margin, width * margin))
        assert draft.width < whole.width
        small = [
            np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
            for image in (whole, draft)
        ]
        differences.append(np.abs(small[0] - small[1]).mean())
    assert 0 < np.mean(differences) < mean
    assert max(differences) < worst


def test_a_truncated_jpeg_is_found_at_eighth_scale_too():
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)
    content = saved(Image.fromarray(noise), "JPEG")
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match="truncated"):
            open_image(content[: int(len(content) * share)], size=(1, 1))


# ---- many at once


def test_threads_get_the_same_pixels(test_data):
    files = sorted((test_data / "flickr8k" / "Flicker8k_Dataset").glob("*.jpg"))[:20]
    expected = [pixels(file).sum() for file in files]
    found = [[] for _ in range(4)]

    def work(place):
        found[place] = [pixels(file).sum() for file in files]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(sums == expected for sums in found)

import io
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import Augmentation, corruption
from data.augmentation import GRAY, NOISE, RANDAUGMENT_OPERATIONS, randaugment, random_resized_crop
from data.left_right import PARTS, names_a_side

BLIP = ["random_resized_crop:0.5:1.0", "flip", "randaugment:2:5"]
NOISY = ["gaussian_noise:20:0.5", "blur:2:0.5", "jpeg:10:0.5"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    rows, columns = np.mgrid[0:60, 0:80]
    return Image.fromarray(np.stack([rows * 4, columns * 3, (rows + columns) % 256], -1).astype(np.uint8))


class Scripted:
    """A random number generator that draws what it is told."""

    def __init__(self, operation, applied=True, sign=1):
        self.operation, self.applied, self.sign = operation, applied, sign

    def choices(self, options, k):
        assert self.operation in options
        return [self.operation] * k

    def random(self):
        return 0.0 if self.applied else 0.99

    def choice(self, options):
        return self.sign


def test_the_same_seed_epoch_and_image_give_the_same_pixels(image):
    one, two = Augmentation(BLIP, (32, 48), seed=1), Augmentation(BLIP, (32, 48), seed=1)
    results = [one(image, 3, f"image{i}") for i in range(20)]
    assert all(result.size == (48, 32) and result.mode == "RGB" for result in results)
    again = [two(image, 3, f"image{i}") for i in reversed(range(20))][::-1]  # in whatever order they come
    assert all(first.tobytes() == second.tobytes() for first, second in zip(results, again, strict=True))
    assert len({result.tobytes() for result in results}) == 20


def test_seed_epoch_and_image_each_make_another_picture(image):
    pictures = {
        Augmentation(BLIP, (32, 32), seed)(image, epoch, name).tobytes()
        for seed in (1, 2)
        for epoch in (0, 1)
        for name in ("a", "b")
    }
    assert len(pictures) == 8


def test_another_process_draws_the_same():
    code = (
        "import hashlib, numpy as np; from PIL import Image; from data import Augmentation\n"
        "image = Image.fromarray(np.arange(7500, dtype=np.uint8).reshape(50, 50, 3))\n"
        f"augment = Augmentation({[*BLIP, *NOISY]!r}, (24, 24))\n"
        "drawn = hashlib.md5(b''.join(augment(image, 1, str(i)).tobytes() for i in range(10))).hexdigest()"
    )
    here: dict = {}
    exec(code, here)
    command = [sys.executable, "-c", f"{code}\nprint(drawn)"]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout.strip() == here["drawn"]


def test_the_input_is_not_changed(image):
    before = image.tobytes()
    for name in range(30):
        Augmentation([*BLIP, *NOISY, "color_jitter:0.2:0.2:0.2", "rotation:10", "grayscale:1"], (32, 32))(
            image, 0, str(name)
        )
    assert image.tobytes() == before


def test_crops_keep_to_their_share_and_shape(image):

    rng = random.Random(0)
    for _ in range(200):
        crop = random_resized_crop(image, None, 0.5, 1.0, rng)
        assert 0.49 <= crop.width * crop.height / (80 * 60) <= 1
        assert 0.73 <= crop.width / crop.height <= 1.37


def test_a_crop_of_a_very_long_image_is_its_middle():

    strip = Image.new("RGB", (1000, 10), "white")
    strip.paste("red", (494, 0, 506, 10))
    crop = random_resized_crop(strip, None, 1.0, 1.0, random.Random(0))
    assert crop.size == (13, 10)
    assert np.asarray(crop)[:, 1:-1].reshape(-1, 3).tolist() == [[255, 0, 0]] * 110


def test_half_of_the_images_are_flipped_but_none_that_speaks_of_left_or_right(image):
    augment, mirrored = Augmentation(["flip"]), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    flipped = [augment(image, 0, str(i), ["a dog on a bright leftover"]).tobytes() == mirrored for i in range(400)]
    assert 160 < sum(flipped) < 240
    for caption in ("a dog left of a cat", "The RIGHT hand.", "the leftmost door", "a right-handed man"):
        assert all(augment(image, 0, str(i), ["a dog", caption]).tobytes() == image.tobytes() for i in range(30))


SIDES = {  # a caption of each language that says left or right, and one that does not
    "de": ("ein Hund links von dem Ball", "ein Hund auf dem Rasen"), "fr": ("un chien à gauche", "un chien sur l'herbe"),
    "vi": ("con chó bên trái", "con chó trên cỏ"), "zh": ("左边有一只狗", "草地上有一只狗"), "ja": ("右側の犬", "草の上の犬"),
    "th": ("สุนัขทางซ้าย", "สุนัขบนหญ้า"), "ko": ("오른쪽에 있는 개", "잔디 위의 개"), "ru": ("собака слева", "собака на траве"),
    "es": ("un perro a la derecha", "un perro en la hierba"), "it": ("un cane a destra", "un cane sull'erba"),
    "pt": ("um cão à esquerda", "um cão na relva"), "nl": ("de linkerhand", "een hond in het gras"),
    "pl": ("po lewej stronie", "pies na trawie"), "cs": ("pes vlevo", "pes na trávě"), "ar": ("كلب على اليسار", "كلب على العشب"),
    "he": ("כלב בצד שמאל", "כלב על הדשא"), "hi": ("बाएं कुत्ता", "घास पर कुत्ता"), "tr": ("solda bir köpek", "çimde bir köpek"),
    "fi": ("koira vasemmalla", "koira nurmella"), "sv": ("en hund till höger", "en hund på gräset"),
    "uk": ("собака ліворуч", "собака на траві"), "el": ("σκύλος αριστερά", "σκύλος στο γρασίδι"),
    "hu": ("kutya a bal oldalon", "kutya a füvön"), "da": ("en hund til venstre", "en hund på græsset"),
    "id": ("anjing di sebelah kiri", "anjing di rumput"), "fa": ("سگ در سمت چپ", "سگ روی چمن"),
}  # fmt: skip


@pytest.mark.parametrize("language", SIDES)
def test_a_flip_is_withheld_by_left_and_right_in_the_captions_language(image, language, caplog):
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()

    def flips(caption, language):
        augment = Augmentation(["flip"], language=language)
        return sum(augment(image, epoch, "0", [caption]).tobytes() == mirrored for epoch in range(60))

    side, neither = SIDES[language]
    for code in (language, f"{language}-Xx", "en"):
        assert flips(side, code) == 0
        assert flips(unicodedata.normalize("NFD", side), code) == 0
        assert 15 < flips(neither, code) < 45
    assert flips("a dog on the left", language) == 0
    assert not caplog.text


def test_a_flip_says_that_it_does_not_know_a_language(caplog):
    Augmentation(["flip"], language="quz")
    assert "left and right in caption_language quz are not known" in caplog.text


@pytest.mark.parametrize("language", PARTS)
def test_words_of_scripts_without_borders_are_found_wherever_they_are(language):
    assert all(names_a_side(f"犬{word}犬", language) for word in PARTS[language].split("|"))
    assert not names_a_side("犬", language)


def test_a_flip_withheld_changes_nothing_after_it(image):
    augment = Augmentation(["flip", "rotation:30"])
    pairs = [(augment(image, 0, str(i), ["left"]), augment(image, 0, str(i))) for i in range(30)]
    same = [left.tobytes() == free.tobytes() for left, free in pairs]
    assert 5 < sum(same) < 25  # the angle is the same; where a flip was due, only one has it


def test_randaugment_has_blips_ten_operations_at_blips_magnitudes(image):
    assert set(RANDAUGMENT_OPERATIONS) == {
        *("identity", "auto_contrast", "brightness", "sharpness", "equalize"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    }
    pixels = np.asarray(image)
    for name in RANDAUGMENT_OPERATIONS:
        assert randaugment(image, 1, 5, Scripted(name, applied=False)).tobytes() == image.tobytes()
        changed = randaugment(image, 1, 5, Scripted(name)).tobytes() != image.tobytes()
        assert changed == (name not in ("identity", "brightness", "sharpness"))  # factor 1 at magnitude 5

    moved = np.asarray(randaugment(image, 1, 5, Scripted("translate_x")))  # 5 pixels
    np.testing.assert_array_equal(moved[:, :-5], pixels[:, 5:])
    assert (moved[:, -4:] == GRAY).all()
    moved = np.asarray(randaugment(image, 1, 5, Scripted("translate_y", sign=-1)))
    np.testing.assert_array_equal(moved[5:], pixels[:-5])
    assert (moved[:4] == GRAY).all()
    brighter = np.asarray(randaugment(image, 1, 10, Scripted("brightness"))).astype(int)  # .1 + 1.8 = 1.9
    assert np.abs(brighter - np.minimum(pixels * 1.9, 255)).max() <= 1
    sheared = np.asarray(randaugment(image, 1, 5, Scripted("shear_x")))  # .15: the last row moves by 59 * .15
    assert abs(int(sheared[59, 10, 1]) - int(pixels[59, 10 + 9, 1])) <= 3
    sheared = np.asarray(randaugment(image, 1, 5, Scripted("shear_y")))
    assert abs(int(sheared[10, 59, 0]) - int(pixels[10 + 9, 59, 0])) <= 3
    turned = randaugment(image, 1, 5, Scripted("rotate"))
    assert turned.tobytes() == image.rotate(15, Image.Resampling.BILINEAR, fillcolor=GRAY).tobytes()


def test_other_operations(image):
    assert Augmentation(["grayscale:0"])(image, 0, "a").tobytes() == image.tobytes()
    gray = np.asarray(Augmentation(["grayscale:1"])(image, 0, "a"))
    assert (gray[..., 0] == gray[..., 1]).all()
    assert (gray[..., 1] == gray[..., 2]).all()
    assert Augmentation(["color_jitter:0:0:0"])(image, 0, "a").tobytes() == image.tobytes()
    assert Augmentation(["color_jitter:0.2:0.2:0.2"])(image, 0, "a").tobytes() != image.tobytes()
    assert Augmentation(["rotation:0"])(image, 0, "a").tobytes() == image.tobytes()
    assert Augmentation([], (10, 20))(image, 0, "a").size == (20, 10)


def test_gaussian_noise_has_the_asked_standard_deviation_on_every_channel():
    gray = Image.new("RGB", (200, 150), GRAY)
    noise = np.asarray(Augmentation(["gaussian_noise:20"])(gray, 0, "a")).astype(float) - 128
    for channel in range(3):
        assert abs(noise[..., channel].mean()) < 0.5
        assert abs(noise[..., channel].std() - 20) < 0.5
    assert abs(np.corrcoef(noise.reshape(-1, 3).T)[0, 1]) < 0.02
    # White stays within white: no value wraps around.
    white = np.asarray(Augmentation(["gaussian_noise:60"])(Image.new("RGB", (50, 50), "white"), 0, "a"))
    assert white.min() > 0
    assert (white == 255).mean() > 0.4


def test_blur_spreads_a_point_as_a_gaussian_does():
    point = Image.new("RGB", (41, 41), "black")
    point.paste((255, 255, 255), (20, 20, 21, 21))
    spread = np.asarray(Augmentation(["blur:2"])(point, 0, "a")).astype(float)[..., 0]
    rows = np.arange(41) - 20
    assert np.sqrt((spread.sum(axis=1) * rows**2).sum() / spread.sum()) == pytest.approx(2, abs=0.3)


def test_jpeg_gives_the_pixels_of_a_file_of_that_quality(image):
    errors = []
    for quality in (5, 50, 95):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        wanted = np.asarray(Image.open(file))
        pixels = np.asarray(Augmentation([f"jpeg:{quality}"])(image, 0, "a"))
        np.testing.assert_array_equal(pixels, wanted)
        errors.append(np.abs(pixels.astype(int) - np.asarray(image)).mean())
    assert errors == sorted(errors, reverse=True)


def test_noise_of_no_strength_or_probability_changes_nothing(image):
    for text in ("gaussian_noise:0", "blur:0", "gaussian_noise:50:0", "blur:5:0", "jpeg:1:0"):
        assert Augmentation([text])(image, 0, "a").tobytes() == image.tobytes()
    for text in NOISY:
        changed = [Augmentation([text])(image, 0, str(i)).tobytes() != image.tobytes() for i in range(200)]
        assert 70 < sum(changed) < 130


def test_a_corruption_is_the_same_at_every_evaluation_and_of_an_image_of_its_own(image):
    assert corruption([]) is None
    one, two = corruption(["gaussian_noise:30", "jpeg:10"]), corruption(["gaussian_noise:30", "jpeg:10"])
    assert one(image, 0, "a").tobytes() == two(image, 0, "a").tobytes() != one(image, 0, "b").tobytes()
    assert one(image, 0, "a").size == image.size
    both = Augmentation(["jpeg:10"])(Augmentation(["gaussian_noise:30"])(image, 0, "a"), 0, "a")
    assert one(image, 0, "a").tobytes() == both.tobytes()  # one after the other


@pytest.mark.parametrize("text", ["flip", "rotation:10", "pixelate:2"])
def test_what_is_no_noise_is_no_corruption(text):
    with pytest.raises(ValueError, match=f"unknown operation '{text.split(':')[0]}'. Known: {', '.join(NOISE)}"):
        corruption([text])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flop", "unknown operation 'flop'.*flip"),
        ("flip:0.5", "expected flip"),
        ("randaugment:2", "expected randaugment:N:M"),
        ("randaugment:two:5", "expected numbers, randaugment:N:M"),
        ("randaugment:2:50", "M from 0 to 10"),
        ("random_resized_crop:0:1", "LOW"),
        ("random_resized_crop:1:0.5", "LOW <= HIGH"),
        ("grayscale:nan", "P from 0 to 1"),
        ("jpeg:0", r"expected jpeg:QUALITY\[:P\], with QUALITY 1 to 100"),
        ("jpeg:10.5", "QUALITY 1 to 100 whole"),
        ("jpeg", r"expected jpeg:QUALITY"),
        ("jpeg:10:2", "P 0 to 1"),
        ("blur:-1", "RADIUS 0 to 100"),
        ("gaussian_noise:nan", "STD 0 to 255"),
        ("gaussian_noise:1:1:1", r"expected gaussian_noise:STD\[:P\]"),
    ],
)
def test_a_wrong_specification_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        Augmentation([text])

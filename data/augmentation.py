"""Image augmentation on PIL images, from a list of plain words in a recipe, seeded per image.

The recipe of BLIP's paper (section 4.1; data/__init__.py and transform/randaugment.py of github.com/salesforce/BLIP):

    augment: ["random_resized_crop:0.5:1.0", "flip", "randaugment:2:5"]

docs/augmentation.png shows what each operation does to a picture; `python benchmarks/quality/augmentation.py PHOTO...`
draws the same for your photos.
"""

import functools
import hashlib
import io
import logging
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from common.errors import UserError
from data.images import open_image
from data.left_right import left_right, names_a_side

logger = logging.getLogger(__name__)
GRAY = (128, 128, 128)  # what the official RandAugment fills exposed corners with
NOISE = ("gaussian_noise", "blur", "jpeg")  # what a camera or a website does to a picture; its caption stays true


class Augmentation:
    """Augments one image: `Augmentation(spec, size, seed)(image, epoch, image_id, captions)`.

    Every random choice comes from (seed, epoch, image_id), so a resumed run sees the same images as an uninterrupted
    one, with any number of workers and processes.

    Args:
        spec: operations, in order:
            `random_resized_crop:LOW:HIGH`: a crop of that share of the area, aspect 3:4 to 4:3, resized (bicubic) to
            `size`; LOW and HIGH are .5 and 1 in BLIP's recipe.
            `flip`: mirrored with probability 1/2. The official recipe mirrors every image; ours skips those whose
            captions mention left or right (data/left_right.py), which mirroring would make false.
            `randaugment:N:M`: N operations drawn (with repetition) from BLIP's ten, each applied with probability
            1/2 at magnitude M of 10.
            `rotation:DEGREES`: by an angle drawn from -DEGREES to DEGREES.
            `color_jitter:BRIGHTNESS:CONTRAST:SATURATION`: each factor drawn from 1 - x to 1 + x, in random order.
            `grayscale:P`: with probability P.
            `gaussian_noise:STD[:P]`: normal noise of that standard deviation, in units of 255, on every channel.
            `blur:RADIUS[:P]`: a Gaussian of that standard deviation in pixels.
            `jpeg:QUALITY[:P]`: the artefacts of a JPEG file of that quality, from 1 to 100.
            These three have a fixed strength, and are applied with probability P (default 1) to the picture as it is
            at that point of the list: before a crop to the photograph's own pixels, after it to the model's.
        size: (height, width) in pixels that crops and the result are resized to. None leaves resizing to a later
            step; BLIP's recipe resizes at the crop, so that translations are in pixels of the model's input.
        seed: the run's seed.
        language: of the captions, for `flip`.

    Raises:
        ValueError: an unknown operation or wrong numbers; the message names it.
    """

    def __init__(self, spec: list[str], size: tuple[int, int] | None = None, seed: int = 42, language: str = "en"):
        self.size, self.seed, self.language = size, seed, language
        self.spec = list(spec)
        self.operations = [parse_operation(text) for text in spec]
        if "flip" in dict(self.operations) and not left_right(language)[1]:
            logger.warning(
                "flip: the words for left and right in caption_language %s are not known here, so pictures whose captions say "
                "them are mirrored too",
                language,
            )

    def __call__(self, image: Image.Image, epoch: int, image_id: str, captions: list[str] = ()) -> Image.Image:
        """Augment one RGB image of any size, and return an RGB image.

        Args:
            captions: those that are learned with the image, for `flip`.
        """
        rng = seeded(self.seed, epoch, image_id)
        operations = OPERATIONS | {
            "random_resized_crop": self.crop,
            "flip": functools.partial(self.flip, captions=captions),
        }
        for name, numbers in self.operations:
            image = operations[name](image, *numbers, rng)
        if self.size is not None:
            image = image.resize(self.size[::-1], Image.Resampling.BICUBIC)
        return image

    def crop(self, image: Image.Image, low: float, high: float, rng: random.Random) -> Image.Image:
        return random_resized_crop(image, self.size, low, high, rng)

    def flip(self, image: Image.Image, rng: random.Random, captions: list[str]) -> Image.Image:
        mirrored = rng.random() < 0.5  # always drawn, so that the choices after it stay the same
        if mirrored and not any(names_a_side(caption, self.language) for caption in captions):
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


FORMS = {  # name: (its numbers, how many, whether they are valid, which are)
    "random_resized_crop": ("LOW:HIGH", 2, lambda low, high: 0 < low <= high <= 1, "0 < LOW <= HIGH <= 1"),
    "flip": ("", 0, lambda: True, ""),
    "randaugment": ("N:M", 2, lambda n, m: n == int(n) and n >= 1 and 0 <= m <= 10, "N >= 1 whole, M from 0 to 10"),
    "rotation": ("DEGREES", 1, lambda degrees: 0 <= degrees <= 180, "DEGREES from 0 to 180"),
    "color_jitter": ("B:C:S", 3, lambda *factors: all(0 <= factor <= 1 for factor in factors), "each from 0 to 1"),
    "grayscale": ("P", 1, lambda p: 0 <= p <= 1, "P from 0 to 1"),
    "gaussian_noise": ("STD[:P]", 2, lambda std, p: 0 <= std <= 255 and 0 <= p <= 1, "STD 0 to 255, P 0 to 1"),
    "blur": ("RADIUS[:P]", 2, lambda radius, p: 0 <= radius <= 100 and 0 <= p <= 1, "RADIUS 0 to 100, P 0 to 1"),
    "jpeg": ("QUALITY[:P]", 2, lambda q, p: q in range(1, 101) and 0 <= p <= 1, "QUALITY 1 to 100 whole, P 0 to 1"),
}


def corruption(spec: list[str]) -> Augmentation | None:
    """What `evaluate.py --corrupt` does to every image: one or more of NOISE, one after the other, at the photograph's
    own resolution. Called as `corruption(image, 0, image_id)` it does the same to an image at every evaluation.

    Raises:
        ValueError: an operation that is not in NOISE (changing a picture's content would make its references
            false), or wrong numbers.
    """
    for text in spec:
        parse_operation(text, {name: FORMS[name] for name in NOISE}, "corrupt")
    return Augmentation(spec) if spec else None


def seeded(*values) -> random.Random:
    """A generator seeded by these values, the same in every process; hash() differs between processes."""
    return random.Random(hashlib.sha256(" ".join(map(str, values)).encode()).digest())


def parse_operation(text: str, forms: dict = FORMS, flag: str = "augment") -> tuple[str, list]:
    """ "randaugment:2:5" -> ("randaugment", [2, 5])."""
    name, *numbers = str(text).strip().split(":")
    if name not in forms:
        raise UserError(f"{flag} {text!r}: unknown operation {name!r}. Known: {', '.join(forms)}")
    form, number, valid, rule = forms[name]
    expected = f"{name}:{form}" if form else name
    try:
        values = [float(value) for value in numbers]
    except ValueError:
        raise UserError(f"{flag} {text!r}: expected numbers, {expected}") from None
    if form.endswith("[:P]") and len(values) == 1:
        values.append(1.0)
    if len(values) != number or not valid(*values):
        raise UserError(f"{flag} {text!r}: expected {expected}{', with ' + rule if rule else ''}")
    return name, values


def random_resized_crop(image: Image.Image, size, low: float, high: float, rng: random.Random) -> Image.Image:
    """A crop of a share low..high of the area and of aspect ratio 3:4 to 4:3 (log-uniform), resized to `size`.

    As torchvision's RandomResizedCrop: ten tries, then the largest centred crop of a permitted shape.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(low, high)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:
        ratio = min(max(width / height, 3 / 4), 4 / 3)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    if size is None:
        return image.crop(box)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def affine(image: Image.Image, a, b, c, d, e, f) -> Image.Image:
    """Pixel (x, y) of the result is pixel (ax + by + c, dx + ey + f) of the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=GRAY
    )


RANDAUGMENT_OPERATIONS = {  # of an image, the magnitude (0 to 1), and the direction (-1 or 1)
    "identity": lambda image, level, sign: image,
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "shear_x": lambda image, level, sign: affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    "translate_x": lambda image, level, sign: affine(image, 1, 0, sign * 10 * level, 0, 1, 0),
    "translate_y": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, sign * 10 * level),
    "rotate": lambda image, level, sign: turned(image, sign * 30 * level),
}


def randaugment(image: Image.Image, number: float, magnitude: float, rng: random.Random) -> Image.Image:
    """RandAugment with BLIP's ten operations and magnitudes (of 10): shear .3, translation 10 pixels, rotation 30
    degrees, each in either direction; brightness and sharpness by .1 + 1.8 of the magnitude, which at BLIP's setting
    of 5 is 1: these two then change nothing, in the official code as here."""
    for name in rng.choices(tuple(RANDAUGMENT_OPERATIONS), k=int(number)):
        applied, sign = rng.random() < 0.5, rng.choice((-1, 1))
        if applied:
            image = RANDAUGMENT_OPERATIONS[name](image, magnitude / 10, sign)
    return image


def turned(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GRAY)


def rotation(image: Image.Image, degrees: float, rng: random.Random) -> Image.Image:
    return turned(image, rng.uniform(-degrees, degrees))


def with_probability(operation: Callable) -> Callable:
    """operation(image, *numbers, rng) -> the same with one more number, the probability that it is applied."""

    def applied(image: Image.Image, *numbers_and_rng) -> Image.Image:
        *numbers, probability, rng = numbers_and_rng
        return operation(image, *numbers, rng) if rng.random() < probability else image

    return applied


@with_probability
def grayscale(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.convert("L").convert("RGB")


def color_jitter(image: Image.Image, brightness, contrast, saturation, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation by factors of 1 - x to 1 + x, in random order, as torchvision's ColorJitter."""
    enhancers = [
        (ImageEnhance.Brightness, rng.uniform(1 - brightness, 1 + brightness)),
        (ImageEnhance.Contrast, rng.uniform(1 - contrast, 1 + contrast)),
        (ImageEnhance.Color, rng.uniform(1 - saturation, 1 + saturation)),
    ]
    rng.shuffle(enhancers)
    for enhancer, factor in enhancers:
        image = enhancer(image).enhance(factor)
    return image


@with_probability
def gaussian_noise(image: Image.Image, deviation: float, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image)
    normal = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(pixels + deviation * normal), 0, 255).astype(np.uint8))


@with_probability
def blur(image: Image.Image, radius: float, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


@with_probability
def jpeg(image: Image.Image, quality: float, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return open_image(file.getvalue())


OPERATIONS = {  # function(image, *numbers, generator) of those that need neither size nor captions
    "randaugment": randaugment,
    "rotation": rotation,
    "color_jitter": color_jitter,
    "grayscale": grayscale,
    "gaussian_noise": gaussian_noise,
    "blur": blur,
    "jpeg": jpeg,
}

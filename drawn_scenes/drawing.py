"""The quickstart's dataset: small scenes that this file draws and describes, so that nothing is downloaded.

A scene shows two groups of objects, side by side or one above the other, between a hazy sky and a ground. A group is one
to three objects of one colour, shape and size: "three small red stars to the left of a large blue ring". Five captions
describe it in different words, each completely: both groups' count, size, colour and shape, and how the groups lie.

What is held out: every unordered pair of kinds of object (a kind is a colour and a shape) belongs to one split, whatever
the seed. A pair in validation or test never occurs in training, though each of its kinds does in other pairs, so a
model that scores well there has learned to compose.

    python -m drawn_scenes.drawing FOLDER [NUMBER]      saves the first scenes of the test split as PNG files
"""

import functools
import io
import json
import math
import random
import sys
import zlib
from pathlib import Path

import datasets
from PIL import Image, ImageDraw

from common.errors import UserError

SIZE = 96  # pixels per side
GRID = 4  # a scene is GRID x GRID slots of SIZE // GRID pixels; a slot holds at most one object
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 50),
    "green": (45, 150, 65),
    "blue": (40, 85, 205),
    "purple": (125, 50, 160),
    "black": (25, 25, 28),
    "white": (250, 250, 250),
}
SKY, GROUND = (165, 190, 225), (175, 180, 130)  # tints at about the top and the bottom; light comes from the left
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
SIZES = {"small": (13, 15), "large": (20, 23)}  # smallest and largest diameter in pixels
COUNTS = (1, 2, 3)
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def load(
    train: int = 8000, validation: int = 200, test: int = 500, seed: int = 0, shuffled: bool = False
) -> datasets.DatasetDict:
    """Draw the scenes: the same arguments give the same pixels and words on every machine.

    Args:
        train, validation, test: number of scenes in each split.
        seed: another seed draws other scenes. Which combinations are held out does not depend on it.
        shuffled: give each image the captions of another image of its split, as a control: what a model still
            scores, it has learned without looking. `facts` stay those of the image.

    Returns:
        One record per image: `image_id` ("scene-train-00012"), `image` (PNG bytes), `captions` (five, all different) and
        `facts`, a JSON string `{"objects": [{"count", "size", "colour", "shape"}, ...], "relations": [[0, "above", 1]]}`
        whose relations name objects by their index; `drawn_scenes.facts` scores captions against it.
    """
    splits = {}
    for split, number in {"train": train, "validation": validation, "test": test}.items():
        if number < 0 or (shuffled and number == 1):
            raise UserError(
                f"scenes: cannot make {number} scenes for {split}" + (" and shuffle them" if shuffled else "")
            )
        rows = {"image_id": [], "image": [], "captions": [], "facts": []}
        for index in range(number):
            rng = random.Random(f"{seed} {split} {index}")  # a scene does not depend on how many there are
            facts = make_facts(split, rng)
            rows["image_id"].append(f"scene-{split}-{index:05d}")
            rows["image"].append({"bytes": png(draw(facts, rng)), "path": None})
            rows["captions"].append(describe(facts, rng))
            rows["facts"].append(json.dumps(facts))
        if shuffled:
            rows["captions"] = (
                rows["captions"][1:] + rows["captions"][:1]
            )  # scenes are independent: a shift is a shuffle
        features = {
            "image_id": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
            "facts": datasets.Value("string"),
        }
        splits[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return datasets.DatasetDict(splits)


def split_of(kind: tuple[str, str], other: tuple[str, str]) -> str:
    """The split that two kinds, (colour, shape) each, may appear together in: 15 % validation, 15 % test, else train."""
    first, second = sorted([kind, other])
    bucket = zlib.crc32(" ".join(first + second).encode()) % 20
    return "validation" if bucket < 3 else "test" if bucket < 6 else "train"


def make_facts(split: str, rng: random.Random) -> dict:
    """Two groups of different kinds whose pair belongs to `split`, and the relation of the first to the second."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    first, second = rng.choice(kinds), rng.choice(kinds)
    while first == second or split_of(first, second) != split:
        first, second = rng.choice(kinds), rng.choice(kinds)
    objects = [
        {"count": rng.choice(COUNTS), "size": rng.choice(list(SIZES)), "colour": colour, "shape": shape}
        for colour, shape in (first, second)
    ]
    return {"objects": objects, "relations": [[0, rng.choice(list(INVERSE)), 1]]}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(facts: dict, rng: random.Random) -> Image.Image:
    """An RGB image of SIZE x SIZE pixels that shows `facts` and leaves the rest to chance."""
    sky, ground = (tuple(channel + rng.randrange(-20, 21) for channel in tint) for tint in (SKY, GROUND))
    image = Image.new("RGB", (SIZE, SIZE), sky)
    image.paste(ground, mask=gradient())
    image.paste((0, 0, 0), mask=falloff())
    cell = SIZE // GRID
    for group, slots in zip(facts["objects"], place(facts, rng), strict=True):
        red, green, blue = (max(0, min(255, channel + rng.randrange(-14, 15))) for channel in COLOURS[group["colour"]])
        smallest, largest = SIZES[group["size"]]
        for row, column in slots:
            diameter = rng.randrange(smallest, largest + 1)
            free = cell - diameter
            x, y = (max(0, min(free, free // 2 + rng.randrange(-2, 3))) for _ in range(2))  # off the slot's middle
            mask = silhouette(group["shape"], diameter, rng.randrange(-10, 11, 5))
            image.paste((red, green, blue), (column * cell + x, row * cell + y), mask)
    return image


def place(facts: dict, rng: random.Random) -> list[list[tuple[int, int]]]:
    """Slots (row, column) for each group: one group in one half of the scene, the other in the other half.

    Both lie in the middle across the halves and overlap there, so that of "left of" and "above" (and their inverses)
    exactly one holds.
    """
    relation = facts["relations"][0][1]
    half = GRID // 2
    while True:
        groups = []
        for first_half, group in zip((True, False), facts["objects"], strict=True):
            if relation in ("right of", "below"):
                first_half = not first_half
            slots = [(i, j if first_half else j + half) for i in (1, 2) for j in range(half)]  # across, along
            rng.shuffle(slots)
            groups.append(slots[: group["count"]])
        spans = [(min(i for i, _ in slots), max(i for i, _ in slots)) for slots in groups]
        if spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]:
            break
    if relation in ("left of", "right of"):
        return groups
    return [[(along, across) for across, along in slots] for slots in groups]


@functools.cache
def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((SIZE, SIZE))


@functools.cache
def falloff() -> Image.Image:
    return gradient().rotate(90).point(lambda level: level // 4)


@functools.cache
def silhouette(shape: str, diameter: int, degrees: int) -> Image.Image:
    """A mask (mode L, diameter x diameter) of a shape turned by some degrees, drawn 8 times larger for smooth edges."""
    side = 8 * diameter
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)

    def polygon(points):  # points in a frame of -1..1, y downwards
        turn = math.radians(degrees)
        pen.polygon(
            [
                (
                    round(side / 2 + side / 2 * (x * math.cos(turn) - y * math.sin(turn))),
                    round(side / 2 + side / 2 * (x * math.sin(turn) + y * math.cos(turn))),
                )
                for x, y in points
            ],
            fill=255,
        )

    def around(angles, radii):
        return [
            (r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in zip(angles, radii, strict=True)
        ]

    if shape == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "ring":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        hole = side // 4
        pen.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    elif shape == "crescent":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        x, y = 0.5 * math.cos(math.radians(degrees)), 0.5 * math.sin(math.radians(degrees))
        left, top = round(side * (0.5 + x / 2 - 0.4)), round(side * (0.5 + y / 2 - 0.4))
        pen.ellipse((left, top, left + round(0.8 * side), top + round(0.8 * side)), fill=0)
    elif shape == "square":
        polygon([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)])
    elif shape == "triangle":
        polygon(around((0, 120, 240), (1, 1, 1)))
    elif shape == "star":
        polygon(around(range(0, 360, 36), (1, 0.42) * 5))
    elif shape == "cross":
        a, b = 0.3, 0.92
        polygon(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    elif shape == "heart":
        steps = [math.radians(a) for a in range(0, 360, 10)]
        polygon(
            [
                (
                    math.sin(t) ** 3 * 0.95,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17.5 - 0.1,
                )
                for t in steps
            ]
        )
    return mask.reduce(8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Wording

NAMES = {  # singular and plural of each word for a shape
    "circle": [("circle", "circles"), ("disc", "discs")],
    "square": [("square", "squares"), ("box", "boxes")],
    "triangle": [("triangle", "triangles")],
    "star": [("star", "stars")],
    "heart": [("heart", "hearts")],
    "cross": [("cross", "crosses"), ("plus sign", "plus signs")],
    "ring": [("ring", "rings"), ("hoop", "hoops")],
    "crescent": [("crescent", "crescents"), ("moon", "moons")],
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "purple", "violet")}
COUNT_WORDS = {
    1: ("a", "a", "a", "one", "a single"),
    2: ("two", "two", "two", "a pair of"),
    3: ("three", "three", "three", "a trio of"),
    4: ("four", "four", "four", "a group of four"),
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
RELATION_TO_PRONOUN = {  # {its} and {it} stand for the group named before
    "left of": ("to {its} left", "on {its} left"),
    "right of": ("to {its} right", "on {its} right"),
    "above": ("above {it}", "over {it}"),
    "below": ("below {it}", "under {it}", "beneath {it}"),
}
PLACE_WORDS = {
    "left of": ("on the left", "on the left", "on the left side"),
    "right of": ("on the right", "on the right", "on the right side"),
    "above": ("at the top", "up top"),
    "below": ("at the bottom", "down below"),
}
VERBS = (("is", "are"), ("sits", "sit"), ("lies", "lie"), ("floats", "float"), ("can be seen", "can be seen"))
TEMPLATES = (  # a: a group, b: the other, and how a lies to b; .._be, .._verb agree with the group's number
    "{a} {to} {b}",
    "{a} {a_verb} {to} {b}",
    "there {a_be} {a} {to} {b}",
    "a picture of {a} {to} {b}",
    "you can see {a} {to} {b}",
    "{to} {b} {a_verb} {a}",
    "{to} {b} there {a_be} {a}",
    "{b} with {a} {to_it}",
    "{b} {b_have} {a} {to_it}",
    "{b}, and {to_it} {a_verb} {a}",
    "{a} {place} and {b} {other_place}",
    "{a} {place}, {b} {other_place}",
    "{place} {a_verb} {a}, {other_place} {b}",
    "{place} there {a_be} {a} and {other_place} {b}",
    "{place} {a}, {other_place} {b}",
    "{place} {a} and {other_place} {b}",
    "{place}, {a}, and {other_place}, {b}",
)


def describe(facts: dict, rng: random.Random, number: int = 5) -> list[str]:
    """`number` different captions, each of which states all of `facts`."""
    captions = []
    while len(captions) < number:
        caption = caption_of(facts, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


def caption_of(facts: dict, rng: random.Random, templates=TEMPLATES) -> str:
    (subject, relation, other), objects = facts["relations"][0], facts["objects"]
    if rng.random() < 0.5:  # "a star above a ring" and "a ring below a star" are equally true
        subject, relation, other = other, INVERSE[relation], subject
    a, b = objects[subject], objects[other]
    verb = rng.choice(VERBS)
    pronouns = {"it": "it", "its": "its"} if b["count"] == 1 else {"it": "them", "its": "their"}
    caption = rng.choice(templates).format(
        a=noun_phrase(a, rng),
        b=noun_phrase(b, rng),
        to=rng.choice(RELATION_WORDS[relation]),
        to_it=rng.choice(RELATION_TO_PRONOUN[relation]).format(**pronouns),
        place=rng.choice(PLACE_WORDS[relation]),
        other_place=rng.choice(PLACE_WORDS[INVERSE[relation]]),
        a_verb=verb[a["count"] > 1],
        a_be="is" if a["count"] == 1 else "are",
        b_be="is" if b["count"] == 1 else "are",
        b_have="has" if b["count"] == 1 else "have",
    )
    return caption[0].upper() + caption[1:]


def noun_phrase(group: dict, rng: random.Random) -> str:
    """ "two tiny red stars", "a red star of small size", "three stars, big and green" ..."""
    count = rng.choice(COUNT_WORDS[group["count"]])
    size = rng.choice(SIZE_WORDS[group["size"]])
    colour = rng.choice(COLOUR_WORDS[group["colour"]])
    name = rng.choice(NAMES[group["shape"]])[group["count"] > 1]
    style = rng.random()
    if style < 0.6:
        words = f"{count} {size} {colour} {name}"
    elif style < 0.9:
        words = f"{count} {size} {name} in {colour}"
    else:
        words = f"{count} {name} that {'is' if group['count'] == 1 else 'are'} {size} and {colour}"
    if words.startswith("a ") and words[2] in "aeiou":
        words = "an" + words[1:]
    return words


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for row in load(train=0, validation=0, test=int(sys.argv[2]) if len(sys.argv) > 2 else 3)["test"]:
        (folder / f"{row['image_id']}.png").write_bytes(row["image"]["bytes"])

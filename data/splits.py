"""Splits over images: the source's own, or drawn by a hash of each image's key, so that no row moves another image.

An image's key is its name as the source writes it, or a hash of its bytes where the source holds them. Copies of an image, and
images of one group (`--group_column`), stay together, in the split of the least of their keys. data.load calls this.
"""

import itertools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import xxhash
from PIL import Image

from common.errors import DataError, UserError
from common.limits import cpus
from common.processes import in_threads
from common.text import counted
from data.checks import cached_array
from data.images import ImageError, open_image
from data.rows import SPLITS, Record

logger = logging.getLogger(__name__)

SHARES = (0.9, 0.05, 0.05)  # of the images: train, validation, test
WRITTEN_SHARES = re.compile(r"\s*(\d*\.?\d+)\s*[,/]\s*(\d*\.?\d+)\s*[,/]\s*(\d*\.?\d+)\s*")
SIDE = 16  # of the picture's gradients that are compared
# Of the gradients that are clear in both pictures one in 16 may have another sign, and half of those that are clear in one must
# be clear in both: of photographs re-saved at JPEG quality 50 none has, of others every fifth at least.
DIFFERING, BOTH = 1 / 16, 1 / 2
NEIGHBOURS = (
    100  # of the pictures with an equal piece, in order of their gradients, each is compared with the next ones
)
STRUCTURE = 64  # clear gradients that a picture must have to be compared: plain colours are all alike


def parse_shares(text: str | None) -> tuple[float, float, float]:
    """ "0.8,0.1,0.1" or "80,10,10": the shares of train, validation and test."""
    if text is None:
        return SHARES
    written = WRITTEN_SHARES.fullmatch(text)
    numbers = list(map(float, written.groups())) if written else [0.0]
    total = round(sum(numbers), 6)
    if numbers[0] == 0 or total not in (1, 100):
        raise UserError(
            f"--split_shares {text}: write the shares of train, validation and test, such as 0.9,0.05,0.05."
        )
    return tuple(number / total for number in numbers)


def draw_splits(records: list[Record], seed: int, shares, official: bool, groups: list[list[Record]]) -> str:
    """Give images a split where the source has none, in place; returns a phrase for the log line.

    A group's place is that of its least key. Where a split would be empty, the lowest group of the largest split makes it.

    Args:
        official: the source has a test split, and validation is drawn from train.
        groups: records that must stay together, each in one group.
    """
    groups = [[record for record in group if record.split != "test"] for group in groups]
    groups = list(filter(None, groups))
    percent = "/".join(f"{100 * share:g}" for share in shares)
    shares = shares_to_draw(shares, official)
    drawn = {name: [] for name in drawn_splits(shares)}
    if len(groups) < len(drawn):
        raise DataError(
            f"{sum(map(len, groups))} images are too few to draw {' and '.join(drawn)} splits from. Add images, or give the "
            'split of each (a "split" column, or files called train, validation, test)'
        )
    places = [place_of(min(record.key for record in group), seed) for group in groups]
    for number in np.argsort(places):
        drawn[split_at(places[number], shares)].append(groups[number])
    for name in drawn:
        if not drawn[name]:
            drawn[name].append(max(drawn.values(), key=len).pop(0))
    for name, chosen in drawn.items():
        for record in itertools.chain.from_iterable(chosen):
            record.split = name
    # The order of a drawn split is that of its ids, not of the source's rows.
    records.sort(key=lambda record: record.image_id)
    return f"validation drawn from train, seed {seed}" if official else f"{percent} drawn over images, seed {seed}"


def place_of(key: str, seed: int) -> float:
    """Where an image stands between 0 and 1: the hash of its key and the seed."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"), seed=seed) / 2**64


def shares_to_draw(shares: tuple[float, float, float], official: bool) -> tuple[float, float, float]:
    """With an official test split validation alone is drawn, from train."""
    return (*shares[:2], 0.0) if official else shares


def split_at(place: float, shares: tuple[float, float, float]) -> str:
    """The split of a place: validation comes first, then test, then train."""
    _, validation, test = shares
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"


def drawn_splits(shares: tuple[float, float, float]) -> list[str]:
    return [name for name, share in zip(SPLITS, shares, strict=True) if share > 0]


def groups_of(records: list[Record], near: list[tuple[int, int]]) -> list[list[Record]]:
    """Records that must be in one split: they share a group, or are nearly equal pictures (pairs of indices)."""
    leader = list(range(len(records)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first_of: dict[str, int] = {}
    for index, record in enumerate(records):
        for group in record.groups:
            leader[find(index)] = find(first_of.setdefault(group, index))
    for one, other in near:
        leader[find(one)] = find(other)
    groups = defaultdict(list)
    for index, record in enumerate(records):
        groups[find(index)].append(record)
    return list(groups.values())


def near_pairs(images: Sequence, versions: list[str], cache_dir=None) -> list[tuple[int, int]]:
    """Pairs of pictures (their indices) that are the same picture: re-saved, or with another comment.

    The clear brightness gradients of the pictures at 17 x 16 pixels are compared (the difference hash); pictures without
    structure, such as plain colours, are not. Of equal gradients each makes a pair with the first only.

    Args:
        images: as data.open_image takes them.
        versions: what changes when an image does; the gradients are kept in the cache by all of them.
    """

    def compute() -> np.ndarray:
        return np.stack(
            in_threads(lambda index: _gradients(images[index]), range(len(images)), cpus(), "comparing images")
        )

    gradients = cached_array("clear_gradients", "\n".join(versions), compute, cache_dir)
    compared = np.flatnonzero(gradients.any(axis=1))
    distinct, first, same = np.unique(gradients[compared], axis=0, return_index=True, return_inverse=True)
    pairs = [np.stack([first[same.ravel()], np.arange(len(compared))], axis=1)]
    pieces = distinct.view(np.uint16)  # near pictures have one or more of the 32 pieces in common
    for piece in range(pieces.shape[1]):
        order = np.argsort(pieces[:, piece], kind="stable")
        order = order[pieces[order, piece] > 0]  # else nothing is clear there
        for distance in range(1, min(NEIGHBOURS, len(order))):
            one, other = order[:-distance], order[distance:]
            shared = pieces[one, piece] == pieces[other, piece]
            if not shared.any():
                break
            one, other = one[shared], other[shared]
            near = _are_near(distinct[one], distinct[other])
            pairs.append(np.stack([first[one[near]], first[other[near]]], axis=1))
    ordered = np.sort(compared[np.concatenate(pairs)], axis=1)
    return [(one, other) for one, other in np.unique(ordered, axis=0).tolist() if one != other]


def _gradients(image) -> np.ndarray:
    """64 bytes: whether each of 256 steps to the right is clearly brighter, and whether clearly darker; zeros for what cannot be
    compared."""
    try:
        small = open_image(image, size=(4 * SIDE, 4 * SIDE)).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    except (ImageError, OSError):
        return np.zeros(2 * SIDE * SIDE // 8, np.uint8)
    steps = np.diff(np.asarray(small, np.int16)).ravel()
    clear = np.concatenate([steps > 1, steps < -1])
    return np.packbits(clear & (clear.sum() >= STRUCTURE))


def _are_near(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each pair of rows of gradients, whether they are of the same picture."""
    ones = [np.unpackbits(bits, axis=1).sum(axis=1, dtype=int) for bits in (one, other, one & other)]
    turned = np.roll(other, SIDE * SIDE // 8, axis=1)  # brighter where the other is darker
    against = np.unpackbits(one & turned, axis=1).sum(axis=1, dtype=int)
    both = ones[2] + against
    return (against <= DIFFERING * both) & (both >= BOTH * (ones[0] + ones[1] - both))


def _called(record: Record) -> str:
    return os.path.basename(str(record.name or record.image_id))


def say_near_pairs_across_splits(records: list[Record], near: list[tuple[int, int]]) -> None:
    across = [(records[one], records[other]) for one, other in near if records[one].split != records[other].split]
    if across:
        one, other = across[0]
        logger.warning(
            "%s of pictures look the same and are in two splits of the source, such as %s (%s) and %s (%s)",
            *(counted(len(across), "pairs"), _called(one), one.split, _called(other), other.split),
        )

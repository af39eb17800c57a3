"""The scenes that this repo draws itself; with the configuration `shuffled`, paired with others' captions."""

from pathlib import Path

from data.rows import Options

NAME = "scenes"
SPLITS_DIFFER = True  # of no pair of kinds are scenes in two splits, and at 17 x 16 pixels in grey all scenes are alike
ABOUT = "the scenes that this repo draws itself"


def matches(path: Path) -> bool:
    return str(path) == "scenes" and not path.exists()


def tables(path: Path, options: Options) -> dict:
    from drawn_scenes import drawing  # here: no other source needs it

    return drawing.load(shuffled=options.config == "shuffled")

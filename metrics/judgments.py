"""Judgments of captions by people, from the files in which they are published or from a plain table.

ExpertAnnotations.txt, CrowdFlowerAnnotations.txt (Flickr8k), with Flickr8k.token.txt next to them or as references
flickr8k.json, crowdflower_flickr8k.json: the same, as CLIPScore's authors publish them, with the references
8k_correctness.csv, coco_throughness.csv, ... (Composite): Input.image_url, Input.text1, Answer.Q1Answer, ...
pair_pascal.mat and consensus_pascal.mat (Pascal-50S), in one folder; needs scipy
tables (CSV, TSV, JSON, JSON lines, Parquet, a folder of Parquet files) with an image, a caption and a rating, such as
Polaris' (imgid, mt or cand, refs, score) and Nebula's (human_score), or with two captions and a preference
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pyarrow.types

from common.errors import DataError
from common.text import open_text
from data.columns import parse_structure
from data.formats.flickr8k import captions_file
from data.text_rows import ENDINGS, read_json, table_objects

IMAGE = ("image_id", "imgid", "image", "file_name", "filename", "image_path", "image_name", "img")
CAPTION = ("caption", "mt", "cand", "candidate", "prediction")
RATING = ("rating", "human_score", "score", "human_rating", "judgment")
REFERENCES = ("references", "refs", "reference", "ground_truth")
SIDES = (("caption_a", "caption_b"), ("caption_1", "caption_2"), ("caption1", "caption2"), ("first", "second"))
PREFERENCE = ("preference", "preferred", "winner", "choice")
FIRST, SECOND, NEITHER = (
    ("a", "1", "first"),
    ("b", "2", "second", "-1"),
    ("tie", "equal", "both", "neither", "none", "0", ""),
)
PASCAL = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}  # two of the image's own, one of another's, one or two by a machine
VOTES = 48  # on each pair of Pascal-50S, one for each reference


@dataclass
class Judgments:
    """`captions`: (image, caption, references that the file itself has) of each distinct one. `ratings`: (number of the
    caption, rating) of each judgment. `pairs`: (number of the first, of the second, 1 if people prefer the first, -1 the
    second, 0 neither, category) of each pair. `columns`: the user's own scores, of each judgment or (first, second) of each
    pair."""

    captions: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    ratings: list[tuple[int, float]] = field(default_factory=list)
    pairs: list[tuple[int, int, int, str | None]] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    unrated: int = 0
    without_copies: bool = False  # published tables leave out captions that are references word for word
    numbers: dict[tuple, int] = field(default_factory=dict)

    def number(self, image: str, caption: str, references=()) -> int:
        key = (image, caption, tuple(references))
        if key not in self.numbers:
            self.numbers[key] = len(self.captions)
            self.captions.append(key)
        return self.numbers[key]

    def rate(self, image: str, caption: str, rating: float, references=()) -> None:
        if math.isnan(rating):
            self.unrated += 1
        else:
            self.ratings.append((self.number(image, caption, references), rating))


def read_judgments(name: str, references: str | None = None, own_columns: list[str] = ()) -> Judgments:
    """The judgments in a file or folder. `references`: where Flickr8k.token.txt is, if not next to the judgments;
    `own_columns`: of a table, scores to compare with the others.

    DataError names the file, the line and the column of what cannot be read.
    """
    path = Path(name)
    judgments, read = Judgments(), _published(path)
    if read and own_columns:
        raise DataError(f"{path}: score_columns are columns of a table, and this is {read.__doc__}.")
    if read:
        read(path, judgments, references)
    else:
        _read_table(path, judgments, own_columns)
    if not judgments.ratings and not judgments.pairs:
        raise DataError(f"{path}: there are no judgments in it.")
    return judgments


def _published(path: Path) -> Callable | None:
    ending = path.suffix.lower()
    if ending == ".mat" or (path.is_dir() and (path / "pair_pascal.mat").is_file()):
        return _read_pascal
    if ending == ".txt":
        return _read_flickr8k
    if ending == ".csv" and "Input.image_url" in _first_line(path):
        return _read_composite
    if ending == ".json" and _first_line(path).startswith("{"):
        return _read_clipscore
    return None


def _first_line(path: Path) -> str:
    with open_text(path) as lines:
        return lines.readline().lstrip()


def _read_flickr8k(path: Path, judgments: Judgments, references: str | None) -> None:
    """Flickr8k's annotations"""
    token = captions_file(Path(references) if references else path.parent)
    if token is None:
        raise DataError(
            f"{path}: it names captions of Flickr8k.token.txt, which is not next to it: pass it as --references."
        )
    texts, of_image = {}, {}
    with open_text(token) as lines:
        for line in lines:
            name, _, caption = line.rstrip("\r\n").partition("\t")
            texts[name] = caption
            of_image.setdefault(name.partition("#")[0], []).append(caption)
    judgments.without_copies = True
    with open_text(path) as lines:
        for place, line in enumerate(lines, 1):
            image, _, columns = line.rstrip("\r\n").partition("\t")
            name, *values = columns.split("\t")
            where = f"{path} line {place}"
            if len(values) != 3 or name not in texts:
                raise DataError(
                    f"{where}: expected an image, a caption's name in {token.name} and three numbers, with tabs."
                )
            ratings = [_number(value, where) for value in values]
            # CrowdFlower: the share of yes, then how many said yes and no. Experts: three ratings from 1 to 4.
            if ratings[1] + ratings[2] and abs(ratings[0] - ratings[1] / (ratings[1] + ratings[2])) < 0.01:
                ratings = ratings[:1]
            for rating in ratings:
                judgments.rate(image, texts[name], rating, of_image.get(image, ()))


def _read_clipscore(path: Path, judgments: Judgments, references: str | None) -> None:
    """a JSON of images with their human_judgement"""
    for image, content in read_json(path).items():
        if not isinstance(content, dict) or not {"human_judgement", "ground_truth"} <= content.keys():
            raise DataError(f"{path}: image {image!r} has no human_judgement and ground_truth.")
        for row in content["human_judgement"]:
            rating = _number(row["rating"], f"{path}, image {image!r}")
            judgments.rate(image, row["caption"], rating, content["ground_truth"])


def _read_composite(path: Path, judgments: Judgments, references: str | None) -> None:
    """Composite's table"""
    judgments.without_copies = True
    for row, where in table_objects(path):
        image = Path(row.get("Input.image_url") or "").name
        texts = [name for name in row if name.startswith("Input.text") and row[name]]
        for name in texts if image else ():  # the last lines of the published files are empty
            answer = row.get(f"Answer.Q{name.removeprefix('Input.text')}Answer")
            judgments.rate(image, row[name], _number(answer, f"{path}, {where}"))


def _read_pascal(path: Path, judgments: Judgments, references: str | None) -> None:
    """Pascal-50S"""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: reading MATLAB's files needs scipy: pip install scipy") from None
    folder = path if path.is_dir() else path.parent
    missing = [name for name in ("pair_pascal.mat", "consensus_pascal.mat") if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {missing[0]} is missing; Pascal-50S is pair_pascal.mat and consensus_pascal.mat.")
    pairs, votes = loadmat(folder / "pair_pascal.mat"), loadmat(folder / "consensus_pascal.mat")["triplets"][0]
    for place, (row, category) in enumerate(zip(pairs["new_input"][0], pairs["category"][0], strict=True)):
        image, first, second = (str(cell[0]).strip() for cell in row)
        triplets = [[cell[0][0] for cell in vote] for vote in votes[place * VOTES : (place + 1) * VOTES]]
        texts = [[str(cell[0]).strip() for cell in triplet[:3]] for triplet in triplets]
        winners = [text[1 if triplet[3] == 1 else 2] for text, triplet in zip(texts, triplets, strict=True)]
        difference = winners.count(first) - winners.count(second)
        references_text = tuple(text[0] for text in texts)
        numbers = [judgments.number(image, caption, references_text) for caption in (first, second)]
        judgments.pairs.append((*numbers, (difference > 0) - (difference < 0), PASCAL[int(category)]))


# ------------------------------------------------------------------------------------------------------------- plain tables


def _read_table(path: Path, judgments: Judgments, own_columns: list[str]) -> None:
    names, answers = None, set()
    for row, where in _rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{path}, {where}: expected an object with image, caption and rating.")
        where = f"{path}, {where}"
        names = names or _roles(row, path)
        image, *captions = (_text(row, name, where) for name in (names["image"], *names["captions"]))
        references = _texts(row.get(names["references"]), where)
        if len(captions) == 2:
            answers.add(str(row.get(names["judgment"])))
            preference = _preference(row.get(names["judgment"]), where)
            numbers = [judgments.number(image, caption, references) for caption in captions]
            category = row.get("category")
            judgments.pairs.append((*numbers, preference, None if category is None else str(category)))
        else:
            rating = _number(row.get(names["judgment"]), where)
            judgments.rate(image, captions[0], rating, references)
            if math.isnan(rating):
                continue
        for column in own_columns:
            sides = (
                [column]
                if len(captions) == 1
                else [f"{column}{side.removeprefix('caption')}" for side in names["captions"]]
            )
            if absent := [side for side in sides if side not in row]:
                raise DataError(f"{where}: there is no column {absent[0]!r}. Columns: {', '.join(row)}.")
            values = [_number(row[side], where) for side in sides]
            judgments.columns.setdefault(column, []).append(values[0] if len(values) == 1 else tuple(values))
    if answers == {"0", "1"}:
        raise DataError(
            f"{path}: the preferences are 0 and 1, which does not say whose they are: write a and b, or 1 and 2."
        )


def _rows(path: Path) -> Iterator[tuple[object, str]]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or files[0].suffix.lower() not in (".parquet", *ENDINGS):
        raise DataError(
            f"{path}: judgments are read from CSV, TSV, JSON, JSON lines or Parquet, or as they are published."
        )
    for file in files:
        if file.suffix.lower() != ".parquet":
            yield from table_objects(file)
            continue
        table = pq.ParquetFile(file)
        columns = [c.name for c in table.schema_arrow if not _is_picture(c.type)]
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{file.name} row {number}"


def _is_picture(column) -> bool:
    return pyarrow.types.is_struct(column) or pyarrow.types.is_binary(column) or pyarrow.types.is_large_binary(column)


def _roles(row: dict, path: Path) -> dict:
    """Which column is what: {"image", "captions": one or two, "judgment", "references" or None}."""

    def first(names):
        return next((name for name in names if name in row), None)

    sides = next((sides for sides in SIDES if set(sides) <= row.keys()), None)
    captions = sides or tuple(filter(None, [first(CAPTION)]))
    roles = {"image": first(IMAGE), "captions": captions, "judgment": first(PREFERENCE if sides else RATING)}
    if missing := [role for role, column in roles.items() if not column]:
        expected = {"image": IMAGE, "captions": (*CAPTION, *sum(SIDES, ())), "judgment": (*RATING, *PREFERENCE)}[
            missing[0]
        ]
        raise DataError(
            f"{path}: no column of the {missing[0].removesuffix('s')}: expected one of {', '.join(expected)}. "
            f"Columns: {', '.join(map(str, row))}."
        )
    return roles | {"references": first(REFERENCES)}


def _text(row: dict, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: {column} must be text, found {value!r:.80}.")
    return str(value)


def _texts(value, where: str) -> list[str]:
    """References: a list, a list as text (Polaris writes Python's), one text, or none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_structure(value, where)
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise DataError(f"{where}: references must be texts, found {value!r:.80}.")
    return [text for text in values if text.strip()]


def _number(value, where: str) -> float:
    """NaN where there is nothing: a caption that nobody judged."""
    if value is None or str(value).strip() == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {value!r:.80} is not a number.") from None


def _preference(value, where: str) -> int:
    text = str("" if value is None else value).strip().lower().removeprefix("caption").lstrip("_ ").removesuffix(".0")
    for answers, sign in ((FIRST, 1), (SECOND, -1), (NEITHER, 0)):
        if text in answers:
            return sign
    raise DataError(f"{where}: the preference {value!r:.80} is not a, b or tie (or 1, 2 and 0).")

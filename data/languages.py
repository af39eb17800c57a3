"""Captions in several languages, an object per image: {"image_id": ..., "de": ..., "en": ...}, as XM3600's captions.jsonl has them."""

import re
from pathlib import Path

from common.errors import DataError
from data.columns import captions_of
from data.text_rows import ENDINGS, TABLES, first_character, read_json, table_objects

CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
IMAGE = ("image/key", "image_id", "image", "key", "id")  # id is Indonesian, too, where another names the image


def read_languages(file: str) -> dict[str, dict[str, list[str]]]:
    """{language: {image: captions}} of JSON lines, a JSON list, {image: {language: captions}} or a table with a column for each.

    A language's captions are what a cell of captions may be (data.columns). DataError names what is not so.
    """
    path, of_language = Path(file), {}
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{file}: captions by language are read from JSON, JSON lines, CSV or TSV.")
    if path.suffix.lower() == ".json" and first_character(path) == "{":
        rows = (({"image_id": image, **of_image}, repr(image)) for image, of_image in read_json(path).items())
    else:
        rows = table_objects(path)
    for row, where in rows:
        name = next(filter(row.__contains__, IMAGE), None)
        if name is None:
            raise DataError(f"{path}, {where}: no image: expected one of {', '.join(IMAGE)}.")
        for language in filter(CODE.fullmatch, row):
            captions = captions_of(row, [language], f"{path}, {where}", literal=path.suffix.lower() not in TABLES)
            kinds = set(map(type, captions))
            if language != name and str in kinds:
                if len(kinds) > 1:
                    raise DataError(f"{path}, {where}: the captions in {language} must be texts.")
                of_language.setdefault(language, {}).setdefault(str(row[name]), []).extend(captions)
    if not of_language:
        raise DataError(
            f"{path}: no captions by language: expected an object such as {{'image_id': ..., 'de': ..., 'en': ...}}."
        )
    return of_language

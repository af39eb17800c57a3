"""Captions in several languages, an object per image: {"image_id": ..., "de": ..., "en": ...}, as XM3600's captions.jsonl has them."""

import re
from pathlib import Path

from common.errors import DataError
from data.text_rows import ENDINGS, first_character, read_json, table_objects

CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
IMAGE = ("image/key", "image_id", "image", "key", "id")  # id is Indonesian, too, where another names the image


def read_languages(file: str) -> dict[str, dict[str, list[str]]]:
    """{language: {image: captions}} of JSON lines, a JSON list, {image: {language: captions}} or a table with a column for each.

    A language's captions are a text, a list of texts, or an object with them as "caption". DataError names what is not so.
    """
    path, of_language = Path(file), {}
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{file}: captions by language are read from JSON, JSON lines, CSV or TSV.")
    if path.suffix.lower() == ".json" and first_character(path) == "{":
        rows = (({"image_id": image, **of_image}, repr(image)) for image, of_image in read_json(path).items())
    else:
        rows = table_objects(path)
    for row, where in rows:
        name = next((column for column in IMAGE if column in row), None)
        if name is None:
            raise DataError(f"{path}, {where}: no image: expected one of {', '.join(IMAGE)}.")
        for language, value in row.items():
            captions = value.get("caption") if isinstance(value, dict) else value
            captions = [captions] if isinstance(captions, str) else captions
            if language != name and CODE.fullmatch(language) and isinstance(captions, list) and captions:
                if not all(isinstance(caption, str) for caption in captions):
                    raise DataError(f"{path}, {where}: the captions in {language} must be texts.")
                of_language.setdefault(language, {})[str(row[name])] = captions
    if not of_language:
        raise DataError(
            f"{path}: no captions by language: expected an object such as {{'image_id': ..., 'de': ..., 'en': ...}}."
        )
    return of_language

"""What is asked about the image of a row, where rows have prompts of their own (common.prompts)."""

import difflib
import re

from common.errors import DataError
from common.prompts import COLUMN, columns_in
from data.columns import CAPTION_COLUMNS, is_missing, usual_name
from data.rows import Options, Row

PROMPTS = "caption_prompts"  # the records' column of prompts, one for each caption, where rows have their own


def filled(prompt: str, columns: dict, where: str) -> str:
    """The prompt with the values of a row in place of its columns; those of a list with commas between them.

    Raises:
        DataError: the row lacks a column, or has nothing in it; `where` names the row.
    """

    def value(match: re.Match) -> str:
        if match[1]:
            return f"{{{match[1]}}}"
        name = match[2].strip()
        if name not in columns:
            near = difflib.get_close_matches(name, map(str, columns), n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Columns: {', '.join(columns) or 'none'}."
            raise DataError(
                f"{where}: no column {name!r}, which the prompt {prompt!r} holds. {hint} Braces that are text are doubled: "
                f"{{{{{name}}}}}"
            )
        parts = columns[name] if isinstance(columns[name], list | tuple) else [columns[name]]
        if any(isinstance(part, dict | list | tuple) for part in parts):
            raise DataError(
                f"{where}: column {name!r}, which the prompt {prompt!r} holds, is no text nor a list of texts"
            )
        text = ", ".join(str(part).strip() for part in parts if not is_missing(part))
        if not text:
            raise DataError(f"{where}: nothing in column {name!r}, which the prompt {prompt!r} holds")
        return text

    return COLUMN.sub(value, prompt)


def prompt_of(row: Row, options: Options) -> str | None:
    """A row's own prompt: the options' one with its columns, else if they say so its conversation's question."""
    if names := columns_in(options.prompt):
        captions = {name for name in filter(None, row.used) if usual_name(name) in CAPTION_COLUMNS}
        if shown := (captions | {options.caption_column}).intersection(names, row.used):
            raise DataError(
                f"{row.where}: the prompt {options.prompt!r} holds column {min(shown)!r}, from which the captions are read: the "
                "model would be told the answer"
            )
        return filled(options.prompt, row.columns, row.where or row.name or "the image")
    return row.question if options.own_questions else None

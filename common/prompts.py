"""Prompts that hold columns, `Describe this {category}. Tags: {tags}`: each image is asked with the values of its own row.

Words in braces that cannot be a column's name, such as JSON's, stay as they are, and {{category}} is the text {category}.
"""

import re

from common.errors import UserError

NAME = r"""[^{}"'\n]*[^{}"'\s][^{}"'\n]*"""
COLUMN = re.compile(rf"\{{\{{({NAME})\}}\}}|\{{({NAME})\}}")  # of group 1 the text, of group 2 the column


def columns_in(prompt: str | None) -> list[str]:
    """The columns that a prompt holds, in its order."""
    return [match[2].strip() for match in COLUMN.finditer(prompt or "") if match[2]]


def plain(prompt: str) -> str:
    """A prompt without columns as it is asked."""
    return COLUMN.sub(lambda match: f"{{{match[1]}}}", prompt)


def template_of(prompt: str | None, column: str | None) -> str | None:
    """--prompt, or the prompt that is one --prompt_column. UserError if both are given, or a prompt cannot name the column."""
    if column is None:
        return prompt
    if prompt is not None:
        raise UserError("--prompt and --prompt_column: give one of them. A prompt holds columns in braces, {column}.")
    if columns_in(f"{{{column}}}") != [column]:
        raise UserError(
            f"--prompt_column {column}: a prompt cannot name it: rename it, without braces, quotes and spaces at its ends."
        )
    return f"{{{column}}}"

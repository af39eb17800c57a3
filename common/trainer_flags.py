"""transformers' training flags, read from its source: importing it would import torch, which takes ten seconds."""

import ast
import builtins
import dataclasses
import enum
import importlib.util
import re
import typing
from importlib.metadata import version
from pathlib import Path

SOURCES = ("trainer_utils.py", "training_args.py", "training_args_seq2seq.py")
CLASSES = ("TrainingArguments", "Seq2SeqTrainingArguments")
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


def trainer_flags() -> type:
    """A dataclass with the fields of the installed transformers' Seq2SeqTrainingArguments (names, types, defaults,
    help), without its methods: what a parser needs. tests/scripts/test_arguments.py compares it with the real class."""
    package = importlib.util.find_spec("transformers")
    if package is None:  # the error of `import transformers`; sagemaker/launch.py runs without it
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    folder = Path(package.origin).parent
    classes = []
    for name in SOURCES:
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (node.name in CLASSES or _is_enum(node)):
                node.body = [statement for statement in node.body if _is_field(statement)]
                node.decorator_list = [ast.Name("dataclass", ast.Load())] if node.name in CLASSES else []
                classes.append(node)
    module = ast.fix_missing_locations(ast.Module(classes, []))
    names = vars(typing) | {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "Path": Path}
    names |= {"ExplicitEnum": enum.Enum("ExplicitEnum", {}, type=str), "Enum": enum.Enum, "__name__": __name__}
    names["is_torch_available"] = lambda: True
    names["trainer_log_levels"] = dict.fromkeys(LOG_LEVELS)
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    names |= {name: _stand_in(name) for name in used - names.keys() - vars(builtins).keys()}
    exec(compile(module, "training flags of transformers", "exec"), names)
    return names[CLASSES[-1]]


def _is_enum(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("Enum") for base in node.bases)


def _is_field(statement: ast.stmt) -> bool:
    """A field, or a class constant that gives one its default, including one that depends on torch's version."""
    if isinstance(statement, ast.If):
        statement.body = [inner for inner in statement.body if _is_field(inner)]
        return bool(statement.body)
    constant = isinstance(statement, ast.Assign) and not ast.unparse(statement.targets[0]).startswith("__")
    return constant or isinstance(statement, ast.AnnAssign)


def _stand_in(name: str):
    """A stand-in for an imported name: whether torch has some version, or a type."""
    if needed := re.fullmatch(r"is_torch_greater_or_equal_than_(\d+)_(\d+)", name):
        return tuple(map(int, version("torch").split(".")[:2])) >= tuple(map(int, needed.groups()))
    return type(name, (str,), {})

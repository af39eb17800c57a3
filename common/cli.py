"""From a command line to the dataclasses of arguments.py, and from a user's mistake to one line.

Values come from the defaults of the dataclasses, then a recipe (`train.py recipes/x.yaml`), then the command line.
"""

import dataclasses
import difflib
import logging
import os
import sys
import traceback
from argparse import SUPPRESS
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub.errors import HfHubHTTPError
from transformers import HfArgumentParser


def parse(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None):
    """Instances of `dataclasses_`, filled from defaults, recipe and command line; exits with 2 and one clear message
    on a user's mistake.

    The first argument may be a recipe: a YAML file of flags. With `positional` ("paths"), arguments that are no flags
    are collected instead, and returned as a last value (list of str).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = f"{positional.upper()} ..." if positional else "[RECIPE.yaml]"
    usage = f"%(prog)s {first} [--flag value ...]    (--help lists the flags)"
    parser = HfArgumentParser(dataclasses_, allow_abbrev=False, usage=usage)
    actions = {action.dest: action for action in reversed(parser._actions)}  # a switch stands before its --no_ twin
    replaced = replaced_flags(dataclasses_)
    for name in replaced:
        actions[name].help = SUPPRESS
    if positional:
        parser.add_argument(positional, nargs="*", help=SUPPRESS)
    elif argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(argv.pop(0), actions, parser, replaced))
    try:
        namespace, unknown = parser.parse_known_args(argv)
        for word in [*argv, *unknown]:
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            if word.startswith("--") and name in replaced:
                raise ValueError(f"--{name} is not used here: {replaced[name]}.")
        if unknown:
            raise ValueError(
                f"{unknown[0]} is no flag.{nearest(unknown[0].lstrip('-').split('=')[0], actions.keys() - replaced.keys())}"
            )
        values = vars(namespace)
        results = []
        for cls in dataclasses_:
            names = {f.name for f in dataclasses.fields(cls) if f.init}
            results.append(cls(**{name: values[name] for name in names}))
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return (*results, getattr(namespace, positional)) if positional else tuple(results)


def replaced_flags(dataclasses_: tuple) -> dict[str, str]:
    """The inherited flags that do nothing here, each with what to do instead."""
    return {name: why for cls in dataclasses_ for name, why in getattr(cls, "REPLACED", {}).items()}


def read_recipe(path: str, actions: dict, parser, replaced: dict[str, str]) -> dict:
    """The flags of a YAML file, checked: known names, right types. Exits with 2 and one message that names the key."""

    def fail(message):
        parser.exit(2, f"{parser.prog}: {path}: {message}\n")

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot be read as a recipe: {error.strerror}. Flags begin with --.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"is not YAML: {error}")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        fail("must hold 'flag: value' lines.")
    checked = {}
    for name, value in recipe.items():
        if name not in actions or name == "help":
            fail(f"'{name}' is no flag.{nearest(str(name), actions.keys() - replaced.keys())}")
        if name in replaced:
            fail(f"'{name}' is not used here: {replaced[name]}.")
        try:
            checked[name] = convert(value, actions[name])
        except (ValueError, TypeError) as error:
            fail(f"{name}: {error}")
    return checked


def convert(value, action):
    """A recipe's value as the flag's own type would read it from the command line."""
    if value is None:
        return None
    if action.nargs == "+":
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        return [action.type(item) for item in value]
    if isinstance(value, dict):
        if not action.dest.endswith(("_kwargs", "_config")) and action.dest not in ("fsdp", "deepspeed"):
            raise ValueError(f"expected one value, got {value!r}")
        return value
    kind = getattr(action.type, "__name__", "")
    is_switch = kind == "string_to_bool"
    kind = {"string_to_bool": "true or false", "str": "text"}.get(kind, kind)
    if isinstance(value, list) or isinstance(value, bool) != is_switch:
        raise ValueError(f"expected {kind}, got {value!r}")
    try:
        converted = value if is_switch else action.type(str(value))
    except (ValueError, TypeError):
        raise ValueError(f"expected {kind}, got {value!r}") from None
    if action.choices and converted not in action.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return converted


def nearest(name: str, known) -> str:
    """A hint at the known name that is most like a misspelt one, or nothing."""
    match = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def run(main) -> None:
    """Runs a script's `main`: logs to stderr, and ends a user's mistake with one message and exit code 2.

    A mistake is a ValueError that our own code raised, or an error of the file system. Anything else is a fault of the
    program, and keeps its traceback.
    """
    rank = int(os.environ.get("RANK", 0))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for client in ("httpx", "httpx2"):  # they log every request
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(lambda record: "requires torchvision" not in record.getMessage())  # it is not needed
    script = Path(sys.argv[0]).name
    try:
        main()
        if torch.distributed.is_initialized():  # leave together: a group that is left open at exit can abort or hang
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except Exception as error:
        if "No space left" in str(error):
            message = f"the disk is full. What was finished before is kept; free some space and start again. ({error})"
        elif isinstance(error, ValueError) and _raised_by_us(error):
            # A loader's worker process hands its error over as a text that holds the whole traceback.
            message = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}."
        elif isinstance(error, ConnectionError | HfHubHTTPError) or type(error).__module__.startswith("http"):
            message = f"the Hub could not be reached, or refused: {error}. What was written before is kept."
        else:
            raise
        print(f"{script}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: stopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


def _raised_by_us(error: BaseException) -> bool:
    if "Original Traceback" in str(error):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent.parent) and "/.venv/" not in last.filename

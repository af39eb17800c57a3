"""From a command line to the dataclasses of arguments.py, and from a user's mistake to a one-line message.

Values come from the defaults of the dataclasses, then a recipe (`train.py recipes/x.yaml`), then the command line.
"""

import contextlib
import dataclasses
import difflib
import gc
import importlib.util
import logging
import math
import multiprocessing
import os
import signal
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from pathlib import Path

import yaml

from common.caches import use_writable_cache
from common.errors import UserError
from common.existence import check_files
from common.text import TextError, read_text

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that Apple's GPUs lack run on the CPU
# The repo does not need torchvision, so do not warn about it. A filter of the logger survives the library's import.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

# Nothing here imports torch or transformers before the arguments are known to be valid: that takes ten seconds.


def parse(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None):
    """Instances of `dataclasses_`, filled from defaults, recipe and command line; exits with 2 and one clear message
    on a user's mistake.

    The first argument may be a recipe: a YAML file of flags. With `positional` ("paths"), arguments that are not flags
    are collected instead, and returned as the last value (list of str); a dataclass's method `check_words` checks them.
    What a dataclass can only do once torch is imported, its method `complete` does: it returns the instance.
    """
    parser, found, words = _read(dataclasses_, argv, positional)
    try:
        found = [values.complete() if hasattr(values, "complete") else values for values in found]
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return (*found, words) if positional else tuple(found)


def check(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None) -> None:
    """Handles --help and mistakes of the command line as `parse` does, but before torch is imported, and what a
    dataclass's method `answer` answers at once. Scripts call it above their other imports."""
    if os.getpid() == 1:  # of a container: the system ignores a SIGTERM there that has no handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):  # Windows has code pages that cannot print every caption
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # logs show at once
    parser, found, _ = _read(dataclasses_, argv, positional)
    with mistakes_in_one_line(parser.prog):
        answers = [group.answer() for group in found if hasattr(group, "answer")]
    if said := next(filter(None, answers), None):
        print(said)
        sys.exit()
    if argv is None:  # a script, whose imports follow: they make many objects that stay, and looking through them again
        gc.disable()  # takes a second. `run` enables it


def _read(dataclasses_: tuple, argv: list[str] | None, positional: str | None):
    """(parser, instances, positional arguments)."""
    here = argv is None  # not the command line of a job elsewhere
    argv = list(sys.argv[1:] if here else argv)
    first = f"{positional.upper()} ..." if positional else "[RECIPE.yaml]"
    usage = f"%(prog)s {first} [--flag value ...]    (--help lists the flags)"
    parser = argument_parser(dataclasses_, usage=usage)
    actions = flags_of(parser)
    replaced = replaced_flags(dataclasses_)
    for name in replaced:
        actions[name].help = SUPPRESS
    for twin in set(parser._actions) - set(actions.values()):  # --no_x, with x's own words and the opposite default
        twin.help = SUPPRESS
    if positional:
        parser.add_argument(positional, nargs="*", help=SUPPRESS)
    elif argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(argv.pop(0), actions, parser, replaced))
    try:
        namespace, unknown = parser.parse_known_args(argv)
        for word in [*argv, *unknown]:
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            if word.startswith("--") and name in replaced:
                raise UserError(f"--{name} is not used here: {replaced[name]}.")
        if unknown:
            raise UserError(unrecognized(unknown[0], actions.keys() - replaced.keys()))
        values, found = vars(namespace), []
        for cls in dataclasses_:
            names = {f.name for f in dataclasses.fields(cls) if f.init}
            for name in names:
                if isinstance(values[name], float) and not math.isfinite(values[name]):
                    raise UserError(f"--{name} {values[name]}: name a finite number.")
            found.append(cls(**{name: values[name] for name in names}))
        words = getattr(namespace, positional) if positional else []
        for group in found:
            if hasattr(group, "check_words"):
                group.check_words(words)
            if here:
                check_files(group)
        use_writable_cache(next((group.output_dir for group in found if hasattr(group, "output_dir")), None))
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return parser, found, words


def argument_parser(dataclasses_: tuple, **options):
    """transformers' parser of dataclasses, loaded from its file: importing the package around it takes seconds."""
    try:
        file = Path(importlib.util.find_spec("transformers").origin).with_name("hf_argparser.py")
        spec = importlib.util.spec_from_file_location("hf_argparser", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        HfArgumentParser = module.HfArgumentParser
    except ImportError:  # a release whose parser needs the package
        from transformers import HfArgumentParser
    return HfArgumentParser(dataclasses_, allow_abbrev=False, formatter_class=Help, **options)


class Help(ArgumentDefaultsHelpFormatter):
    """Tells the default of each flag but those whose words do: they have None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def flags_of(parser) -> dict:
    """The actions of a parser by name; for a switch and its --no_ twin, which comes after it, the switch."""
    return {action.dest: action for action in reversed(parser._actions)}


def replaced_flags(dataclasses_: tuple) -> dict[str, str]:
    """The inherited flags that do nothing here, each with what to do instead."""
    return {name: why for cls in dataclasses_ for name, why in getattr(cls, "REPLACED", {}).items()}


def read_recipe(path: str, actions: dict, parser, replaced: dict[str, str]) -> dict:
    """The flags of a YAML file, checked: known names, right types. Exits with 2 and one message that names the key."""

    def fail(message):
        parser.exit(2, f"{parser.prog}: {path}: {message}\n")

    try:
        recipe = yaml.safe_load(read_text(path))
    except OSError as error:
        fail(f"cannot be read as a recipe: {error.strerror}. Flags begin with --.{nearest_recipe(path)}")
    except (yaml.YAMLError, TextError) as error:
        fail(f"is not YAML: {error}")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        fail("must hold 'flag: value' lines.")
    checked = {}
    for name, value in recipe.items():
        if name not in actions or name == "help":
            fail(unrecognized(str(name), actions.keys() - replaced.keys()))
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
            raise UserError(f"expected a list, got {value!r}")
        return [action.type(item) for item in value]
    if isinstance(value, dict):
        if not action.dest.endswith(("_kwargs", "_config")):
            raise UserError(f"expected one value, got {value!r}")
        return value
    if isinstance(value, bool) and action.const == "true":  # a third value is possible: auto
        return str(value).lower()
    kind = getattr(action.type, "__name__", "")
    is_switch = kind == "string_to_bool"
    kind = {"string_to_bool": "true or false", "str": "text"}.get(kind, kind)
    if isinstance(value, list) or isinstance(value, bool) != is_switch:
        raise UserError(f"expected {kind}, got {value!r}")
    try:
        converted = value if is_switch else action.type(str(value))
    except (ValueError, TypeError):
        raise UserError(f"expected {kind}, got {value!r}") from None
    if action.choices and converted not in action.choices:
        raise UserError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return converted


def unrecognized(word: str, known) -> str:
    """The message about `word`, a flag or a recipe's key, that is not one of the `known` names."""
    return f"unrecognized argument: {word}.{nearest(word, known, '--' if word.startswith('-') else '')}"


def nearest(name: str, known, dashes: str = "") -> str:
    """A hint with the known name closest to a misspelt one, or nothing."""
    name = name.lstrip("-").split("=")[0].replace("-", "_")
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {dashes}{match[0]}?" if match else ""


def nearest_recipe(path: str) -> str:
    """A hint with the recipe of this repo whose path is most alike, or nothing."""
    root = Path(__file__).resolve().parents[1]
    known = [
        file.relative_to(root).as_posix() for file in root.glob("recipes/*/*.yaml") if file.parent.name != "accelerate"
    ]
    match = difflib.get_close_matches(path.replace("\\", "/"), known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


def run(main) -> None:
    """Runs a script's `main`: logs to stderr, and turns a user's mistake into one message and exit code 2."""
    import torch
    import transformers

    from common.limits import cpus

    gc.freeze()  # what was imported stays
    gc.enable()
    rank = int(os.environ.get("RANK", 0))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for client in ("httpx", "httpx2"):  # they log every request
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    with mistakes_in_one_line(Path(sys.argv[0]).name):
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # leave together: a group that is left open at exit can abort or hang
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def mistakes_in_one_line(script: str):
    """Ends the process with exit code 2 and one message of `script` at a user's mistake: a UserError, or an error of the
    file system or of the network. Anything else is a bug, and keeps its traceback."""
    try:
        yield
    except Exception as error:
        from huggingface_hub.errors import HfHubHTTPError

        if "No space left" in str(error):
            message = f"the disk is full. What was finished before is kept; free some space and start again. ({error})"
        elif isinstance(error, UserError):
            # A DataLoader worker passes on its error as a text that ends with the traceback's last line.
            text = str(error).strip()
            message = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
        elif isinstance(error, PermissionError) and error.filename and ".cache" in str(error.filename):
            message = f"{error.filename}: {error.strerror}. Set HF_HOME to a folder that can be written to."
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}."
        elif isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):  # timed out, or worker killed
            for child in multiprocessing.active_children():  # a stopped one would block the exit
                child.kill()
            message = (
                f"{str(error).splitlines()[0]} A DataLoader worker has died or hangs: check whether memory ran out "
                "(dmesg), or pass --dataloader_num_workers 0. What was finished before is kept."
            )
        elif isinstance(error, ConnectionError | HfHubHTTPError) or type(error).__module__.startswith("http"):
            message = f"the Hub could not be reached, or refused the request: {error}. What was written before is kept."
        else:
            raise
        print(f"{script}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: stopped. What was finished is kept; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)

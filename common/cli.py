"""From a command line to the dataclasses of arguments.py, and from a user's mistake to a one-line message.

Values come from the defaults of the dataclasses, then a recipe (`train.py recipes/x.yaml`), then the command line.
"""

import contextlib
import gc
import importlib.util
import logging
import math
import multiprocessing
import os
import signal
import sys
import urllib.parse
import urllib.request
from argparse import SUPPRESS
from pathlib import Path

import yaml

from common import logs
from common.caches import use_writable_cache
from common.errors import UserError, message_of
from common.existence import check_files, exists
from common.habits import nearest, unrecognized
from common.help import Help, arrange
from common.text import TextError, each_value, read_text

ROOT = Path(__file__).resolve().parents[1]
RESUMES = "What was finished is kept; run the same command again to resume."

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that Apple's GPUs lack run on the CPU
# The repo does not need torchvision, so do not warn about it. A filter of the logger survives the library's import.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

# Nothing here imports torch or transformers before the arguments are known to be valid: that takes ten seconds.


def parse(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None):
    """Instances of `dataclasses_`, filled from defaults, recipe and command line; exits with 2 and one clear message
    on a user's mistake.

    The first argument may be a recipe, a YAML file of flags, and the next one, or the first, a data set (or where there is
    no such flag a model). With `positional` ("paths"), arguments that are not flags are collected instead, and returned
    as the last value (list of str). The dataclasses are common.flags.Flags.
    """
    parser, found, words = _read(dataclasses_, argv, positional)
    with _exits_at_mistakes(parser):
        found = [group.complete() for group in found]
    return (*found, words) if positional else tuple(found)


def check(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None) -> None:
    """Handles --help and mistakes of the command line as `parse` does, but before torch is imported, and what a
    dataclass's method `answer` answers at once. Scripts call it above their other imports."""
    if os.getpid() == 1:  # of a container: the system ignores a SIGTERM there that has no handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.excepthook = quiet_interrupt  # during the imports
    for stream in (sys.stdout, sys.stderr):  # Windows has code pages that cannot print every caption
        with contextlib.suppress(AttributeError):  # what a notebook has put in their place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # logs show at once
    parser, found, _ = _read(dataclasses_, argv, positional)
    with mistakes_in_one_line(parser.prog):
        answers = [group.answer() for group in found]
    if answer := next(filter(None, answers), None):
        text, code = answer
        print(text)
        sys.exit(code)
    if argv is None:  # a script, whose imports follow: they make many objects that stay, and looking through them again
        gc.disable()  # takes a second. `run` enables it


def quiet_interrupt(kind, error, trace) -> None:
    """Ctrl-C that nothing has caught is one line."""
    if issubclass(kind, KeyboardInterrupt):
        logs.say(f"{Path(sys.argv[0]).name}: stopped before it began.")
    else:
        sys.__excepthook__(kind, error, trace)


def _read(dataclasses_: tuple, argv: list[str] | None, positional: str | None):
    """(parser, instances, positional arguments)."""
    here = argv is None  # not the command line of a job elsewhere
    argv = list(sys.argv[1:] if here else argv)
    parser = argument_parser(dataclasses_)
    actions, replaced = flags_of(parser), replaced_flags(dataclasses_)
    subject = "dataset_name" if "dataset_name" in actions else "model_name_or_path"
    first = (positional or subject.partition("_")[0]).upper()
    named = f"{first} ..." if positional else f"[RECIPE.yaml] [{first}]"
    parser.usage = f"%(prog)s {named} [--flag value ...]    (--help lists the flags)"
    twins = set(parser._actions) - set(actions.values())  # --no_x, with x's own words and the opposite default
    for action in (*twins, *map(actions.get, replaced)):
        action.help = SUPPRESS
    arrange(parser, dataclasses_)
    with _exits_at_mistakes(parser):
        if positional:
            parser.add_argument(positional, nargs="*", help=SUPPRESS)
            namespace, unknown = parser.parse_known_args(argv)
        else:
            namespace, unknown = _parse_named(parser, argv, subject, dataclasses_)
        for word in argv:
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            if word.startswith("--") and name in replaced:
                raise UserError(f"--{name} is not used here: {replaced[name]}.")
        if unknown:
            raise UserError(unrecognized(unknown[0], {*actions, first} - replaced.keys()))
        values = each_value(vars(namespace), checked)
        found, words = parser.parse_dict(values, allow_extra_keys=True), values.get(positional, [])
        for group in found:
            group.check_words(words)
            if here:
                check_files(group)
        use_writable_cache(values.get("output_dir"))
    if here:
        logs.log_format = values["log_format"]
    return parser, found, words


def _parse_named(parser, argv: list[str], subject: str, dataclasses_: tuple) -> tuple:
    """(namespace, unknown words) of a command line that may begin with a recipe, and with the value of the flag `subject`."""
    if argv and argv[0].lower().endswith((".yaml", ".yml")):
        values = read_recipe(argv.pop(0), flags_of(parser), replaced_flags(dataclasses_))
        paths = [name for cls in dataclasses_ for name in (*cls.FILES, *cls.HUB) if values.get(name)]
        parser.set_defaults(**values | {name: in_the_repo(values[name]) for name in paths})
    if not argv or argv[0].startswith("-"):
        return parser.parse_known_args(argv)
    name = argv.pop(0)
    if not (os.path.isabs(name) or exists(local(name), hub=True)):
        raise UserError(f"{name}: no such file or folder. Flags begin with --.{nearest_recipe(name)}")
    namespace, unknown = parser.parse_known_args([f"--{subject}={name}", *argv])
    if getattr(namespace, subject) != name:
        raise UserError(f"{name} and --{subject} {getattr(namespace, subject)} name two: leave one of them out.")
    return namespace, unknown


@contextlib.contextmanager
def _exits_at_mistakes(parser):
    """Ends the process with one message where values of flags are wrong, or need a package that is not installed."""
    try:
        yield
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def in_the_repo(path: str) -> str:
    """A path that a recipe names, wherever the script is started: in this repo, if there is none in the working folder."""
    in_repo = ROOT / path
    return str(in_repo) if not os.path.exists(os.path.expanduser(path)) and in_repo.exists() else path


def checked(value, name: str):
    """The value of a flag, `local`. UserError for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value}: name a finite number.")
    return local(value)


def local(value):
    """A file:// address as the path that it is; any other value as it is."""
    if isinstance(value, str) and value.startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(value).path)
    return value


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


def flags_of(parser) -> dict:
    """The actions of a parser by name; for a switch and its --no_ twin, which comes after it, the switch."""
    return {action.dest: action for action in reversed(parser._actions)}


def replaced_flags(dataclasses_: tuple) -> dict[str, str]:
    """The inherited flags that do nothing here, each with what to do instead."""
    return {name: why for cls in dataclasses_ for name, why in cls.REPLACED.items()}


def read_recipe(path: str, actions: dict, replaced: dict[str, str]) -> dict:
    """The flags of a YAML file, checked: known names, right types. UserError that names the file and the key."""
    try:
        recipe = yaml.safe_load(read_text(path)) or {}
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a recipe: {error.strerror}. Flags begin with --.{nearest_recipe(path)}"
        ) from None
    except (yaml.YAMLError, TextError) as error:
        raise UserError(f"{path}: is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: must hold 'flag: value' lines.")
    checked = {}
    for name, value in recipe.items():
        if name not in actions or name == "help":
            raise UserError(f"{path}: {unrecognized(str(name), actions.keys() - replaced.keys())}")
        if name in replaced:
            raise UserError(f"{path}: '{name}' is not used here: {replaced[name]}.")
        try:
            checked[name] = convert(value, actions[name])
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {name}: {error}") from None
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


def nearest_recipe(path: str) -> str:
    """A hint with the recipe of this repo whose path is most alike, or nothing."""
    recipes = [file for file in ROOT.glob("recipes/*/*.yaml") if file.parent.name != "accelerate"]
    return nearest(path.replace("\\", "/"), [file.relative_to(ROOT).as_posix() for file in recipes])


def run(main, when_stopped: str = RESUMES) -> None:
    """Runs a script's `main`: logs to stderr, and ends with the exit codes of docs/operations.md. `when_stopped`: what its
    last line says after Ctrl-C."""
    import torch

    from common.limits import cpus

    gc.freeze()  # what was imported stays
    gc.enable()
    # Of processes that torchrun started the first one speaks; those of a job array have a log each.
    first = os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ
    logs.set_up(logging.INFO if first else logging.WARNING)
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    with mistakes_in_one_line(Path(sys.argv[0]).name, when_stopped):
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # leave together: a group that is left open at exit can abort or hang
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def mistakes_in_one_line(script: str, when_stopped: str = RESUMES):
    """Ends the process with one message of `script` at a user's mistake: a UserError, or an error of the file system or of
    the network. Anything else is a bug, and keeps its traceback."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "exit_code", 2)
        from huggingface_hub.errors import HfHubHTTPError

        if "No space left" in str(error):
            message = f"the disk is full. What was finished before is kept; free some space and start again. ({error})"
        elif isinstance(error, UserError):
            message = message_of(error)
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}."
        elif isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):  # timed out, or worker killed
            code = 1
            for child in multiprocessing.active_children():  # a stopped one would block the exit
                child.kill()
            message = (
                f"{str(error).splitlines()[0]} A DataLoader worker has died or hangs: check whether memory ran out "
                "(dmesg), or pass --dataloader_num_workers 0. What was finished before is kept."
            )
        elif isinstance(error, ConnectionError | HfHubHTTPError) or type(error).__module__.startswith("http"):
            code, message = (
                1,
                f"the Hub could not be reached, or refused the request: {str(error).rstrip('.')}. What was written before is kept.",
            )
        else:
            raise
        logs.say(f"{script}: {message}")
        sys.exit(code)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)  # training.signals says which one it was
        logs.say(f"{script}: stopped. {when_stopped}".rstrip())
        sys.exit(128 + number)

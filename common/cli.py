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
import urllib.parse
import urllib.request
from argparse import SUPPRESS
from pathlib import Path

import yaml

from common import logs
from common.caches import use_writable_cache
from common.errors import UserError
from common.existence import check_files, exists, may_be_on_hub
from common.habits import unrecognized
from common.help import Help, arrange
from common.text import TextError, read_text

ROOT = Path(__file__).resolve().parents[1]
STOPPED = "stopped. What was finished is kept; run the same command again to resume."

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
    try:
        found = [group.complete() for group in found]
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return (*found, words) if positional else tuple(found)


def check(dataclasses_: tuple, argv: list[str] | None = None, *, positional: str | None = None) -> None:
    """Handles --help and mistakes of the command line as `parse` does, but before torch is imported, and what a
    dataclass's method `answer` answers at once. Scripts call it above their other imports."""
    if os.getpid() == 1:  # of a container: the system ignores a SIGTERM there that has no handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.excepthook = quiet_interrupt  # during the imports
    for stream in (sys.stdout, sys.stderr):  # Windows has code pages that cannot print every caption
        if hasattr(stream, "reconfigure"):
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
    actions = flags_of(parser)
    subject = next((name for name in ("dataset_name", "model_name_or_path") if name in actions), None)
    name = f" [{subject.partition('_')[0].upper()}]" if subject else ""
    first = f"{positional.upper()} ..." if positional else f"[RECIPE.yaml]{name}"
    parser.usage = f"%(prog)s {first} [--flag value ...]    (--help lists the flags)"
    replaced = replaced_flags(dataclasses_)
    for name in replaced:
        actions[name].help = SUPPRESS
    for twin in set(parser._actions) - set(actions.values()):  # --no_x, with x's own words and the opposite default
        twin.help = SUPPRESS
    arrange(parser, dataclasses_)
    if positional:
        parser.add_argument(positional, nargs="*", help=SUPPRESS)
    named = None
    try:
        if not positional:
            named, values = _named_first(argv, subject, dataclasses_, actions, parser, replaced)
            parser.set_defaults(**values)
        namespace, unknown = parser.parse_known_args(argv)
        if named and named != getattr(namespace, subject):
            raise UserError(f"{named} and --{subject} {getattr(namespace, subject)} name two: leave one of them out.")
        for word in [*argv, *unknown]:
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            if word.startswith("--") and name in replaced:
                raise UserError(f"--{name} is not used here: {replaced[name]}.")
        if unknown:
            known = actions.keys() - replaced.keys() | ({positional.upper()} if positional else set())
            raise UserError(unrecognized(unknown[0], known))
        values, found = {name: local(value) for name, value in vars(namespace).items()}, []
        for cls in dataclasses_:
            names = {f.name for f in dataclasses.fields(cls) if f.init}
            for name in names:
                if isinstance(values[name], float) and not math.isfinite(values[name]):
                    raise UserError(f"--{name} {values[name]}: name a finite number.")
            found.append(cls(**{name: values[name] for name in names}))
        words = values[positional] if positional else []
        for group in found:
            group.check_words(words)
            if here:
                check_files(group)
        use_writable_cache(next((group.output_dir for group in found if hasattr(group, "output_dir")), None))
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if here:
        logs.log_format = values["log_format"]
    return parser, found, words


def _named_first(argv: list[str], subject: str, dataclasses_, actions: dict, parser, replaced: dict):
    """Takes from `argv` the recipe and the data set that it begins with. Returns (data set or None, values of flags)."""
    name, values = None, {}
    if argv and argv[0].lower().endswith((".yaml", ".yml")):
        values = read_recipe(argv.pop(0), actions, parser, replaced)
        paths = [name for cls in dataclasses_ for name in (*cls.FILES, *cls.HUB)]
        values |= {name: in_the_repo(values[name]) for name in paths if values.get(name)}
    if subject and argv and not argv[0].startswith("-"):
        name = argv.pop(0)
        if not (os.path.isabs(name) or exists(local(name)) or may_be_on_hub(name)):
            raise UserError(f"{name}: no such file or folder. Flags begin with --.{nearest_recipe(name)}")
        values[subject] = name
    return name, values


def in_the_repo(path: str) -> str:
    """A path that a recipe names, wherever the script is started: in this repo, if there is none in the working folder."""
    in_repo = ROOT / path
    return str(in_repo) if not os.path.exists(os.path.expanduser(path)) and in_repo.exists() else path


def local(value):
    """file:// addresses, alone or in a list, as the paths that they are."""
    if isinstance(value, list):
        return [local(item) for item in value]
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


def nearest_recipe(path: str) -> str:
    """A hint with the recipe of this repo whose path is most alike, or nothing."""
    known = [
        file.relative_to(ROOT).as_posix() for file in ROOT.glob("recipes/*/*.yaml") if file.parent.name != "accelerate"
    ]
    match = difflib.get_close_matches(path.replace("\\", "/"), known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


def run(main) -> None:
    """Runs a script's `main`: logs to stderr, and ends with the exit codes of docs/operations.md."""
    import torch

    from common.limits import cpus

    gc.freeze()  # what was imported stays
    gc.enable()
    # Of processes that torchrun started the first one speaks; those of a job array have a log each.
    first = os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ
    logs.set_up(logging.INFO if first else logging.WARNING)
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    with mistakes_in_one_line(Path(sys.argv[0]).name):
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # leave together: a group that is left open at exit can abort or hang
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def mistakes_in_one_line(script: str):
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
            # A DataLoader worker passes on its error as a text that ends with the traceback's last line.
            text = str(error).strip()
            message = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
        elif isinstance(error, PermissionError) and error.filename and ".cache" in str(error.filename):
            message = f"{error.filename}: {error.strerror}. Set HF_HOME to a folder that can be written to."
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
        logs.say(f"{script}: {STOPPED}")
        sys.exit(128 + number)

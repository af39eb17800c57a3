"""Lines of a log: with date and level, or as JSON; in a terminal never glued to a progress bar."""

import contextlib
import functools
import json
import logging
import sys
import time
import warnings

# What libraries warn of and nobody who runs a script can act on.
NOISE = ("mtime may not be reliable", "torchvision", "unauthenticated requests")
TERMINAL_LINE = "\r\033[K"  # over what a bar has drawn
log_format = "text"  # that of this process, from --log_format


class JsonLines(logging.Formatter):
    def format(self, record) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{seconds}.{record.msecs:03.0f}Z", "level": record.levelname, "logger": record.name}
        line |= {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class Lines(logging.StreamHandler):
    def emit(self, record) -> None:
        if not any(noise in record.getMessage() for noise in NOISE):
            self.stream = sys.stderr  # that of now: a notebook or a test may have replaced it
            if self.stream.isatty():
                self.stream.write(TERMINAL_LINE)
            super().emit(record)


def set_up(level: int) -> None:
    """Sends this process's logs, and those of its libraries, to stderr."""
    import datasets
    import transformers

    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    handler = Lines(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else formatter)
    root = logging.getLogger()
    root.handlers = [*(other for other in root.handlers if not isinstance(other, Lines)), handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for about in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):  # for programmers
        warnings.simplefilter("ignore", about)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for chatty in ("httpx", "httpx2", "matplotlib"):  # they log every request, and that fonts were looked for
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself


@functools.cache
def say_once(logger: logging.Logger, message: str, *values) -> None:
    """A warning that would be said for each file, image or reading."""
    logger.warning(message, *values)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def clear_bars() -> None:
    """Removes progress bars, which would be drawn once more below the last line."""
    with contextlib.suppress(ImportError, AttributeError):
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.leave = False
            bar.close()


def say(line: str) -> None:
    """The last line of a script."""
    clear_bars()
    print(f"{TERMINAL_LINE if sys.stderr.isatty() else ''}{line}", file=sys.stderr, flush=True)

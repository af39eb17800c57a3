"""This process among others, its threads, and what people see of long work."""

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from accelerate import PartialState
from tqdm import tqdm


def processes(patience: timedelta | None = None) -> PartialState:
    """This process among those that torchrun or accelerate launch started; joins them on its first call, which also
    says how long one waits for another (default: torch's, 10 to 30 minutes)."""
    return PartialState(cpu=not torch.accelerator.is_available(), **({"timeout": patience} if patience else {}))


def show_progress(items, total: int, doing: str = "captioning"):
    """A bar for people, or for a log file a line every half minute; on the main process only."""
    return tqdm(
        items,
        total=total,
        desc=doing,
        disable=not processes().is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        leave=False,
    )


def in_threads(function, items) -> list:
    """`[function(item) for item in items]` on as many threads as torch has: Pillow and numpy let go of the interpreter
    while they decode and resize. In a loader's worker process that is one."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))

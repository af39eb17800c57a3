"""This process among others, its threads and memory, and progress bars."""

import ctypes
import itertools
import logging
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from tqdm import tqdm

from common.errors import UserError
from common.limits import cpus, free_memory

logger = logging.getLogger(__name__)
PAUSE = 30  # seconds between two lines of progress
CPUINFO = Path("/proc/cpuinfo")
# Variables of MPI's launchers, srun among them, which are also set around a script that is started alone.
OF_MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def processes() -> PartialState:
    """This process among those that torchrun or accelerate launch started; joins them on its first call."""
    check_gpus()
    return PartialState(cpu=not on_accelerator())


def check_gpus() -> None:
    """UserError if more processes were started here than there are GPUs: two cannot share one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    gpus = torch.accelerator.device_count() if on_accelerator() else here
    if here > max(1, gpus):
        raise UserError(f"{here} processes were started, and this machine has GPUs for {gpus}. Start one for each GPU.")


def own_share() -> tuple[int, int]:
    """(number, count) of this process among those that were started together, for independent work: it does not join
    them, so that none waits for another, and runs on the GPU of its own number."""
    for name in [name for name in os.environ if name.startswith(OF_MPI)]:  # accelerate would join by them
        del os.environ[name]
    number, count, local = (int(os.environ.pop(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if on_accelerator():
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    return number, count


def on_accelerator() -> bool:
    """Whether this process runs on a GPU: there is one, and the CPU was not asked for."""
    return torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def use_device(name: str) -> None:
    """Run on "cpu", "cuda" or "mps" from here on. UserError if this machine does not have it."""
    devices = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]
    if name not in devices:
        raise UserError(f"--device {name}: torch finds none on this machine. It can run on: {', '.join(devices)}.")
    os.environ["ACCELERATE_USE_CPU"] = str(name == "cpu").lower()


def captions_in_bfloat16(device: torch.device) -> bool:
    """The precision of captions in every script, where --bf16 is not given: bfloat16 on GPUs that have it, float32 on every
    other device, so that all processors write the same captions of a model."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def keep_memory() -> None:
    """Make glibc keep freed buffers for reuse, whatever their size. By default those of more than 32 MiB go back to the
    system and are faulted in again: a twentieth of captioning's time on a CPU. Without glibc does nothing."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def default_workers() -> int:
    """DataLoader workers for one process with a GPU. Without a GPU they would take the model's own cores."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, cpus() // processes_here)) if torch.cuda.is_available() and on_accelerator() else 0


def fork_rng(device: torch.device):
    """A context that leaves the random states of the CPU and of `device` as they were before it."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def peak_memory() -> int:
    """Peak memory of this process, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_memory(device: torch.device) -> int:
    """Bytes of memory of this process's GPU, or else its share of the machine's free memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def show_progress(items, total: int | None, doing: str = "captioning"):
    """Yields `items` with a progress bar, or without a terminal with a line in the log every half minute; on the main process
    only."""
    quiet = os.environ.get("RANK", "0") != "0"
    return (
        _with_lines(items, total, doing, quiet)
        if quiet or not sys.stderr.isatty()
        else tqdm(items, total=total, desc=doing, mininterval=0.1, leave=False)
    )


def _with_lines(items, total: int | None, doing: str, quiet: bool):
    began = said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if not quiet and (now := time.monotonic()) - said > PAUSE:
            said, of = now, f" of {total:,}" if total else ""
            logger.info("%s: %s%s, %.1f per second", doing, f"{number:,}", of, number / (now - began))


def in_threads(function, items, threads: int | None = None, progress: str | None = None) -> list:
    """`[function(item) for item in items]` on several threads: Pillow and numpy release the GIL while they decode and
    resize. Default: as many as torch has, which is one in a DataLoader worker. `progress` names a progress bar."""
    threads = max(1, min(threads or torch.get_num_threads(), len(items)))
    size = max(1, min(256, len(items) // (4 * threads)))  # a future per item would cost more than most items do
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(threads) as pool:
        work = pool.map if threads > 1 else map
        results = itertools.chain.from_iterable(work(lambda piece: [*map(function, piece)], pieces))
        return list(show_progress(results, len(items), progress) if progress else results)

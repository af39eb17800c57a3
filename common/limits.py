"""How many processors and how much memory this process may use: the machine's, or a container's if that is less."""

import os
import re
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def cpus() -> int:
    """Processors that this process may use, at least 1: its affinity, and a CPU quota of its cgroup rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu"):
        limit = _read(folder / "cpu.max")  # version 2: "max 100000", "150000 100000"
        limit = limit or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"  # 1: -1 is none
        if match := re.fullmatch(r"(\d+) ([1-9]\d*)", limit):
            count = min(count, -(-int(match[1]) // int(match[2])))
    return max(1, count)


def free_memory() -> int:
    """Bytes of free memory: the machine's, or less if a cgroup's limit leaves less. File cache counts as free."""
    free = psutil.virtual_memory().available
    for folder in _cgroups("memory"):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if not limit:
            limit, used = _read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            statistics = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE))
            cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            free = min(free, int(limit) - int(used) + cache)
    return max(0, free)


def free_shared_memory() -> int | None:
    """Bytes that processes can still pass to each other, or None where only the memory itself limits that."""
    try:
        space = os.statvfs("/dev/shm")
    except (AttributeError, OSError):  # Windows, macOS
        return None
    return space.f_bavail * space.f_frsize


def _cgroups(controller: str) -> list[Path]:
    """Folders of this process's cgroup and its parents, of version 2 and of version 1's `controller`."""
    folders = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        inside = root / path.strip("/")  # not there in a container that sees its own cgroup as the root
        folders += [folder for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return list(dict.fromkeys([*folders, CGROUPS, CGROUPS / controller]))


def _read(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""

"""Where a number comes from: versions, hardware, commit and command of this process."""

import contextlib
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from common.limits import cpus
from common.text import each_value

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch", "transformers", "datasets", "accelerate", "peft", "sacrebleu", "pycocoevalcap", "pillow", "numpy"]


def environment() -> dict:
    """Versions, hardware, commit and command of this process."""

    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus = [f"{_cpu_name()} GPU (MPS)"]
    commit = _git("rev-parse", "HEAD")
    # A benchmark that writes several results does not make the later ones "uncommitted".
    if commit and _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results"):
        commit += " with uncommitted changes"
    return {
        "command": shlex.join(["python", *map(_shown, sys.orig_argv, sys.orig_argv[1:])]),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),  # a virtual machine may hide some of its processor's
            "cores": cpus(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "versions": versions,
    }


def _git(*words: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", ROOT, *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)


SECRET = r"(?:token|secret|password|passwd|credentials?|authorization|(?:api|access|private|auth|q)?_?key)"

SECRET_FLAG = re.compile(rf"--\w*{SECRET}(?<!kms_key)")


def _shown(before: str, word: str) -> str:
    """A word of a command line, which is a secret where the one before it is such a flag."""
    return "***" if SECRET_FLAG.fullmatch(before) else without_secrets(word)


def without_secrets(text: str) -> str:
    """A text without passwords and keys: of addresses (//user:password@, ?key=...), of JSON ("api_key": "...") and of
    flags (--hub_token=...)."""
    text = re.sub(r"(?<=//)[^/@\s]+@", "***@", text)
    text = re.sub(rf'("[^"]*{SECRET}"\s*:\s*)"[^"]*"', r'\1"***"', text, flags=re.IGNORECASE)
    return re.sub(rf"((?:^|[?&\W_]){SECRET}=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


def hide_secrets(value):
    """A value of JSON with `without_secrets` for each of its texts."""
    return each_value(value, lambda inner, _: without_secrets(inner) if isinstance(inner, str) else inner)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if name := re.search(r"^model name\s*: (.+)", cpuinfo, re.MULTILINE):
            return name[1].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS: "Apple M2 Pro"
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()
    return platform.processor() or platform.machine()

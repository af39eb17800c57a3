"""A script that is started without its packages, or by an old Python, says in one line how to get them."""

import importlib.util
import os
import sys

NEEDED = ("yaml", "torch", "transformers", "datasets", "accelerate", "peft", "psutil")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WINDOWS, OTHERS = ("Scripts", "python.exe", "py"), ("bin", "python", "python3")
FOLDER, PROGRAM, LAUNCHER = WINDOWS if os.name == "nt" else OTHERS


def check_packages() -> None:
    """Ends the process with exit code 2 if one of the scripts cannot run with this Python. Needs the standard library only."""
    folder, script = os.path.split(os.path.abspath(sys.argv[0]))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if folder != ROOT or (sys.version_info >= (3, 11) and not missing):
        return
    problem = "no " + " and no ".join(missing[:2]) if missing else "Python 3.11 or newer is needed"
    venv = os.path.join(ROOT, ".venv")
    program = os.path.join(venv, FOLDER, PROGRAM)
    pip, python = (os.path.join(".venv", FOLDER, name) for name in ("pip", "python"))
    built = os.path.exists(program) and os.path.realpath(sys.prefix) != os.path.realpath(venv)
    first = f"Try {os.path.relpath(program)} {sys.argv[0]}, or install: " if built else "Install: "
    print(
        f"{script}: {problem} ({sys.executable} is Python {sys.version.split()[0]}). {first}in {ROOT} make install, or "
        f"{LAUNCHER} -m venv .venv and {pip} install -r requirements.txt -c constraints.txt; then {python} {script} ...",
        file=sys.stderr,
    )
    sys.exit(2)

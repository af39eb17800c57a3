"""How many small faults the tests notice, room by room: a seeded sample of cosmic-ray's mutants.

    python -m venv ENV && ENV/bin/pip install cosmic-ray
    python -m benchmarks.quality.mutation --cosmic_ray ENV/bin/cosmic-ray [--number 43] [--rooms data jobs] [--hours 8]

Of each room --number places are drawn, and of each place one mutant (a comparison, number, operator, condition or loop that is
another one). It is applied to a copy of the committed tree, and the tests that import the module run there, then the room's
others, up to the first that fails, or until three times their usual time is over: then the mutant is noticed. A mutant that
passes is listed with its difference, to be read. `|` is left alone: it is mostly in annotations, which do nothing.

Writes benchmarks/results/mutation.json after every mutant; with the same --seed a stopped run goes on. Rooms that are not named
stay as they are in the file.
"""

import argparse
import contextlib
import difflib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from common.files import write_json
from common.provenance import environment

FILE = RESULTS / "mutation.json"
ROOMS = {  # a room's modules, and the tests that follow those that import the module
    "collator": (["collator.py"], ["models/test_collator.py", "training/test_lengths.py", "models/test_pixels.py"]),
    "captioner": (
        ["captioner.py"],
        [
            "models/test_collator.py",
            "reports/test_sweep.py",
            "scripts/test_evaluate.py",
            "scripts/test_own_settings.py",
        ],
    ),
    "objectives": (["objectives"], ["objectives", "models/test_collator.py"]),
    "training": (["training"], ["training", "scripts/test_train.py"]),
    "data": (["data"], ["data", "scripts/test_seen_images.py"]),
    "metrics": (["metrics"], ["metrics", "scripts/test_evaluate.py"]),
    "jobs": (["jobs"], ["scripts/test_infer.py", "scripts/test_scale.py", "rewriting"]),
}
LEFT_ALONE = re.compile("_BitOr_|BitOr_")


def modules_of(room: str) -> list[str]:
    """Paths below the root."""
    paths = [
        path for name in ROOMS[room][0] for path in ((ROOT / name).rglob("*.py") if "." not in name else [ROOT / name])
    ]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def tests_of(room: str, module: str) -> list[str]:
    """The test files for a mutant of `module`: those that import it, the smallest first, then the room's. Tests of scripts
    take minutes: only the room's own are among them."""
    name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package, _, last = name.rpartition(".")
    imports = re.compile(
        rf"^\s*(from {re.escape(name)} import|import {re.escape(name)}\b|from {package or name} import .*\b{last}\b)",
        re.M,
    )
    listed = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name not in ("scripts", "sagemaker")]
    files = sorted(listed, key=lambda path: path.stat().st_size)
    own = [file for file in files if imports.search(file.read_text(encoding="utf-8"))]
    others = [ROOT / "tests" / name for name in ROOMS[room][1]]
    more = [file for other in others for file in (sorted(other.glob("test_*.py")) if other.is_dir() else [other])]
    return [file.relative_to(ROOT).as_posix() for file in dict.fromkeys([*own, *more])]


def mutants_of(room: str, cosmic_ray: str, folder: Path, number: int, seed: int) -> list[dict]:
    """{"module", "line", "operator", "occurrence"} of the room's sample, drawn over places, not over mutants: an addition has
    eleven of them. Also how many places there are."""
    config = folder / f"{room}.toml"
    modules = json.dumps(modules_of(room))
    config.write_text(
        f'[cosmic-ray]\nmodule-path = {modules}\ntimeout = 1\nexcluded-modules = []\ntest-command = "true"\n'
        '[cosmic-ray.distributor]\nname = "local"\n',
        encoding="utf-8",
    )
    subprocess.run([cosmic_ray, "init", config, f"{config}.sqlite"], cwd=ROOT, check=True)
    columns = "module_path, start_pos_row, start_pos_col, operator_name, occurrence"
    with contextlib.closing(sqlite3.connect(f"{config}.sqlite")) as session:
        rows = session.execute(f"SELECT {columns} FROM mutation_specs ORDER BY {columns}").fetchall()
    places: dict[tuple, list] = {}
    for module, line, column, operator, occurrence in rows:
        if not LEFT_ALONE.search(operator):
            mutant = {"room": room, "module": module, "line": line, "operator": operator, "occurrence": occurrence}
            places.setdefault((module, line, column), []).append(mutant)
    rng = random.Random(f"{seed} {room}")
    return [rng.choice(places[place]) for place in rng.sample(sorted(places), min(number, len(places)))]


def passes(tree: Path, tests: list[str], seconds: float) -> bool | None:
    """Whether the tests pass in `tree`; None if time is over before they end."""
    families = os.environ.get("CAPTION_TEST_FAMILIES", "blip git blip2-opt blip2-t5 llava vit-gpt2")
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CAPTION_TEST_FAMILIES": families}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=tree, env={**os.environ, **quiet}, **options)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session, with what the tests started


def try_mutant(mutant: dict, cosmic_ray: str, tree: Path, usual: dict) -> dict:
    """The mutant with "noticed", and its "difference" if it was not. `usual`: the seconds of tests without a mutant."""
    tests = tests_of(mutant["room"], mutant["module"])
    key = " ".join(tests)
    if key not in usual:
        started = time.time()
        if not passes(tree, tests, 3600):
            sys.exit(f"These tests fail without a mutant: {key}")
        usual[key] = time.time() - started
    file = tree / mutant["module"]
    before = file.read_text(encoding="utf-8")
    command = [cosmic_ray, "apply", mutant["module"], mutant["operator"], str(mutant["occurrence"])]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    after = file.read_text(encoding="utf-8")
    started = time.time()
    noticed = not passes(tree, tests, 30 + 3 * usual[key])
    file.write_text(before, encoding="utf-8")
    found = mutant | {"noticed": noticed, "seconds": round(time.time() - started)}
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return found if noticed else found | {"difference": [line for line in lines if line[:3] not in ("---", "+++")]}


def write(rows: list[dict], seed: int) -> None:
    shares = {}
    for room in ROOMS:
        tried = [row for row in rows if row["room"] == room]
        noticed = sum(row["noticed"] for row in tried)
        shares[room] = {"noticed": noticed, "tried": len(tried), "share": round(noticed / max(1, len(tried)), 3)}
    write_json(FILE, {"seed": seed, "rooms": shares, "mutants": rows, **environment()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cosmic_ray", default="cosmic-ray", help="its command, of an environment of its own")
    parser.add_argument("--number", type=int, default=43, help="mutants of a room")
    parser.add_argument("--rooms", nargs="+", default=[*ROOMS], choices=[*ROOMS])
    parser.add_argument("--hours", type=float, default=8.0, help="begin no further mutant after this time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    end, usual = time.time() + 3600 * args.hours, {}
    earlier = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"mutants": [], "seed": args.seed}
    rows = earlier["mutants"] if earlier["seed"] == args.seed else []
    done = {(row["module"], row["operator"], row["occurrence"]) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (tree := folder / "tree").mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
        for room in args.rooms:
            for mutant in mutants_of(room, args.cosmic_ray, folder, args.number, args.seed):
                if time.time() > end or (mutant["module"], mutant["operator"], mutant["occurrence"]) in done:
                    continue
                rows.append(try_mutant(mutant, args.cosmic_ray, tree, usual))
                write(rows, args.seed)
                print(
                    {name: rows[-1].get(name) for name in ("module", "line", "operator", "noticed", "seconds")},
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""How many small faults the tests notice, room by room: a seeded sample of cosmic-ray's mutants.

    python -m venv ENV && ENV/bin/pip install cosmic-ray coverage
    echo $PWD/.venv/lib/python3.*/site-packages > ENV/lib/python3.*/site-packages/shared.pth
    ENV/bin/python -m benchmarks.quality.mutation --recordings FOLDER [--number 43] [--rooms data jobs] [--survivors]

Of each room --number places are drawn, and of each place one mutant (a comparison, number, operator, condition or loop that is
another one), in a copy of the committed tree. Which tests execute which line is recorded first (FOLDER keeps it; a test file is
recorded anew when it or a module that it executes has changed; the first time takes as long as the tests). A mutant is noticed
when a test that executes its statement fails, or does not end; these tests run the cheapest first, as many as usually take --seconds,
and count only where they pass without the mutant. Mutants that pass are listed with their difference, to be read.

Left out, because nothing or only speed can depend on them: annotations, `|` (it is mostly in annotations), `is` for `==`,
caches, `strict` and `frozen` (they are about mistakes of our own), and what does not compile. A row of the results that is given
an "equivalent", the reason why nothing that can be observed changes, does not count.

Writes benchmarks/results/mutation.json after every mutant. --survivors tries those again that nothing noticed, after tests
were added: a room's "before" stays.
"""

import argparse
import ast
import contextlib
import difflib
import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.quality import mutation_tests
from common.files import write_json
from common.provenance import environment

with contextlib.suppress(ModuleNotFoundError):  # of an environment of its own: see above
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

FILE = RESULTS / "mutation.json"
ROOMS = {  # a room's modules, and the folders and files of tests that are recorded for it
    "objectives": (["objectives"], ["objectives", "models/test_collator.py"]),
    "collator": (
        ["collator.py"],
        ["models/test_collator.py", "models/test_pixels.py", "models/test_families.py", "training/test_lengths.py"],
    ),
    "captioner": (
        ["captioner.py"],
        [
            "models/test_captioner.py",
            "models/test_decoding.py",
            "models/test_families.py",
            "reports/test_sweep.py",
            "scripts/test_evaluate.py",
        ],
    ),
    "metrics": (["metrics"], ["metrics", "rewriting/test_rewrite_parts.py"]),
    "training": (["training"], ["training", "scripts/test_train.py", "scripts/test_adapters.py"]),
    "data": (["data"], ["data", "scripts/test_seen_images.py"]),
    "jobs": (["jobs"], ["captioning", "rewriting", "scripts/test_infer.py", "scripts/test_scale.py"]),
}
GUARD = re.compile(r"\b(strict|frozen)=True.* [+].*\b\1=False")
LEFT_OUT = re.compile("BitOr|Is_Eq|IsNot_NotEq|Eq_Is|NotEq_IsNot")


def modules_of(room: str) -> list[str]:
    """Paths below the root."""
    names = ROOMS[room][0]
    paths = [path for name in names for path in ([ROOT / name] if "." in name else (ROOT / name).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def test_files_of(room: str) -> list[str]:
    """The smallest first."""
    places = [ROOT / "tests" / name for name in ROOMS[room][1]]
    files = {file for place in places for file in ([place] if place.suffix else place.glob("test_*.py"))}
    return [file.relative_to(ROOT).as_posix() for file in sorted(files, key=lambda file: (file.stat().st_size, file))]


def inside_annotations(source: str) -> set[tuple[int, int]]:
    """Lines and columns."""
    nodes = [
        n
        for node in ast.walk(ast.parse(source))
        for n in (getattr(node, "annotation", 0), getattr(node, "returns", 0))
        if n
    ]
    return {(n.lineno, column) for n in nodes for column in range(n.col_offset, n.end_col_offset)}


def mutants_of(room: str, number: int, seed: int) -> list[dict]:
    """The room's sample, drawn over places, not over mutants: an addition has eleven of them."""
    places: dict[tuple, list] = {}
    for module in modules_of(room):
        source = (ROOT / module).read_text(encoding="utf-8")
        tree, lines, annotated = get_ast(source), source.splitlines(), inside_annotations(source)
        for name in sorted(cosmic_ray.plugins.operator_names()):
            operator = cosmic_ray.plugins.get_operator(name)
            if LEFT_OUT.search(name) or operator.arguments():
                continue
            positions = [start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node)]
            for occurrence, (line, column) in enumerate(positions):
                marker = lines[line - 1][column : column + 2] == "*,"  # of arguments by keyword
                if (line, column) not in annotated and not marker and not re.match(r"\s*@.*cache", lines[line - 1]):
                    mutant = {"room": room, "module": module, "line": line, "operator": name, "occurrence": occurrence}
                    places.setdefault((module, line, column), []).append(mutant)
    rng = random.Random(f"{seed} {room}")
    sample = (rng.sample(places[place], len(places[place])) for place in rng.sample(sorted(places), len(places)))
    drawn = (next((m | {"difference": lines} for m in mutants if (lines := difference(m))), None) for mutants in sample)
    return list(itertools.islice((m for m in drawn if m and not GUARD.search(" ".join(m["difference"]))), number))


def mutated(mutant: dict, source: str) -> str | None:
    return mutate_code(source, cosmic_ray.plugins.get_operator(mutant["operator"])(), mutant["occurrence"])


def difference(mutant: dict) -> list[str] | None:
    """Its lines; None if it does not compile, or the module has no such place."""
    before = (ROOT / mutant["module"]).read_text(encoding="utf-8")
    try:
        after = mutated(mutant, before)
        compile(after or "no place", mutant["module"], "exec")
    except (SyntaxError, AttributeError):  # cosmic-ray cannot replace an exception that is named with its module
        return None
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if line[:2] not in ("--", "++", "@@")]


def lines_to_execute(mutant: dict) -> set[tuple[str, int]]:
    """The lines of its statement; of a function's head, the function's body; of a constant or field, where its name is used."""
    module, line = mutant["module"], mutant["line"]
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.stmt, ast.ExceptHandler))]
    first = {node: min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) for node in nodes}
    around = sorted((node for node in nodes if first[node] <= line <= node.end_lineno), key=lambda node: first[node])
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    bodies = {n for node in functions for n in range(node.body[0].lineno, node.end_lineno + 1)}
    inner = around[-1]
    if inner in functions:
        return {(module, n) for n in range(inner.body[0].lineno, inner.end_lineno + 1)}
    if line in bodies:
        body = getattr(inner, "body", None)
        return {
            (module, n) for n in range(inner.lineno, max(line, body[0].lineno - 1 if body else inner.end_lineno) + 1)
        }
    targets = getattr(inner, "targets", [getattr(inner, "target", None)])
    name = ast.unparse(targets[0]) if targets[0] else "no name"
    used = {
        (other, n)
        for other in all_modules()
        for n, text in enumerate((ROOT / other).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(rf"\b{re.escape(name)}\b", text) and (other != module or n in bodies)
    }
    return used or {(module, n) for n in bodies}


def all_modules() -> list[str]:
    return [module for room in ROOMS for module in modules_of(room)] + sorted(
        path.name for path in ROOT.glob("[dert]*.py")
    )


class Worker:
    """In each of the processes: a copy of the committed tree."""

    def __init__(self):
        folder = Path(tempfile.mkdtemp(prefix="mutation-"))
        (folder / "tree").mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", folder / "tree"], input=archive, check=True)
        self.tree, self.pass_without, self.written = folder / "tree", set(), 0

    def write(self, module: str, text: str) -> None:
        """With a modification time of its own, by which Python decides whether a compiled module is out of date."""
        self.written += 10
        (self.tree / module).write_text(text, encoding="utf-8")
        os.utime(self.tree / module, (1e9 + self.written, 1e9 + self.written))

    def attempt(self, mutant: dict, recordings: dict, limit: float) -> dict:
        started, source = time.time(), (self.tree / mutant["module"]).read_text(encoding="utf-8")
        by = None
        batches = mutation_tests.batches(recordings, lines_to_execute(mutant), limit)
        for tests, seconds in batches:
            while tests:
                self.write(mutant["module"], mutated(mutant, source))
                by = mutation_tests.first_failing(self.tree, tests, 30 + 5 * seconds)
                self.write(mutant["module"], source)
                if by is None or by in self.pass_without:
                    break
                if by == "time" or "::" not in by:  # no end, or no start
                    alone = tests
                else:
                    alone = [by]
                if mutation_tests.first_failing(self.tree, alone, 60 + 5 * seconds) is None:
                    self.pass_without.update(alone if alone == [by] else [])
                    break
                print(f"Fails without a mutant: {by}", flush=True)
                tests, by = (tests[tests.index(by) + 1 :] if by in tests else []), None
            if by:
                break
        executed = sum(len(tests) for tests, _ in batches)
        return mutant | {"noticed": bool(by), "by": by, "tests": executed, "seconds": round(time.time() - started, 1)}


def start_worker() -> None:
    global worker
    worker = Worker()


def attempt(mutant: dict, recordings: dict, limit: float) -> dict:
    return worker.attempt(mutant, recordings, limit)


def record(file: str, seconds: float) -> tuple[str, dict]:
    return file, mutation_tests.record(worker.tree, file, all_modules(), seconds, int(seconds / 4))


def write(rows: list[dict], args) -> None:
    rooms = {}
    for room in ROOMS:
        tried = [row for row in rows if row["room"] == room]
        if not tried:
            continue
        equivalent = sum("equivalent" in row for row in tried)
        before, noticed = (sum(row[name] for row in tried) for name in ("noticed_before", "noticed"))
        rooms[room] = {"tried": len(tried), "equivalent": equivalent, "noticed_before": before, "noticed": noticed}
        rooms[room]["share"] = round(noticed / (len(tried) - equivalent or 1), 3)
    result = {"seed": args.seed, "seconds_of_tests": args.seconds, "rooms": rooms, "mutants": rows}
    write_json(FILE, result | environment())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="folder of what the tests execute")
    parser.add_argument("--number", type=int, default=43, help="mutants of a room")
    parser.add_argument("--rooms", nargs="+", default=[*ROOMS], choices=[*ROOMS])
    parser.add_argument("--survivors", action="store_true", help="try those again that were not noticed")
    parser.add_argument("--seconds", type=float, default=60.0, help="tests for a mutant, by their usual time")
    parser.add_argument(
        "--file_seconds",
        type=float,
        default=1200.0,
        help="time for recording a test file; its other tests do not count",
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = json.loads(FILE.read_text(encoding="utf-8"))["mutants"] if FILE.is_file() else []
    args.recordings.mkdir(parents=True, exist_ok=True)
    mutation_tests.preload()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=start_worker) as pool:
        for room in args.rooms:
            recordings = recorded_tests(pool, room, args)
            if args.survivors:
                left = [row for row in rows if row["room"] == room and not row["noticed"] and "equivalent" not in row]
                again = [row for row in left if difference(row) == row["difference"]]  # the module is as it was
            else:
                done = {identity(row) for row in rows}
                again = [m for m in mutants_of(room, args.number, args.seed) if identity(m) not in done]
            tries = [pool.submit(attempt, mutant, recordings, args.seconds) for mutant in again]
            for tried in as_completed(tries):
                row = tried.result()
                row.setdefault("noticed_before", row["noticed"])
                rows = [other for other in rows if identity(other) != identity(row)] + [row]
                write(rows, args)
                names = ("module", "line", "operator", "noticed", "by", "tests", "seconds")
                print({name: row[name] for name in names}, flush=True)


def recorded_tests(pool, room: str, args) -> dict:
    """Of the room's test files, recorded where they have not been, and of what was recorded for other rooms."""
    files, modules = test_files_of(room), {*modules_of(room)}
    stale = [file for file in files if not is_recorded(args.recordings, file, modules)]
    for file, recorded in pool.map(record, stale, [args.file_seconds] * len(stale)):
        print("recorded", file, len(recorded["tests"]), flush=True)
        recording_of(args.recordings, file).write_text(json.dumps(recorded), encoding="utf-8")
    recordings = [json.loads(path.read_text(encoding="utf-8")) for path in args.recordings.glob("*.json")]
    by_file = {next(iter(recorded["hashes"])): recorded for recorded in recordings}
    return {file: recorded for file, recorded in by_file.items() if is_recorded(args.recordings, file, modules)}


def identity(row: dict) -> tuple:
    return row["module"], row["operator"], row["occurrence"], *row["difference"]


def recording_of(folder: Path, file: str) -> Path:
    return folder / file.replace("/", "-").replace(".py", ".json")


def is_recorded(folder: Path, file: str, modules: set[str]) -> bool:
    """Whether neither it nor one of these modules has changed since."""
    if not recording_of(folder, file).is_file():
        return False
    hashes = json.loads(recording_of(folder, file).read_text(encoding="utf-8"))["hashes"]
    return all(
        mutation_tests.content(ROOT / name) == value
        for name, value in hashes.items()
        if name == file or name in modules
    )


if __name__ == "__main__":
    main()

"""For mutation.py: the tests that execute a line, recorded once, and runs of a few of them, each in a fork of a process that has
imported the libraries."""

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

with contextlib.suppress(ModuleNotFoundError):  # as in benchmarks.quality.mutation
    import coverage

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CAPTION_TEST_FAMILIES": os.environ.get("CAPTION_TEST_FAMILIES", "blip git blip2-opt blip2-t5 llava vit-gpt2"),
}
# Started first in every Python process that a recorded test starts; forks.py adds to PYTHONPATH, so it is passed on.
STARTED_WITH = "from benchmarks.quality import mutation_tests\nmutation_tests.Coverage().begin()\n"
# A list of the libraries' modules that the scripts import.
LIBRARIES = "import sys, train, infer, evaluate, rewrite, export; print(*[n for n, m in sys.modules.items() if 'site-packages' in (getattr(m, '__file__', None) or '')])"


def preload() -> None:
    os.environ.update(QUIET)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", LIBRARIES]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    for name in [*listed, "matplotlib.pyplot", "sacrebleu", "torch.utils.tensorboard"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class Coverage:
    """Which lines of the tree at `MUTATION_TREE` this process executes in which test: in `MUTATION_FOLDER`, a file of coverage.py
    for each process. The test that runs is named in its file `context`."""

    def begin(self) -> None:
        self.folder, self.tree = (os.environ[name] for name in ("MUTATION_FOLDER", "MUTATION_TREE"))
        self.anew()
        os.register_at_fork(after_in_child=self.anew_in_fork)
        atexit.register(self.save)
        leave = os._exit

        def save_and_leave(code):
            with contextlib.suppress(Exception):
                self.save()
            leave(code)

        os._exit = save_and_leave

    def anew(self) -> None:
        file = f"{self.folder}/lines.{os.getpid()}.{time.time_ns()}"
        self.coverage = coverage.Coverage(data_file=file, include=[f"{self.tree}/*"], config_file=False, messages=False)
        self.coverage.start()
        self.coverage.switch_context(Path(self.folder, "context").read_text(encoding="utf-8"))

    def anew_in_fork(self) -> None:
        self.coverage.stop()
        self.anew()

    def save(self) -> None:
        self.coverage.stop()
        self.coverage.save()


class Recorder:
    """pytest's plugin while lines are recorded. What a fixture of a whole module executes is its own, not the first test's."""

    def __init__(self, recorded: Coverage, seconds: float, test_seconds: int):
        self.recorded, self.end, self.now, self.tests, self.fixtures = recorded, time.time() + seconds, "", {}, {}
        self.test_seconds = test_seconds

        def stop(*_):
            raise TimeoutError("the test's time is over")

        signal.signal(signal.SIGALRM, stop)

    def switch(self, context: str) -> None:
        self.now = context
        Path(self.recorded.folder, "context").write_text(context, encoding="utf-8")
        self.recorded.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        before, started, inner = self.now, time.time(), sum(self.fixtures.values())
        self.switch(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            seconds = time.time() - started - (sum(self.fixtures.values()) - inner)
            self.fixtures[fixturedef.argname] = max(seconds, self.fixtures.get(fixturedef.argname, 0.0))
            self.switch(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.switch(item.nodeid)
        signal.setitimer(signal.ITIMER_REAL, self.test_seconds, 10)  # again, where a fixture's end waits
        started, fixtures = time.time(), sum(self.fixtures.values())
        self.tests[item.nodeid] = {"fixtures": list(item.fixturenames), "passed": True, "skipped": False}
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.time() - started - (sum(self.fixtures.values()) - fixtures)
            self.tests[item.nodeid]["seconds"] = round(seconds, 3)
            self.switch("")
            if time.time() > self.end:
                item.session.shouldstop = "its time is over"

    def pytest_runtest_logreport(self, report):
        self.tests[report.nodeid]["passed"] &= not report.failed
        self.tests[report.nodeid]["skipped"] |= report.skipped


class Chosen:
    """pytest's plugin that runs these tests in this order, and remembers the first that fails."""

    def __init__(self, tests: list[str]):
        self.places, self.failed = {test: place for place, test in enumerate(tests)}, None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.places), key=lambda item: self.places[item.nodeid])

    def pytest_collectreport(self, report):
        self.failed = self.failed or (report.failed and report.nodeid) or None

    pytest_runtest_logreport = pytest_collectreport


class Forks:
    """pytest's plugin that gives forks.Server a process which has imported the libraries already, where the tests need one."""

    def __init__(self, tree: Path):
        self.pipes = [os.pipe(), os.pipe()]
        self.pid = os.fork()
        if self.pid:
            return
        for stream, end in enumerate((self.pipes[0][0], self.pipes[1][1])):
            os.dup2(end, stream)
        for pipe in self.pipes:
            for end in pipe:
                os.close(end)
        sys.stdin = os.fdopen(0, closefd=False)
        if sys.stdin.readline():
            sys.path[:0] = [str(tree), str(tree / "tests/helpers")]
            importlib.import_module("forks").serve()
        os._exit(0)

    def pytest_collection_finish(self):
        forks = sys.modules.get("forks")
        if forks:
            forks.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": self.popen})

    def popen(self, command, **options):
        if self.pid is None:
            return subprocess.Popen(command, **options)
        pid, self.pid = self.pid, None
        stdin, stdout = os.fdopen(self.pipes[0][1], "w"), os.fdopen(self.pipes[1][0])
        os.close(self.pipes[1][1])
        stdin.write("start\n")
        stdin.flush()
        return SimpleNamespace(
            stdin=stdin, stdout=stdout, kill=lambda: os.kill(pid, signal.SIGKILL), wait=lambda: os.waitpid(pid, 0)
        )


def run_pytest(tree: Path, files: list[str], *plugins) -> None:
    for name, module in list(sys.modules.items()):  # of this checkout, not of the tree
        if str(getattr(module, "__file__", None)).startswith(f"{ROOT}{os.sep}") and name != "__main__":
            del sys.modules[name]
    sys.path[:] = [place for place in sys.path if place not in ("", str(ROOT))]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tree.parent}/tmp", f"--rootdir={tree}"]
    pytest.main([*options, *files], plugins=[*plugins, Forks(tree)])


def in_fork(tree: Path, work, seconds: float):
    """What `work()` returns in a fork that starts in `tree`; None if it ends without, or not within the seconds: then it and all it
    started are killed."""
    out, mark = tree.parent / "answer.json", f"MUTATION_RUN={tree}"
    out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(tree)
            os.environ["MUTATION_RUN"] = str(tree)
            log = os.open(f"{tree.parent}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(log, stream)
            out.write_text(json.dumps(work()), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    end = time.time() + seconds
    while time.time() < end and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_text(encoding="utf-8", errors="replace").split("\0"):
                os.kill(int(process.name), signal.SIGKILL)
    return json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None


def record(tree: Path, file: str, modules: list[str], seconds: float, test_seconds: int) -> dict:
    """{"tests": {test: {"seconds", "passed", ...}}, "fixtures": {name: seconds}, "lines": {module: {line: contexts}}, "hashes"} of a
    test file, but for what comes after so many seconds, and tests that are longer than `test_seconds`."""

    folder = tempfile.mkdtemp()  # a TemporaryDirectory would be removed by the first fork that ends

    def work():
        Path(folder, "context").write_text("", encoding="utf-8")
        Path(folder, "sitecustomize.py").write_text(STARTED_WITH, encoding="utf-8")
        os.environ |= {"MUTATION_FOLDER": folder, "MUTATION_TREE": str(tree), "PYTHONPATH": f"{folder}:{tree}"}
        recorded = Coverage()
        recorded.begin()
        recorder = Recorder(recorded, seconds, test_seconds)
        run_pytest(tree, [file], recorder)
        recorded.save()
        data = coverage.CoverageData(f"{folder}/all")
        for part in Path(folder).glob("lines.*"):
            one = coverage.CoverageData(str(part))
            with contextlib.suppress(coverage.CoverageException):  # of a process that was killed
                one.read()
                data.update(one)
        lines = {module: data.contexts_by_lineno(str(tree / module)) for module in modules}
        return {"tests": recorder.tests, "fixtures": recorder.fixtures, "lines": lines}

    recorded = in_fork(tree, work, 2 * seconds + 2 * test_seconds)
    shutil.rmtree(folder)
    hashes = {
        name: content(tree / name)
        for name in [file, *modules]
        if name == file or (recorded and recorded["lines"][name])
    }
    if recorded is None:
        print(
            f"Not recorded: {file}\n{(tree.parent / 'log').read_text(encoding='utf-8', errors='replace')[-3000:]}",
            flush=True,
        )
        recorded = {"tests": {}, "fixtures": {}, "lines": {}}
    return recorded | {"hashes": hashes}


def content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def batches(recordings: dict, lines: set[tuple[str, int]], limit: float) -> list[tuple[list[str], float]]:
    """The tests that execute one of the lines, and their seconds: a few cheap ones, then others up to the limit. Those of the
    file that is named after the module come first, then the cheapest; of tests that last long, those of a file together."""
    tests, fixtures = {}, {}
    for file, recorded in recordings.items():
        contexts = {c for module, line in lines for c in recorded["lines"].get(module, {}).get(str(line), ())}
        for name, test in recorded["tests"].items():
            if (
                test["passed"]
                and not test["skipped"]
                and contexts & {name, *(f"fixture {f}" for f in test["fixtures"])}
            ):
                fixtures[name] = {(file, f): s for f, s in recorded["fixtures"].items() if f in test["fixtures"]}
                tests[name] = test["seconds"] + sum(fixtures[name].values())
    cheapest = {test.split("::")[0]: tests[test] for test in sorted(tests, key=tests.get, reverse=True)}

    own = {f"test_{Path(module).stem}.py" for module, _ in lines}

    def order(test: str) -> tuple:
        file = test.split("::")[0]
        first = Path(file).name not in own
        return (first, 0, tests[test]) if tests[test] < 1 else (first, 1, cheapest[file], file, tests[test])

    chosen, paid, total = ([], []), set(), [0.0, 0.0]
    for test in sorted(tests, key=order):
        seconds = tests[test] - sum(s for fixture, s in fixtures[test].items() if fixture in paid)
        batch = int(bool(chosen[1]) or total[0] + seconds > 3)
        if sum(total) + seconds > limit and batch and chosen[batch]:
            continue
        chosen[batch].append(test)
        paid.update(fixtures[test])
        total[batch] += seconds
    return [(batch, seconds) for batch, seconds in zip(chosen, total, strict=True) if batch]


def first_failing(tree: Path, tests: list[str], seconds: float) -> str | None:
    """The first of the tests that fails, or "time" if they do not end within the seconds; None if all pass."""

    def work():
        chosen = Chosen(tests)
        run_pytest(tree, ["-x", *dict.fromkeys(test.split("::")[0] for test in tests)], chosen)
        return {"failed": chosen.failed}

    answer = in_fork(tree, work, seconds)
    return answer["failed"] if answer else "time"

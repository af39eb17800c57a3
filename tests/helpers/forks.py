"""Scripts run in forks of one process that has imported the libraries, to spare each run the seconds that takes.

A run is the script's file from its first line, with arguments, environment, working folder and output of its own, and an end
as any process has it. What a test says of start-up itself, or of variables that are read at import, needs `tiny.start`.
"""

import atexit
import functools
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "infer", "evaluate", "export", "rewrite")


class Server:
    """The process that forks."""

    def __init__(self):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment | {"PYTHONPATH": path},
            cwd=ROOT,
        )
        self.environment |= {"PYTEST_CURRENT_TEST": ""}

    @functools.cached_property
    def has_gpu(self) -> bool:
        """Whether an import has already taken the GPU, as bitsandbytes' does: forks cannot have it then."""
        return json.loads(self.process.stdout.readline())

    def fits(self) -> bool:
        """Whether a process that was started now would have the environment that the libraries were imported in."""
        if self.has_gpu:
            return False
        now = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_CURRENT_TEST": ""}
        return now == self.environment

    def run(self, runs: list[dict], until: Path | None = None, timeout: float = 600) -> list[int]:
        """The exit codes of runs at the same time, each of {"script", "arguments", "stdout", "stderr", "environment"}.
        `until`: a file; when it is there, all of them are killed."""
        assert not self.has_gpu
        asked = {"runs": runs, "until": until and str(until), "cwd": os.getcwd()}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.close()
                raise subprocess.TimeoutExpired(str(runs[0]["script"]), timeout)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.wait()


def run_here(run: dict, cwd: str) -> None:
    """One run, in a fork; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(run[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ.update(run["environment"])
        os.chdir(cwd)
        sys.argv = [run["script"], *run["arguments"]]
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        runpy.run_path(run["script"], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def kill_when(file: str, children: list[int]) -> None:
    """SIGKILL for all children, as soon as there is such a file; if they end before, they were not killed."""
    while not os.path.exists(file):
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from metrics.coco_caption.tokenizer import tokenize

    for name in SCRIPTS:
        __import__(name)
    tokenize(["a dog"])  # compiles the rules, once for all runs
    torch = sys.modules["torch"]
    answers.write(json.dumps(torch.cuda.is_initialized()) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked, children = json.loads(line), []
        for run in asked["runs"]:
            child = os.fork()
            if child == 0:
                run_here(run, asked["cwd"])
            children.append(child)
        if asked["until"]:
            kill_when(asked["until"], children)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

"""Scripts run in forks of one process that has imported the libraries, to spare each run the seconds that takes.

A run is the script's file from its first line, with arguments, environment, working folder and output of its own, and an end
as any process has it. What a test says of start-up itself needs a process of its own, as variables do that are read at import.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "infer", "evaluate", "export", "rewrite")
# What train.py imports when it is needed, in most runs, if it is installed.
IMPORTED_LATER = ("matplotlib.pyplot", "torch.utils.tensorboard", "sacrebleu")


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
        return self.answer()

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
        return self.ask("run", asked, runs[0]["script"], timeout)

    def ask(self, what: str, asked, script: str, timeout: float = 60):
        self.process.stdin.write(json.dumps([what, asked]) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.close()
                raise subprocess.TimeoutExpired(script, timeout)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended: its traceback is in the captured stderr"
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()


class Started:
    """A run that is under way, with what the tests use of `subprocess.Popen`."""

    def __init__(self, server: Server, run: dict):
        self.server, self.args, self.returncode = server, [run["script"], *run["arguments"]], None
        assert not server.has_gpu
        with tempfile.TemporaryDirectory() as folder:
            pipes = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            for pipe in pipes.values():
                os.mkfifo(pipe)
            self.pid = server.ask("start", {**run, **pipes, "cwd": os.getcwd()}, run["script"])
            # Each opening waits for the other side's, so the order is run_here's.
            ends = [os.open(pipe, os.O_RDONLY) for pipe in pipes.values()]
        self.stdout, self.stderr = (os.fdopen(end, encoding="utf-8") for end in ends)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask("poll", self.pid, self.args[0])
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """The rest of what it writes until its end; its children may hold the pipes a little longer."""
        texts: dict[str, str] = {}
        streams = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=lambda n=name, s=stream: texts.update({n: s.read()}), daemon=True)
            for name, stream in streams.items()
        ]
        deadline = time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline - time.monotonic())
        if len(texts) < len(streams):
            raise subprocess.TimeoutExpired(self.args, timeout)
        for stream in streams.values():
            stream.close()
        self.wait(max(0.0, deadline - time.monotonic()))
        return texts["stdout"], texts["stderr"]


def run_here(run: dict, cwd: str) -> None:
    """One run, in a fork; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(run[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            # The server's own may have been made for a file, in which one can seek.
            setattr(sys, name, os.fdopen(stream, "w", encoding="utf-8", closefd=False))
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)  # as any process has it
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


def forked(run: dict, cwd: str) -> int:
    child = os.fork()
    if child == 0:
        run_here(run, cwd)
    return child


def kill_when(file: str, children: list[int]) -> None:
    """SIGKILL for all children, as soon as such a file has been written; if they end before, they were not killed."""
    while not (os.path.exists(file) and os.path.getsize(file)):
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
        importlib.import_module(name)
    for name in IMPORTED_LATER:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    tokenize(["a dog"])  # compiles the rules, once for all runs
    torch = sys.modules["torch"]
    answers.write(json.dumps(torch.cuda.is_initialized()) + "\n")
    answers.flush()
    for line in sys.stdin:
        what, asked = json.loads(line)
        if what == "run":
            children = [forked(run, asked["cwd"]) for run in asked["runs"]]
            if asked["until"]:
                kill_when(asked["until"], children)
            answer = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        elif what == "start":
            answer = forked(asked, asked["cwd"])
        else:
            ended, status = os.waitpid(asked, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

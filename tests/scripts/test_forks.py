"""A script in a fork (tests/helpers/forks.py) says and ends what it would in a process of its own."""

import subprocess
import sys

import forks
import pytest
import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scripts run in forks on Linux alone")

SCRIPTS = {
    "end": "print('caf\u00e9'); print('a warning', file=sys.stderr)",
    "code": "print('out'); sys.exit(3)",
    "words": "sys.exit('what was wrong')",
    "true": "sys.exit(True)",
    "surrogate": r"print('caf\udce9', file=sys.stderr)",
    "own fault": "print('before'); {}['missing']",
    "killed": "print('lost'); print('said before', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "print('said before', file=sys.stderr); os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM)",
    "at exit": "atexit.register(print, 'last words'); print('first words')",
    "thread": "threading.Timer(0.2, print, ['a thread']).start(); print('the end of main')",
    "surroundings": "print(sys.argv[1:], os.getcwd(), os.environ['RAY_X'], __name__, repr(sys.stdin.read()))",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_says_and_ends_as_a_process_of_its_own(name, tmp_path, monkeypatch):
    if not tiny.server().fits():
        pytest.skip("no forks here: the GPU is taken, or the environment has changed since the libraries were imported")
    script = tmp_path / "script.py"
    script.write_text(f"import atexit, os, signal, sys, threading\n{SCRIPTS[name]}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words, environment = ["--flag", "a value"], {"RAY_X": "1"}
    run = {"script": str(script), "arguments": words, "environment": environment}
    outputs = {stream: str(tmp_path / stream) for stream in ("stdout", "stderr")}

    command = [sys.executable, "-X", "utf8", str(script), *words]
    variables = tiny.server().environment | environment
    variables.pop("PYTHONUNBUFFERED", None)  # read at start-up, so not by forks
    own = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    (code,) = tiny.server().run([run | outputs])
    expected = ended(own.returncode, own.stdout, own.stderr)
    assert ended(code, *((tmp_path / stream).read_text(encoding="utf-8") for stream in outputs)) == expected
    started = forks.Started(tiny.server(), run)
    said = started.communicate(timeout=60)
    assert ended(started.returncode, *said) == expected


def ended(code: int, out: str, err: str) -> tuple:
    """A traceback by its last line: a fork has the frames that run the file, too."""
    return code, out, err.splitlines()[-1] if "Traceback" in err else err

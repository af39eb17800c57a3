"""Runs of train.py in one process or several, as `accelerate launch` starts them, without the seconds of their imports.

A process of its own imports the libraries once and forks for each run. The environment of a run is the one that
accelerate's own launcher makes of a config file.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """The process that forks. `run` returns each rank's log; asserts that all ended with `code`. `until`: a file; when it is
    there, all ranks are killed."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(
        self, *arguments, config=None, processes: int = 1, code: int = 0, script="train", until=None, **environment
    ):
        self.count += 1
        logs = [self.folder / f"{self.count}.{rank}.log" for rank in range(processes)]
        asked = {
            "script": script, "arguments": list(map(str, arguments)), "config": config and str(config),
            "logs": list(map(str, logs)), "environment": environment, "until": until and str(until),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        code = code if until is None else -signal.SIGKILL
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        assert codes == [code] * processes, f"{codes}\n{texts[0][-4000:]}\n---- the last rank\n{texts[-1][-3000:]}"
        return texts

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def environment_of(config: str, processes: int) -> dict:
    """What accelerate launch puts into the environment of each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", config, "--num_processes", str(processes), "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_rank(rank: int, asked: dict, launched: dict) -> None:
    """One process of a run, in a fork; never returns."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(asked["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        count = len(asked["logs"])
        os.environ.update(launched, **asked["environment"])
        if count > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        sys.argv = [f"{asked['script']}.py", *asked["arguments"]]
        from common.cli import run

        run(__import__(asked["script"]).main)
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
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
    sys.path.insert(0, str(ROOT))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import export  # noqa: F401
    import infer  # noqa: F401
    import train  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        count, launched = len(asked["logs"]), {}
        if asked["config"]:
            launched = environment_of(asked["config"], count)
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                run_rank(rank, asked, launched)
            children.append(child)
        if asked["until"]:
            kill_when(asked["until"], children)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

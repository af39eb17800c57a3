"""Runs of a script in one process or several, as `accelerate launch` starts them: with the environment that its own launcher
makes of a config file."""

import signal
import socket
from pathlib import Path

from forks import ROOT, Server


class Ranks:
    """`run` returns each rank's log; asserts that all ended with `code`, or one of them. `until`: a file; when it is there, all ranks are
    killed."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.server = folder, 0, Server()
        self.close = self.server.close

    def run(self, *arguments, config=None, processes=1, code=0, script="train", until=None, **environment):
        self.count += 1
        logs = [self.folder / f"{self.count}.{rank}.log" for rank in range(processes)]
        launched = environment_of(str(config), processes) if config else {}
        runs = [
            {
                "script": str(ROOT / f"{script}.py"),
                "arguments": list(map(str, arguments)),
                "stdout": str(log),
                "stderr": str(log),
                "environment": launched | environment | (of_rank(rank, processes) if processes > 1 else {}),
            }
            for rank, log in enumerate(logs)
        ]
        codes = self.server.run(runs, until)
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        code = code if until is None else -signal.SIGKILL
        allowed = code if isinstance(code, tuple) else (code,)
        assert set(codes) == {codes[0]} <= {*allowed}, (
            f"{codes}\n{texts[0][-4000:]}\n---- the last rank\n{texts[-1][-3000:]}"
        )
        return texts


def together(processes: int) -> list[dict]:
    """What torchrun puts into the environment of each of its processes; nothing for a single one."""
    place = meeting_place()
    return [place | of_rank(rank, processes) for rank in range(processes)] if processes > 1 else [{}]


def of_rank(rank: int, count: int) -> dict:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}


def environment_of(config: str, processes: int) -> dict:
    """What accelerate launch puts into the environment of each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", config, "--num_processes", str(processes), "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    place = meeting_place()
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1] | place
    return prepare_multi_gpu_env(args) | place


def meeting_place() -> dict:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}

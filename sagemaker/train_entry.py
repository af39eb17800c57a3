"""What a SageMaker training job runs on each of its machines: hyperparameters and channels become a train.py command.

It reads only the platform's own contract, files under /opt/ml, so it runs the same whether the toolkit (SDK v2) or the
script of SDK v3 starts it. It starts torchrun if there are several GPUs or machines, forwards SIGTERM to the training
processes, exports the finished model to /opt/ml/model, and records why a job failed.

    /opt/ml/input/config/    hyperparameters.json, resourceconfig.json
    /opt/ml/input/data/      data | train, validation, test | images | model    (channels, see flags_of_channels)
    /opt/ml/checkpoints/     the run's folder, kept in S3: a restarted job resumes from there. The first machine writes
                             it, the others add the state of their random numbers; S3 merges them
    /opt/ml/model/           the exported model and code/ that serves it, and nothing else
    /opt/ml/output/          failure: the reason, its first 1,024 characters shown as FailureReason; data/: captions
"""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

from bundle import write_model

ROOT = Path(__file__).resolve().parent.parent
BASE = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
PID_FILE = Path(os.environ.get("TMPDIR", "/tmp"), "train_entry.pid")
SPLITS = ("train", "validation", "test")
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar")
# The lines of train.py's log that contain them: the Trainer's own, and the summary of the test split, printed last.
NUMBER = r"'?([-+0-9.e]+)"
METRICS = {
    "train:loss": f"'loss': {NUMBER}",
    "train:learning_rate": f"'learning_rate': {NUMBER}",
    "validation:loss": f"'eval_loss': {NUMBER}",
    "validation:sacrebleu": f"'eval_sacrebleu': {NUMBER}",
    "validation:CIDEr": f"'eval_CIDEr': {NUMBER}",
    "final:sacrebleu": r"  sacreBLEU +([0-9.]+)",
    "final:CIDEr": r"  CIDEr +([0-9.]+)",
}
# The container entry point of launch.py's jobs. Both SDKs would have bash as process 1, which does not forward SIGTERM
# (aws/sagemaker-training-toolkit#125); this one does. A string of an entry point may have at most 256 characters.
HEAR_SIGTERM = (
    "trap 'kill -TERM $(cat /tmp/train_entry.pid)' TERM; bash {start} & "
    "while kill -0 $! 2>/dev/null; do wait $!; code=$?; done; exit $code"
)


def main() -> int:
    if "--help" in sys.argv:
        print(__doc__)
        return 0
    PID_FILE.write_text(str(os.getpid()), encoding="utf-8")
    flags, recipe = read_hyperparameters(BASE / "input/config/hyperparameters.json")
    machines = Machines(BASE / "input/config/resourceconfig.json")
    flags |= flags_of_channels(BASE / "input")
    flags["output_dir"] = str(BASE / "checkpoints")
    words = [word for name, value in flags.items() for word in (f"--{name}", *as_words(value))]
    child = Child([*machines.launcher(), "train.py", *recipe, *words], machines.environment())
    signal.signal(signal.SIGTERM, lambda *_: child.stop())
    code = child.wait()
    if child.stopped:
        print("train_entry.py: stopped by SIGTERM; the next start resumes from the last checkpoint.", file=sys.stderr)
        return 128 + signal.SIGTERM
    if code:
        write_failure(child.reason(code))
        return code
    if machines.rank == 0:  # the model folders of all machines are put into one archive
        leave_model(BASE / "checkpoints", BASE / "model", BASE / "output/data")
    return 0


def read_hyperparameters(path: Path) -> tuple[dict, list[str]]:
    """(train.py's flags, [recipe] or []) from the file of hyperparameters, whose values are all strings.

    SDK v2 JSON-quotes every value, v3 quotes none; a flag with several values is a JSON list in both. Anything else
    stays as it is: train.py reads "True", "5e-5" and the like itself. An empty, "null" or "None" value counts as unset.
    """
    flags = {}
    for name, text in json.loads(path.read_text(encoding="utf-8")).items() if path.is_file() else ():
        value = text
        try:
            value = json.loads(value) if value[:1] == '"' else value
            value = json.loads(value) if value[:1] == "[" else value
        except ValueError:
            raise ValueError(f"hyperparameter {name}: {text} begins like JSON, but is not JSON.") from None
        if not name.startswith("sagemaker_") and value not in ("", "null", "None"):
            flags[name.replace("-", "_")] = value
    recipe = flags.pop("recipe", None)
    if recipe is not None and not (ROOT / recipe).is_file():
        raise ValueError(f"hyperparameter recipe: there is no {recipe} in the source bundle.")
    return flags, [recipe] if recipe else []


def as_words(value) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def flags_of_channels(folder: Path) -> dict[str, str]:
    """The flags that the job's channels stand for. `folder` holds data/CHANNEL.

    data: a dataset in any local format. train, validation, test: one folder per split, read as one dataset. images: its
    images, if they are elsewhere. model: a model folder, or the model.tar.gz of an earlier job, to start from.
    """
    channels = {path.name: path for path in sorted((folder / "data").glob("*")) if path.is_dir()}
    splits = [name for name in SPLITS if name in channels]
    flags = {}
    if "data" in channels and splits:
        raise ValueError(f"The channels data and {', '.join(splits)} exclude each other: give one or the others.")
    if "data" in channels or splits == ["train"]:  # a single one has its own splits, or they are drawn
        flags["dataset_name"] = str(only_table(channels.get("data") or channels["train"]))
    elif splits:
        if "train" not in splits:
            raise ValueError(f"The channels {', '.join(splits)} lack train.")
        flags["dataset_name"] = str(unite(folder / "splits", {name: channels[name] for name in splits}))
    if "images" in channels:
        flags["image_dir"] = str(channels["images"])
    if "model" in channels:
        flags["model_name_or_path"] = str(unpack_model(channels["model"], folder / "model"))
    return flags


def only_table(channel: Path) -> Path:
    """The only file of captions in the folder (its image column names the images), else the folder."""
    files = [path for path in channel.iterdir() if path.suffix in TABLES and path.stem != "metadata"]
    return files[0] if len(files) == 1 else channel


def unite(folder: Path, channels: dict[str, Path]) -> Path:
    """One folder with links to the splits' folders, as data/sources.py expects it: train/, val/, test/ and, for
    captions in a file, train.jsonl next to train/."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for split, channel in channels.items():
        name = "val" if split == "validation" else split
        (folder / name).symlink_to(channel)
        table = only_table(channel)
        if table.suffix in (".json", ".jsonl", ".csv", ".tsv"):
            (folder / f"{name}{table.suffix}").symlink_to(table)
    return folder


def unpack_model(channel: Path, folder: Path) -> Path:
    if not (channel / "model.tar.gz").is_file():
        return channel
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(channel / "model.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


class Machines:
    """The machines of the job, as resourceconfig.json lists them, and how torchrun starts this one's processes."""

    def __init__(self, path: Path):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"hosts": ["localhost"]}
        self.hosts = sorted(config["hosts"])
        self.count, self.rank = len(self.hosts), self.hosts.index(config.get("current_host", self.hosts[0]))
        self.interface = config.get("network_interface_name")

    def launcher(self) -> list[str]:
        gpus = int(os.environ.get("SM_NUM_GPUS", 0))
        if self.count == 1 and gpus <= 1:
            return [sys.executable]
        where = ["--nnodes", self.count, "--node_rank", self.rank, "--nproc_per_node", max(gpus, 1)]
        meet = ["--master_addr", self.hosts[0], "--master_port", os.environ.get("SM_MASTER_PORT", "7777")]
        return [sys.executable, "-m", "torch.distributed.run", *map(str, [*where, *meet])]

    def environment(self) -> dict[str, str]:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if self.count > 1 and self.interface else ()
        return dict.fromkeys(names, self.interface) | dict(os.environ)


class Child:
    """train.py or its torchrun. Its stderr is passed through, and its last lines kept."""

    def __init__(self, command: list[str], environment: dict):
        print("train_entry.py:", *command[1:], flush=True)
        self.stopped, self.last = False, collections.deque(maxlen=200)
        self.torchrun = "torch.distributed.run" in command
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self.last.append(re.sub(r"^\[rank\d+\]: ", "", line.rstrip()))

    def stop(self) -> None:
        """SIGTERM to the training processes themselves: torchrun would kill them after 30 of the 120 seconds."""
        if self.process.poll() is not None:  # trained already: the rest takes less than two minutes
            return
        self.stopped = True
        import psutil  # the machine that launches, which reads METRICS here, may lack it

        processes = psutil.Process(self.process.pid).children() if self.torchrun else [self.process]
        for process in processes:
            process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        code = self.process.wait()
        self.reader.join()
        return code

    def reason(self, code: int) -> str:
        """Its own last message (a user's mistake), or the last error of a traceback."""
        if code in (-9, 137):
            return "train.py was killed (SIGKILL), most likely out of memory: lower per_device_train_batch_size."
        messages = [line for line in self.last if line.startswith("train.py: ")]
        errors = [line for line in self.last if line.split(":")[0].rsplit(".")[-1].endswith(("Error", "Exception"))]
        errors = [line for line in errors if "ChildFailedError" not in line]
        return (messages or errors or [f"train.py ended with exit code {code}."])[0]


def leave_model(run: Path, model: Path, output: Path) -> None:
    """Export the run's final model, with its card and scores, and add the code that serves it."""
    with tempfile.TemporaryDirectory() as folder:  # export.py copies more of the run than is deployed
        subprocess.run([sys.executable, "export.py", run, "--output_dir", folder], cwd=ROOT, check=True)
        write_model(Path(folder), model)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("predictions.json", "coco_metrics.json", "training_curves.svg", "trainer_state.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, output / name)


def write_failure(reason: str) -> None:
    (BASE / "output").mkdir(parents=True, exist_ok=True)
    (BASE / "output/failure").write_text(reason, encoding="utf-8")
    print(f"train_entry.py: {reason}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        write_failure(str(error))
        raise

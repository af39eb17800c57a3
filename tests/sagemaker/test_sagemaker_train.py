"""train_entry.py: under the real training toolkit and under SDK v3's script, stopped by SIGTERM, on two machines."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from conftest import ROOT
from sagemaker_envs import SECRETS, free_port, program
from small_run import CAPTIONS, SPLITS, equal_weights, weights

sys.path.insert(0, str(ROOT / "sagemaker"))
import bundle
import data
import train_entry
from captioner import Captioner
from models.loading import build_model

# As SDK v2 sends them: JSON-quoted, "True" where a person wrote it, a list of words as a list.
FLAGS = {
    "recipe": '"recipe.yaml"', "per_device_train_batch_size": '"4"', "captions_per_image": "5",
    "gradient_checkpointing": '"False"', "augment": '"[\\"flip\\", \\"random_resized_crop:0.5:1.0\\"]"',
    "sagemaker_program": '"sagemaker/train_entry.py"', "sagemaker_region": '"us-east-1"',
}  # fmt: skip
RECIPE = """
num_train_epochs: 12
learning_rate: 1.0e-3
gradient_accumulation_steps: 1
logging_steps: 1
max_train_samples: 24
max_eval_samples: 4
max_test_samples: 4
num_beams: 2
max_new_tokens: 8
meteor: false
spice: false
bootstrap_samples: 50
output_dir: overridden
"""


class Container:
    """The folder that is /opt/ml in a container of a job on real photos, with a tiny model as its model channel."""

    def __init__(self, base: Path, photos: Path, hyperparameters: dict, hosts=("127.0.0.1",), host="127.0.0.1"):
        self.base, self.hyperparameters, self.hosts, self.host = base, hyperparameters, list(hosts), host
        (base / "input/data").mkdir(parents=True)
        (base / "input/data/data").symlink_to(photos)
        (base / "checkpoints").mkdir()
        self.code = base / "bundle"
        (base / "recipe.yaml").write_text(RECIPE)
        bundle.write_job(self.code, base / "recipe.yaml")
        (base / "input/data/model").mkdir()
        with tarfile.open(base / "input/data/model/model.tar.gz", "w:gz") as tar:
            tar.add(self.build_model(photos), ".")

    def build_model(self, photos: Path) -> Path:
        """A tiny model whose tokenizer has the words of the photos' captions."""
        lines = next(photos.rglob("Flickr8k.token.txt")).read_text(encoding="utf-8").splitlines()
        captions = [line.split("\t")[1] for line in lines[:200]]
        torch.manual_seed(0)
        model, processor = build_model(str(tiny.write_config(self.base)), None, captions)
        model.save_pretrained(self.base / "model_channel")
        processor.save_pretrained(self.base / "model_channel")
        return self.base / "model_channel"

    def refresh(self) -> None:
        """A new machine: everything but checkpoints, which come back from S3, and the input."""
        for name in ("code", "model", "output"):
            shutil.rmtree(self.base / name, ignore_errors=True)
        (self.base / "output").mkdir()
        with tarfile.open(self.base / "sourcedir.tar.gz", "w:gz") as tar:
            tar.add(self.code, ".")
        directory = f'"{self.base}/sourcedir.tar.gz"'
        config = self.base / "input/config"
        config.mkdir(exist_ok=True)
        hyperparameters = {**self.hyperparameters, "sagemaker_submit_directory": directory}
        (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
        channels = {path.name: {"TrainingInputMode": "File"} for path in (self.base / "input/data").iterdir()}
        (config / "inputdataconfig.json").write_text(json.dumps(channels))
        resources = {"current_host": self.host, "hosts": self.hosts, "network_interface_name": "lo",
                     "current_instance_type": "ml.m5.large", "current_group_name": "one"}  # fmt: skip
        (config / "resourceconfig.json").write_text(json.dumps(resources))

    def start(self, command: list[str], **environment) -> subprocess.Popen:
        self.refresh()
        bin_folder = str(Path(program("platform")).parent)
        variables = {
            **os.environ, **SECRETS, "SAGEMAKER_BASE_DIR": str(self.base), "TMPDIR": str(self.base),
            "PATH": f"{self.base}:{bin_folder}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRAINING_JOB_NAME": "job", **environment,
        }  # fmt: skip
        variables.pop("PYTHONPATH", None)
        return subprocess.Popen(
            command, env=variables, cwd=self.base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def toolkit(self) -> subprocess.Popen:
        """As launch.py's v2 job starts it; the image's start_with_right_hostname.sh ends in `train`, as a child."""
        (self.base / "start_with_right_hostname.sh").write_text("train\n")
        start = train_entry.HEAR_SIGTERM.format(start="-m start_with_right_hostname.sh train")
        return self.start(["/bin/bash", "-c", start.replace("/tmp/", f"{self.base}/")])

    def inside(self, command: str, *namespaces, **environment) -> subprocess.Popen:
        """`command` where the container's folder is /opt/ml."""
        mounts = f"mount -t tmpfs tmpfs /opt && mkdir /opt/ml && mount --bind {self.base} /opt/ml"
        words = [*UNSHARE, *namespaces, "/bin/sh", "-c", f"{mounts} && cd /opt/ml && exec {command}"]
        return self.start(words, SAGEMAKER_BASE_DIR="/opt/ml", TMPDIR="/opt/ml", **environment)


UNSHARE = ["unshare", "--mount"]
AS_PROCESS_1 = ["--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture(scope="module")
def namespaces():
    if subprocess.run([*UNSHARE, *AS_PROCESS_1, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here: process 1 and /opt/ml cannot be had")


@pytest.fixture(scope="module")
def photos(test_data):
    return test_data / "flickr8k"


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    container = Container(tmp_path_factory.mktemp("unbroken"), photos, FLAGS)
    process = container.toolkit()
    log = process.communicate(timeout=300)[0]
    assert process.returncode == 0, log
    return container, log


def interrupt(process, line="'epoch': '1.", child: psutil.Process | None = None, and_also=None):
    """SIGTERM to the container's first process as soon as the log has `line`; the whole log."""
    log = []
    for text in process.stdout:
        log.append(text)
        if line in text:
            break
    else:
        raise AssertionError("".join(log))
    (child or process).send_signal(signal.SIGTERM)
    if and_also:
        and_also.send_signal(signal.SIGTERM)
    start = time.perf_counter()
    rest = process.communicate(timeout=120)[0]
    assert time.perf_counter() - start < 60
    return "".join(log) + rest


def test_the_job_trains_by_the_recipe_and_leaves_only_what_deploys(unbroken):
    container, _ = unbroken
    files = {str(path.relative_to(container.base / "model")) for path in (container.base / "model").rglob("*")}
    top = {name for name in files if "/" not in name}
    assert top == {
        "code", "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md", "coco_metrics.json", "training_curves.svg", "training_curves.png",
    }  # fmt: skip
    assert {"code/inference.py", "code/requirements.txt", "code/captioner.py"} <= files
    assert not [name for name in files if "checkpoint" in name or name.endswith((".pt", ".pth", ".bin"))]
    run = json.loads((container.base / "checkpoints/run.json").read_text())["flags"]
    assert (run["num_train_epochs"], run["captions_per_image"], run["per_device_train_batch_size"]) == (12, 5, 4)
    assert run["augment"] == ["flip", "random_resized_crop:0.5:1.0"]
    assert (container.base / "output/data/predictions.json").is_file()
    assert not (container.base / "output/failure").exists()


def test_launchs_metric_expressions_find_the_numbers_in_the_log(unbroken):
    container, log = unbroken
    found = {
        name: [float(m[1]) for line in log.splitlines() for m in [re.search(regex, line)] if m]
        for name, regex in train_entry.METRICS.items()
    }
    history = json.loads((container.base / "output/data/trainer_state.json").read_text())["log_history"]
    assert found["train:loss"] == pytest.approx([row["loss"] for row in history if "loss" in row], rel=1e-3)
    evaluations = [row["eval_CIDEr"] for row in history if "eval_CIDEr" in row]
    assert found["validation:CIDEr"] == pytest.approx(evaluations, rel=1e-3, abs=1e-9)
    assert len(found["validation:sacrebleu"]) == len(found["validation:loss"]) == 12
    scores = json.loads((container.base / "model/coco_metrics.json").read_text())
    assert found["final:CIDEr"][-1] == pytest.approx(scores["CIDEr"], abs=1e-4)
    assert found["final:sacrebleu"][-1] == pytest.approx(scores["sacrebleu"], abs=1e-4)


def test_stopped_by_sigterm_and_started_again_the_job_ends_with_the_weights_of_an_unbroken_one(
    unbroken, photos, tmp_path
):
    container = Container(tmp_path / "ml", photos, FLAGS)
    process = container.toolkit()
    log = interrupt(process)
    assert process.returncode != 0, log
    assert "SIGTERM: saved checkpoint-" in log
    assert not list((container.base / "model").glob("*"))
    process = container.toolkit()
    log = process.communicate(timeout=300)[0]
    assert process.returncode == 0, log
    assert "resuming from" in log
    assert equal_weights(unbroken[0].base / "model", container.base / "model")


def test_under_sdk_v3s_own_script_as_process_1_the_job_is_stopped_and_goes_on_alike(
    unbroken, photos, namespaces, tmp_path
):
    """The sm_drivers folder that SDK v3 uploads."""
    # SDK v3 quotes no values.
    plain = {name: json.loads(value) if value[0] == '"' else value for name, value in FLAGS.items()}
    container = Container(tmp_path / "ml", photos, {k: v for k, v in plain.items() if not k.startswith("sagemaker_")})
    command = [program("v3"), "-c", DRIVERS, str(container.code), str(container.base / "input/data/sm_drivers")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SECRETS})
    assert result.returncode == 0, result.stderr
    (container.base / "input/data/code").symlink_to("/opt/ml/bundle")
    start = train_entry.HEAR_SIGTERM.format(start="/opt/ml/input/data/sm_drivers/sm_train.sh")
    command = f"/bin/bash -c {shlex.quote(start.replace('/tmp/', '/opt/ml/'))}"

    process = container.inside(command, *AS_PROCESS_1)
    first = next(iter_children(process))
    log = interrupt(process, child=first)
    assert "SIGTERM: saved checkpoint-" in log
    process = container.inside(command, *AS_PROCESS_1)
    log = process.communicate(timeout=300)[0]
    assert process.returncode == 0, log
    assert "resuming from" in log
    assert equal_weights(unbroken[0].base / "model", container.base / "model")


def iter_children(process):
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.01)
    yield from children


# What ModelTrainer writes into its sm_drivers channel for launch.py's SourceCode.
DRIVERS = """
import shutil, sys, tempfile
from sagemaker.train.model_trainer import ModelTrainer
from sagemaker.train.configs import SourceCode
import sagemaker.core.utils.install_requirements as install
from sagemaker.train.constants import SM_DRIVERS_LOCAL_PATH
code, target = sys.argv[1:]
shutil.copytree(SM_DRIVERS_LOCAL_PATH, target)
shutil.copy2(install.__file__, target + "/scripts/install_requirements.py")
class Trainer:
    hyperparameters, _jumpstart_config = {}, None
source = SourceCode(source_dir=code, requirements="requirements.txt", command="$SM_PYTHON_CMD sagemaker/train_entry.py")
class Folder:
    name = target
ModelTrainer._prepare_train_script(Trainer, tmp_dir=Folder, source_code=source)
ModelTrainer._write_source_code_json(Trainer, tmp_dir=Folder, source_code=source)
ModelTrainer._write_distributed_json(Trainer, tmp_dir=Folder)
"""


HOSTS = ("127.0.0.1", "127.0.0.2")


def start_machines(containers) -> list[subprocess.Popen]:
    """As the toolkit would start them; it is left out, as two of them share a machine's name here."""
    command = f"{program('platform')} bundle/sagemaker/train_entry.py"
    port = str(free_port())
    return [container.inside(command, SM_MASTER_PORT=port) for container in containers]


def train_on(containers) -> None:
    processes = start_machines(containers)
    logs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)


@pytest.fixture(scope="module")
def two_machines(photos, namespaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    containers = [Container(folder / host, photos, FLAGS, HOSTS, host) for host in HOSTS]
    train_on(containers)
    return [container.base for container in containers]


def test_two_machines_train_one_model_and_the_first_one_leaves_it(two_machines, photos):
    one, two = two_machines
    assert not list((two / "model").glob("*"))
    assert {path.name for path in (two / "checkpoints").rglob("*") if path.is_file()} == {"rng_state_1.pth"}
    state = json.loads((one / "checkpoints/trainer_state.json").read_text())
    assert state["max_steps"] == 12 * 3  # 24 images, 4 a step and machine
    before, after = weights(one / "input/model"), weights(one / "model")
    assert not all(before[name].equal(after[name]) for name in before)


def test_the_second_machine_captions_its_share_with_the_best_weights_too(two_machines, photos):
    one, _ = two_machines
    state = json.loads((one / "checkpoints/trainer_state.json").read_text())
    assert state["best_global_step"] < state["max_steps"]
    assert equal_weights(one / "checkpoints" / f"checkpoint-{state['best_global_step']}", one / "model")
    assert not equal_weights(one / "checkpoints" / f"checkpoint-{state['max_steps']}", one / "model")
    records = data.load(str(photos), max_samples={"test": 4})["test"]
    captions = Captioner.from_pretrained(str(one / "model"), bf16=False).caption_split(records)
    assert predictions(one) == captions


def predictions(base: Path) -> dict[str, str]:
    return {row["image_id"]: row["caption"] for row in json.loads((base / "output/data/predictions.json").read_text())}


def test_two_machines_stopped_by_sigterm_go_on_from_what_s3_keeps_of_both(two_machines, photos, tmp_path):
    containers = [Container(tmp_path / host, photos, FLAGS, HOSTS, host) for host in HOSTS]
    first, second = start_machines(containers)
    log = interrupt(first, and_also=second)
    assert "SIGTERM: saved checkpoint-" in log
    second.communicate(timeout=60)
    assert first.returncode
    assert second.returncode
    # Both folders are kept under one S3 prefix, and two new machines get all of it.
    for container in containers:
        shutil.copytree(container.base / "checkpoints", tmp_path / "s3", dirs_exist_ok=True)
    for container in containers:
        shutil.rmtree(container.base / "checkpoints")
        shutil.copytree(tmp_path / "s3", container.base / "checkpoints")
    train_on(containers)
    assert equal_weights(two_machines[0] / "model", containers[0].base / "model")
    assert predictions(two_machines[0]) == predictions(containers[0].base)


@pytest.mark.parametrize(
    ("hyperparameters", "reason"),
    [
        ({**FLAGS, "learning_rat": "1"}, "unrecognized argument: --learning_rat. Did you mean --learning_rate?"),
        ({**FLAGS, "recipe": '"mine.yaml"'}, "there is no mine.yaml in the source bundle"),
    ],
)
def test_a_failure_is_written_down_with_its_reason(hyperparameters, reason, photos, tmp_path):
    container = Container(tmp_path / "ml", photos, hyperparameters)
    process = container.toolkit()
    log = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert reason in (container.base / "output/failure").read_text()[:1024], log


# ---------------------------------------------------------------- without any environment


def folder_of(path: Path, **files) -> Path:
    for name, text in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_hyperparameters_are_read_as_both_sdks_write_them(tmp_path):
    values = {"learning_rate": "5e-5", "bf16": '"True"', "augment": '["flip", "crop"]', "prompt": '"a \\"b\\""',
              "sagemaker_program": "x", "license": "null", "tf32": ""}  # fmt: skip
    path = tmp_path / "hyperparameters.json"
    path.write_text(json.dumps(values))
    flags, recipe = train_entry.read_hyperparameters(path)
    assert flags == {"learning_rate": "5e-5", "bf16": "True", "augment": ["flip", "crop"], "prompt": 'a "b"'}
    assert recipe == []


def write_split_channels(folder: Path, name: str, image_key: str) -> None:
    """A channel a split, each with its own photos beside a file `name` of rows that call them `image_key`."""
    file = tiny.write_photos(folder / "all", CAPTIONS, SPLITS)
    for row in map(json.loads, file.read_text().splitlines()):
        channel = folder / "data" / row["split"]
        channel.mkdir(parents=True, exist_ok=True)
        (file.parent / row["image"]).rename(channel / row["image"])
        with open(channel / name, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({image_key: row["image"], "captions": row["captions"]}) + "\n")


@pytest.mark.parametrize(("name", "image_key"), [("captions.jsonl", "image"), ("metadata.jsonl", "file_name")])
def test_channels_of_splits_are_one_dataset(name, image_key, tmp_path):
    write_split_channels(tmp_path, name, image_key)
    found = data.load(train_entry.flags_of_channels(tmp_path)["dataset_name"])
    assert {split: len(found[split]) for split in found} == {"train": 12, "validation": 2, "test": 2}


def test_a_lone_file_of_captions_is_the_dataset_of_its_channel(tmp_path):
    tiny.write_photos(tmp_path / "data" / "data", CAPTIONS, SPLITS)
    found = data.load(train_entry.flags_of_channels(tmp_path)["dataset_name"])
    assert {split: len(found[split]) for split in found} == {"train": 12, "validation": 2, "test": 2}


@pytest.mark.parametrize(
    ("channels", "said"),
    [(("data", "train"), "exclude each other"), (("validation", "test"), "lack train")],
)
def test_channels_that_contradict_are_an_error(channels, said, tmp_path):
    for channel in channels:
        (tmp_path / "data" / channel).mkdir(parents=True)
    with pytest.raises(ValueError, match=said):
        train_entry.flags_of_channels(tmp_path)


def test_a_machine_starts_as_many_processes_as_it_has_gpus(tmp_path, monkeypatch):
    path = tmp_path / "resourceconfig.json"
    path.write_text(
        json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"], "network_interface_name": "e0"})
    )
    monkeypatch.setenv("SM_NUM_GPUS", "4")
    machines = train_entry.Machines(path)
    words = " ".join(machines.launcher()[1:])
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr algo-1 --master_port 7777" in words
    assert machines.environment()["NCCL_SOCKET_IFNAME"] == "e0"


def test_the_bundle_has_no_data_caches_or_secrets(tmp_path):
    count, size = bundle.write_job(tmp_path / "job", None)
    names = {str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").rglob("*") if path.is_file()}
    assert len(names) == count
    assert size < 1.5 * 2**20
    assert max(path.stat().st_size for path in (tmp_path / "job").rglob("*")) < 2**16
    assert {"train.py", "export.py", "requirements.txt", "data/sources.py", "sagemaker/train_entry.py"} <= names
    assert not [name for name in names if name.startswith((".", "tests", "runs")) or "__pycache__" in name]


@pytest.mark.parametrize("requirements", ["requirements.txt", "sagemaker/requirements-serving.txt"])
def test_the_containers_own_torch_fits_and_stays(requirements, tmp_path):
    """pip, asked what it would install where torch is that of the image."""
    version = "2.8.0" if requirements == "requirements.txt" else "2.6.0"
    folder_of(
        tmp_path / f"torch-{version}.dist-info", METADATA=f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", "-r", requirements]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["install"] == []

"""Machines that are not this one: no POSIX, no float64 on the device, little shared memory, containers' limits.

At commit 2ee57a4 each of these failed, but for the lints.
"""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT

import common.limits
import common.loaders
from common.caches import use_writable_cache
from common.errors import UserError

CODE = [path for path in ROOT.rglob("*.py") if not {".venv", "tests", ".venv-sagemaker"} & set(path.parts)
        and "venv" not in str(path.relative_to(ROOT))]  # fmt: skip

# Runs a script on a machine without POSIX: its modules cannot be imported by our files, os lacks what Windows lacks,
# processes are spawned, output goes to a code page, and text files opened without an encoding are errors.
WINDOWS = """
import multiprocessing, os, runpy, sys, warnings
ROOT = {root!r}
REFUSED = {{"fcntl", "resource", "pwd", "grp", "termios"}}

def ours():
    frame = sys._getframe(2)
    while frame and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    file = frame.f_code.co_filename if frame else ""
    return file.startswith(ROOT) and "site-packages" not in file  # an environment may lie in the repo

class NoPosix:
    def find_spec(self, name, path=None, target=None):
        if name in REFUSED and ours():
            raise ModuleNotFoundError(f"No module named {{name!r}}")

def uname():
    if ours():
        raise AttributeError("module 'os' has no attribute 'uname'")
    return real_uname()

if __name__ == "__main__":
    for name in REFUSED:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, NoPosix())
    real_uname, os.uname = os.uname, uname
    multiprocessing.set_start_method("spawn")
    warnings.filterwarnings("error", category=EncodingWarning, module="(?:common|data|models|metrics|objectives|training|reports|__main__)")
    sys.argv = sys.argv[1:]
    sys.path[0] = ROOT
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_windows(folder: Path, script: str, *words) -> subprocess.CompletedProcess:
    (folder / "windows.py").write_text(WINDOWS.format(root=str(ROOT)), encoding="utf-8")
    command = [sys.executable, "-X", "warn_default_encoding", str(folder / "windows.py"), str(ROOT / script)]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, words)], capture_output=True, env=environment, timeout=600)


@pytest.mark.slow
def test_train_and_infer_run_without_posix(tmp_path):
    captions = {f"photo{i}": ["a red circle", "火 ☺ the blue square"] for i in range(5)}
    splits = dict(zip(captions, ["train", "train", "validation", "validation", "test"], strict=True))
    data = tiny.write_photos(tmp_path / "photos", captions, splits)
    result = on_windows(
        tmp_path, "train.py", "--model_config", tiny.write_config(tmp_path), "--tokenizer_vocab",
        tiny.write_vocabulary(tmp_path), "--dataset_name", data, "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--eval_strategy", "steps", "--save_strategy", "steps", "--dataloader_num_workers", 1, "--meteor", "false",
        "--spice", "false", "--bootstrap_samples", 0, "--num_beams", 1, "--max_new_tokens", 3,
        "--per_device_eval_batch_size", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # A file name that the code page cannot print.
    (tmp_path / "photos" / "photo3.png").rename(tmp_path / "photos" / "火.png")
    result = on_windows(tmp_path, "infer.py", tmp_path / "photos" / "火.png", "--model_name_or_path", tmp_path / "out")
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert "火.png" in result.stdout.decode("utf-8")


def test_text_files_are_opened_with_an_encoding():
    """What PLW1514 of ruff does not see: methods of objects whose type it cannot infer."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keywords = {keyword.arg for keyword in node.keywords}
                if node.func.attr in ("read_text", "write_text") and "encoding" not in keywords:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


class Mps(torch.overrides.TorchFunctionMode):
    """Refuses our own code float64 with a device named, or made from a tensor that was not brought to the CPU first."""

    def __init__(self):
        super().__init__()
        self.on_cpu, self.looked_at = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        caller = sys._getframe(1)
        if str(ROOT) in caller.f_code.co_filename and "venv" not in caller.f_code.co_filename:
            self.looked_at += 1
            wide = kwargs.get("dtype") is torch.float64 or torch.float64 in args
            if wide and kwargs.get("device") is not None:
                raise TypeError(f"float64 on a device: {name}")
            widened = name == "double" or (name == "to" and wide)
            if widened and not any(args[0] is tensor for tensor in self.on_cpu):
                raise TypeError("Cannot convert a MPS Tensor to float64")
            if name == "to" and args[0].dtype is torch.float64:
                raise TypeError("Cannot convert a float64 tensor to MPS")
        result = function(*args, **kwargs)
        if name == "cpu":
            self.on_cpu.append(result)
        return result


@pytest.mark.parametrize("objective", ["cross_entropy", "scst"])
def test_training_and_evaluation_put_no_float64_on_the_device(objective, tmp_path, monkeypatch):
    import train

    captions = {f"photo{i}": ["a red circle", "the blue square"] for i in range(4)}
    splits = {"photo0": "train", "photo1": "train", "photo2": "validation", "photo3": "test"}
    words = ["--dataset_name", tiny.write_photos(tmp_path / "photos", captions, splits), "--output_dir", tmp_path / "out",
             "--max_steps", 1, "--eval_strategy", "steps", "--save_strategy", "steps", "--meteor", "false", "--spice",
             "false", "--bootstrap_samples", 0, "--num_beams", 1, "--max_new_tokens", 3, "--report_to", "none",
             "--report", "false", "--logging_steps", 1, "--model_name_or_path", tiny.build_folder(tmp_path),
             "--objective", objective, "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    mode = Mps()
    with mode:
        train.main()
    assert mode.looked_at > 100


def test_a_device_that_is_not_there_is_one_line():
    from common.processes import use_device

    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    absent = next(name for name in ("mps", "cuda") if name != there)
    with pytest.raises(UserError, match=f"--device {absent}: torch finds none"):
        use_device(absent)


def test_more_processes_than_gpus_are_refused_where_they_would_share_one(monkeypatch):
    from common.processes import check_gpus, own_share

    place = {"LOCAL_RANK": "1", "RANK": "1", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3", "ACCELERATE_USE_CPU": ""}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for gpus in (3, 8):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda gpus=gpus: gpus)
        check_gpus()
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes were started, and this machine has GPUs for 2"):
        check_gpus()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_gpus()
    own_share()  # work that is not shared: they may sit on one GPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    check_gpus()


# ---------------------------------------------------------------------------------------------------------- containers


def write_cgroup(folder: Path, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n", encoding="utf-8")


def test_limits_of_cgroups_of_both_versions_count(tmp_path, monkeypatch):
    machine = common.limits.cpus(), common.limits.free_memory()
    monkeypatch.setattr(common.limits, "CGROUPS", tmp_path / "v2")
    gib = 2**30
    write_cgroup(tmp_path / "v2", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert common.limits.cpus() == machine[0]
    assert common.limits.free_memory() == pytest.approx(machine[1], rel=0.5)
    write_cgroup(tmp_path / "v2", cpu__max="50000 100000", memory__max=str(gib), memory__current=str(gib // 2),
                 memory__stat=f"anon 5\ninactive_file {gib // 4}")  # fmt: skip
    assert common.limits.cpus() == 1
    assert common.limits.free_memory() == gib - gib // 2 + gib // 4
    monkeypatch.setattr(common.limits, "CGROUPS", tmp_path / "v1")
    write_cgroup(tmp_path / "v1" / "cpu", **{"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"})
    write_cgroup(tmp_path / "v1" / "memory", memory__limit_in_bytes=str(gib), memory__usage_in_bytes=str(gib // 2))
    assert common.limits.cpus() == 1
    assert common.limits.free_memory() == gib // 2


class Photos(torch.utils.data.Dataset):
    """Samples of 1 MB."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((250_000,), float(index))


def loaded(**options):
    return [batch[:, 0].tolist() for batch in common.loaders.data_loader(Photos(), None, batch_size=4, **options)]


@pytest.mark.parametrize(("megabytes", "workers"), [(1, 0), (16, 0), (32, 1), (64, 2)])
def test_workers_are_bounded_by_shared_memory(megabytes, workers, caplog, monkeypatch):
    """With a real tmpfs of that size where this may be mounted; 1 MB has no room for a batch of 4 MB."""
    script = (
        "import sys; sys.path[:0] = ['tests/scripts', 'tests/helpers', 'tests', '.']; import logging; logging.basicConfig()\n"
        "import test_platforms as t, common.loaders as l\n"
        "print(l.fit_workers(t.Photos(), None, 4, 2)[0], t.loaded(num_workers=2) == t.loaded(num_workers=0))"
    )
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.split() == [str(workers), "True"], result.stderr
    assert ("--shm-size" in result.stderr) == (megabytes < 64)


def test_there_are_no_more_workers_than_batches():
    wanted = {64: 0, 32: 2, 16: 4, 8: 5}  # batch size: workers, of 5
    assert {
        n: common.loaders.data_loader(Photos(), None, batch_size=n, num_workers=5).num_workers for n in wanted
    } == wanted


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_is_an_error(stop, monkeypatch):
    monkeypatch.setattr(common.loaders, "TIMEOUT", 3)
    batches = iter(common.loaders.data_loader(Photos(), None, batch_size=4, num_workers=1))
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, stop)
    started = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="DataLoader "):
            list(batches)
        assert time.monotonic() - started < 30
    finally:
        worker.kill()


def test_every_loader_of_the_repo_has_a_time_out():
    """DataLoader itself is called in one place; the Trainer's own is given its time-out after that."""
    own = [str(path.relative_to(ROOT)) for path in CODE if "DataLoader(\n" in path.read_text(encoding="utf-8")
           or " DataLoader(" in path.read_text(encoding="utf-8")]  # fmt: skip
    assert [path for path in own if not path.startswith("benchmarks")] == ["common/loaders.py"]


CHECKED = """
import os, signal, sys
from arguments import TRAIN_GROUPS
from common.cli import check
check(TRAIN_GROUPS, sys.argv[1:])
"""


def test_a_script_without_a_home_keeps_its_caches_in_its_output(tmp_path):
    without = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "HF_HOME")}
    (tmp_path / "home").write_text("no folder", encoding="utf-8")
    code = CHECKED + "print(os.environ['XDG_CACHE_HOME'], os.environ['MPLCONFIGDIR'])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--output_dir", str(tmp_path / "out")],
        cwd=ROOT, env=without | {"HOME": str(tmp_path / "home")}, capture_output=True, text=True,
    )  # fmt: skip
    cache = tmp_path / "out/.cache"
    assert done.stdout.split() == [str(cache), str(cache / "matplotlib")], done.stderr
    assert done.stderr.count("cannot be written to") == 1


def test_a_machine_without_a_folder_for_temporary_files_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder", encoding="utf-8")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end, whatever is set here
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"^No usable temporary directory found in .*Set TMPDIR to a folder"):
        use_writable_cache(None)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_whatever_is_written_has_the_permissions_of_any_new_file(umask, tmp_path):
    """mkstemp and safetensors (0.8) make files for their owner alone."""
    code = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "from common.files import share_weights, write_text\n"
        "folder = Path(sys.argv[1]); open(folder / 'plain', 'w').close()\n"
        "write_text(folder / 'report.html', 'a'); save_file({'a': torch.ones(1)}, folder / 'a.safetensors')\n"
        "share_weights(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, umask=umask, capture_output=True)
    assert done.returncode == 0, done.stderr
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("plain", "report.html", "a.safetensors"), oct(0o666 & ~umask))


def test_process_1_of_a_container_ends_when_told_from_its_first_second(tmp_path):
    """The system ignores a SIGTERM to process 1 that has no handler, and torch's import takes seconds."""
    code = CHECKED + "assert os.getpid() == 1; os.kill(1, signal.SIGTERM); print('still here')"
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", code, "--output_dir", str(tmp_path)]
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here: process 1 cannot be had")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr


def test_caches_go_to_the_output_where_there_is_no_home(tmp_path, monkeypatch, capsys):
    (tmp_path / "home").write_text("no folder", encoding="utf-8")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end, whatever is set here
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    use_writable_cache(str(tmp_path / "out"))
    assert "XDG_CACHE_HOME" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    use_writable_cache(str(tmp_path / "out"))
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "out" / ".cache")
    assert "HF_HOME" in capsys.readouterr().err
    monkeypatch.delenv("XDG_CACHE_HOME")

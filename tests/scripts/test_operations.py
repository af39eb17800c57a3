"""What people who run the scripts as jobs rely on: exit codes, logs, and what the pages say of them."""

import errno
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

from captioning import writers
from common import cli, provenance
from common.errors import BelowThreshold, DataError, Unreachable, UserError
from jobs import queue
from jobs.shards import ShardFolder
from training.signals import Stopped

ENDS = [
    (UserError("no such flag"), 2, "x.py: no such flag"),
    (DataError("a.csv, line 2: no caption"), 2, "x.py: a.csv, line 2: no caption"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv"), 2, "x.py: a.csv: No such file or directory."),
    (OSError(errno.ENOSPC, "No space left on device", "a.csv"), 2, "x.py: the disk is full."),
    (BelowThreshold("fail_under: CIDEr is 0.1"), 3, "x.py: fail_under: CIDEr is 0.1"),
    (Unreachable("s3://bucket: no answer"), 1, "x.py: s3://bucket: no answer"),
    (ConnectionError("no route"), 1, "x.py: the Hub could not be reached, or refused the request: no route. What"),
    (RuntimeError("DataLoader worker (pid 3) is killed"), 1, "x.py: DataLoader worker (pid 3) is killed"),
    (KeyboardInterrupt(), 130, "x.py: stopped."),
    (Stopped(15), 143, "x.py: stopped."),
    (Stopped(10), 138, "x.py: stopped."),
]  # fmt: skip


def test_each_end_has_the_exit_code_of_the_page(capsys):
    for error, code, line in ENDS:
        with pytest.raises(SystemExit) as ended, cli.mistakes_in_one_line("x.py"):
            raise error
        assert ended.value.code == code, error
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(line)
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)( \+ n)? \|", page, re.MULTILINE)
    assert {int(number) for number, _ in rows} == {0, 128} | {min(code, 128) for _, code, _ in ENDS}
    assert all(str(code) in page for _, code, _ in ENDS if code > 128)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), cli.mistakes_in_one_line("x.py"):
        raise KeyError("ours")


def test_ctrl_c_while_the_libraries_are_imported_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch' and 'common.cli' in sys.modules:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "scenes", "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode in (-2, 130)  # the shell shows 130 for both
    assert (result.stdout, result.stderr) == ("", "train.py: stopped before it began.\n")


def test_logs_have_date_and_level_or_are_json(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (tmp_path / "r.json").write_text(json.dumps({"1": ["a dog runs"]}))
    words = ["--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", "--meteor", "false"]
    words += ["--spice", "false", "--bootstrap_samples", 0, "--output_dir", tmp_path / "out"]
    log = tiny.run("evaluate.py", *words).stderr
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) \w", log)
    assert "SPICE" not in log  # nobody asked for it
    assert f"open {tmp_path}/out/report.html" in log
    auto = [*words, "--spice", "auto", "--output_dir", tmp_path / "auto"]
    told = tiny.run("evaluate.py", *auto, CORENLP_DIR=tmp_path).stderr
    assert ["SPICE was not computed" in line for line in told.splitlines() if "SPICE" in line] == [
        True
    ]  # once, at the end
    lines = [json.loads(line) for line in tiny.run("evaluate.py", *words, "--log_format", "json").stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert any(line["level"] == "WARNING" and "Only 1 image" in line["message"] for line in lines)


def test_a_file_gets_no_bars_of_the_libraries():
    code = "import logging; from common import logs; logs.set_up(logging.INFO)\n" \
           "import datasets; datasets.Dataset.from_dict({'a': [1, 2]}).map(lambda row: {'b': 1})"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_metrics_of_training_are_fields_of_json_lines():
    record = logging.LogRecord("training.trainer", logging.INFO, "", 0, "step %d", (5,), None)
    record.fields = {"metrics": {"loss": 2.5}}
    line = json.loads(cli.logs.JsonLines().format(record))
    assert (line["message"], line["metrics"]) == ("step 5", {"loss": 2.5})


def test_the_licences_of_all_direct_dependencies_are_listed():
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8").lower().replace("_", "-")
    needed = re.findall(r"^([A-Za-z0-9_]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(needed) > 20
    assert not [name for name in needed if f"| {name.lower().replace('_', '-')} |" not in page]


def test_the_lock_has_the_versions_that_the_tests_run_with():
    def pins(file):
        text = (ROOT / file).read_text(encoding="utf-8")
        return {
            name.lower().replace("_", "-"): v for name, v in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
        }

    lock, constraints = pins("requirements.lock"), pins("constraints.txt")
    needed = re.findall(r"^([A-Za-z0-9_]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.lower().replace("_", "-") for name in needed} <= lock.keys()
    assert {name: v for name, v in lock.items() if constraints.get(name, v) != v} == {}
    entries = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    assert [line for line in entries if not line.startswith("#") and "--hash=sha256:" not in line] == []


def test_a_notebooks_plotting_back_end_is_not_needed():
    environment = {**os.environ, "MPLBACKEND": "module://a_notebooks.backend"}
    code = "from reports.plots import _pyplot; print(_pyplot().get_backend())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip().lower()) == (0, "agg"), done.stderr


@pytest.mark.parametrize("secret", ["it's mine", "two words", '"', "a'b'c"])
def test_no_part_of_a_secret_is_in_a_recorded_command(secret, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--hub_token", secret, "--seed", "1"])
    assert provenance.environment()["command"] == "python train.py --hub_token '***' --seed 1"


def test_an_empty_folder_is_no_output_and_a_full_disk_ends_a_run(tmp_path):
    (tmp_path / "tars").mkdir()
    folder = ShardFolder(str(tmp_path / "tars"), single=True)
    folder.check()
    (tmp_path / "tars/0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="exists already"):
        folder.check()
    writers.check_tars([])

    def write():
        raise OSError(errno.ENOSPC, "There is not enough space on the disk")  # as Windows says it

    assert queue.attempt(write, None).ends_run

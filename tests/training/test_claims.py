"""Two runs in one output folder: the second is refused while the first one runs, and only then."""

import errno
import multiprocessing
import os
import re
import signal
import time

import pytest
import tiny
from small_run import checkpoints, flags

from common import locks

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="Windows has no such locks")


def take(path, answers, done):
    try:
        held = locks.hold(path)
        answers.put(held[1])
    except locks.Busy:
        answers.put("busy")
    done.wait(60)


def ask_another(path, context):
    answers, done = context.Queue(), context.Event()
    process = context.Process(target=take, args=(path, answers, done))
    process.start()
    return answers.get(timeout=60), process


def test_a_lock_is_one_processs_until_it_is_closed_or_the_process_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    file, locked = locks.hold(tmp_path / "lock")
    assert locked
    answer, process = ask_another(tmp_path / "lock", context)
    process.kill()
    assert answer == "busy"
    file.close()
    answer, process = ask_another(tmp_path / "lock", context)
    assert answer is True
    with pytest.raises(locks.Busy):
        locks.hold(tmp_path / "lock")
    process.kill()
    process.join()
    assert locks.hold(tmp_path / "lock")[1]


def holder(path, told):
    file, _ = locks.hold(path)
    file.write("unwritten")
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    told.send(worker.pid)
    time.sleep(60)


def test_a_workers_life_does_not_prolong_the_lock_of_its_killed_parent(tmp_path):
    context = multiprocessing.get_context("fork")
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=holder, args=(tmp_path / "lock", told))
    process.start()
    worker = heard.recv()
    with pytest.raises(locks.Busy):
        locks.hold(tmp_path / "lock")
    process.kill()
    process.join()
    os.kill(worker, 0)  # it is still there
    assert locks.hold(tmp_path / "lock")[1]
    os.kill(worker, signal.SIGKILL)
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_process(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    file, locked = locks.hold(tmp_path / "lock")
    assert not locked
    file.write("usable")


def test_a_second_run_is_refused_while_the_first_one_runs(dataset, tmp_path):
    out = tmp_path / "out"
    words = flags(tmp_path, dataset, out, report="false", num_train_epochs=4)
    first = tiny.start("train.py", *words)
    next(line for line in first.stdout if "'epoch': '1." in line)
    first.send_signal(signal.SIGSTOP)
    for changed in ([], ["--learning_rate", "5e-3"]):
        refused = tiny.run("train.py", *words, *changed, fails=True)
        assert refused.stderr.strip().splitlines()[-1] == (
            f"train.py: output_dir {out}: another run is writing there. Name another --output_dir, or stop that one first."
        )
    first.kill()
    first.wait()
    done = tiny.run("train.py", *words)
    assert "resuming from" in done.stderr
    assert "has no locks" not in done.stderr
    assert not re.search(r"trainer: step \d", done.stderr), "those lines are for --log_format json"
    assert len(checkpoints(out)) == 2


def test_in_two_processes_too(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    file, _ = locks.hold(out / ".lock")
    refused = tiny.run("train.py", *flags(tmp_path, dataset, out), processes=2, fails=True)
    file.close()
    assert refused.stderr.count("another run is writing there") == 2


def test_tasks_of_srun_that_do_not_know_of_each_other_are_refused(dataset, tmp_path):
    words = flags(tmp_path, dataset, tmp_path / "out")
    refused = tiny.run("train.py", *words, fails=True, SLURM_STEP_NUM_TASKS="2")
    assert "srun started 2 tasks" in refused.stderr
    assert not (tmp_path / "out").exists()

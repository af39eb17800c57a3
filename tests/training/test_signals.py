"""train.py told to stop by SIGTERM or SIGUSR1, in a step and in an evaluation, and started again."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny
from small_run import equal_weights, flags

from training.signals import StopOnSignal

# Long enough to be hit in the middle; with dropout, whose chance must be the same after a resume.
RUN = {"num_train_epochs": 12, "save_total_limit": 50, "logging_steps": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = json.loads(json.dumps(tiny.CONFIG))
    config["text_config"] |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
    path = tmp_path_factory.mktemp("config") / "dropout.json"
    path.write_text(json.dumps(config))
    return path


def command(folder, dataset, config, output, **changed):
    return flags(folder, dataset, output, **({**RUN, "model_config": config} | changed))


@pytest.fixture(scope="module")
def unbroken(dataset, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    tiny.run("train.py", *command(folder, dataset, config, folder / "out"))
    return folder / "out"


def stop_at(words, line: str, stream: str = "stdout", number=signal.SIGTERM, **options):
    """A started train.py, sent a signal as soon as it prints `line`; its log and exit code."""
    process = tiny.start("train.py", *words, **options)
    next(text for text in getattr(process, stream) if line in text)
    process.send_signal(number)
    start = time.perf_counter()
    log = process.communicate(timeout=100)[1]
    assert time.perf_counter() - start < 15
    return log, process.returncode


def evaluations(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["eval_CIDEr"], row["eval_sacrebleu"]) for row in history if "eval_CIDEr" in row]


def test_a_run_stopped_by_any_of_the_signals_ends_with_the_weights_of_an_unbroken_one(
    dataset, config, unbroken, tmp_path
):
    out = tmp_path / "out"
    words = command(tmp_path, dataset, config, out)
    moments = ((signal.SIGTERM, "2."), (signal.SIGINT, "4."), (signal.SIGUSR1, "6."))
    for number, epoch in moments:
        log, code = stop_at(words, f"'epoch': '{epoch}", number=number)
        assert code == 128 + number, log
        assert f"{number.name}: saved checkpoint-" in log
        assert "Traceback" not in log
    tiny.run("train.py", *words)
    assert equal_weights(unbroken, out)
    assert evaluations(unbroken) == evaluations(out)


@pytest.mark.slow
def test_sigterm_in_an_evaluation_ends_it_at_once_and_the_next_start_makes_up_for_it(
    dataset, config, unbroken, tmp_path
):
    out = tmp_path / "out"
    words = command(tmp_path, dataset, config, out)
    # More images would change the result, so the evaluation is slowed down from outside.
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    log, code = stop_at(words, "captioning slowly", "stderr", PYTHONPATH=str(tmp_path))
    assert code == 143, log
    (checkpoint,) = out.glob("checkpoint-*")
    assert (checkpoint / "evaluation_due").is_file()
    tiny.run("train.py", *words)
    assert equal_weights(unbroken, out)
    assert evaluations(unbroken) == evaluations(out)
    one, other = (json.loads((f / "trainer_state.json").read_text()) for f in (unbroken, out))
    assert one["best_global_step"] == other["best_global_step"]


SLOW = """
import sys, time
import importlib.abc, importlib.util

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "captioner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            caption_batch = module.Captioner.caption_batch
            def slow(self, *args):
                print("captioning slowly", file=sys.stderr, flush=True)
                time.sleep(20)
                return caption_batch(self, *args)
            module.Captioner.caption_batch = slow
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Slow())
"""


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(dataset, config, tmp_path):
    # The flags of one process with the doubled batch give other rounding: compared with an unbroken run of two.
    values = {"num_train_epochs": 6, "per_device_train_batch_size": 1}
    whole, out = tmp_path / "whole", tmp_path / "out"
    tiny.run("train.py", *command(tmp_path, dataset, config, whole, **values), processes=2)
    words = command(tmp_path, dataset, config, out, **values)
    log, code = stop_at(words, "'epoch': '2.", processes=2)
    assert code != 0
    assert "SIGTERM: saved checkpoint-" in log
    tiny.run("train.py", *words, processes=2)
    assert equal_weights(whole, out)


def test_in_a_thread_as_of_a_notebook_a_run_begins_and_hears_no_signal():
    def begin_and_end():
        stop = StopOnSignal()
        stop.on_train_begin(SimpleNamespace(world_size=1), None, None)
        stop.on_train_end(None, None, None)

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(begin_and_end).result()
    assert signal.getsignal(signal.SIGTERM) == before

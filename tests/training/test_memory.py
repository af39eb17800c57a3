"""train.py --dry_run: what it prints comes from the config alone, and is near what a training step takes."""

import ctypes
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from PIL import Image

from collator import CaptionCollator
from common.processes import M_MMAP_THRESHOLD
from models.families import family_of
from models.loading import ready, without_weights
from objectives import caption_loss
from training.memory import Plan, plan

WIDE = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 3, "num_attention_heads": 5}
BATCH, LENGTH = 64, 16


def widen(setitem) -> None:
    """Makes families of some ten million weights, so that what the libraries take does not count."""
    for sizes, more in ((families.VISION, {}), (families.DECODER, {}), (families.LLAMA, {"num_key_value_heads": 5})):
        for name, value in (WIDE | more).items():
            setitem(sizes, name, value)
    setitem(families.LLAMA, "head_dim", 64)


def settings(checkpointing: bool) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=1, autocast_dtype=None, optim="adamw_torch", gradient_accumulation_steps=1,
        per_device_train_batch_size=BATCH, gradient_checkpointing=checkpointing, activation_checkpointing=checkpointing,
    )  # fmt: skip


def memory(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def measure(name: str, checkpointing: bool) -> int:
    """Bytes that two training steps take, those of the weights among them. For a process of its own, whose allocator gives
    back what is freed: what it keeps would come on top, and what others left free in it would not be counted."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    widen(dict.__setitem__)
    model, processor = families.build(name)
    collator = CaptionCollator(processor, model.config, max_txt_len=LENGTH)
    picture = Image.effect_noise((640, 480), 50).convert("RGB")
    record = {"image": picture, "image_id": "0", "captions": ["a dog runs " * LENGTH], "epoch": 0}
    batch = collator([record] * BATCH)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = memory("VmRSS") - sum(one.nbytes for one in model.parameters())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        caption_loss(model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
@pytest.mark.parametrize("name", ["llava"])
def test_the_estimate_is_within_a_quarter_of_what_a_step_takes(name, checkpointing, monkeypatch):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        found = alone.submit(measure, name, checkpointing).result()
    widen(monkeypatch.setitem)
    model, processor = families.build(name)
    collator = CaptionCollator(processor, model.config, max_txt_len=LENGTH)
    empty = ready(without_weights(family_of(model.config).model_class, model.config, "float32"), processor)
    planned = plan(empty, collator, settings(checkpointing), 1, LENGTH, None)
    assert planned.parameters == sum(one.numel() for one in model.parameters())
    assert planned.training == pytest.approx(found, rel=0.25)
    if not checkpointing:
        assert planned.activations > 0.1 * found  # the test is of activations too


def test_a_plan_says_what_the_device_has_and_whether_it_fits():
    gib = 2**30
    planned = Plan(1000, 10, 2 * gib, gib, gib, gib, 0, 0)
    fits, too_small = planned.lines(6 * gib, 1)[-1], planned.lines(5.4 * gib, 1)[-1]
    assert " ".join(fits.split()) == "this device has 6.00: it fits, with a tenth left for the libraries"
    assert " ".join(too_small.split()) == "this device has 5.40: it does not fit, with a tenth left for the libraries"
    assert planned.lines(None, 1)[-1].split() == ["evaluation,", "in", "all", "3.00"]

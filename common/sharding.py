"""Weights sharded across processes (FSDP2, ZeRO-3): whether the launch asked for it, and how to gather them."""

import contextlib
import os

from torch.distributed.fsdp import FSDPModule


def strategy() -> str | None:
    """What `accelerate launch --config_file` asked for: "FSDP", "ZeRO-1" to "ZeRO-3", or None, if each process has the
    whole model."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return None


@contextlib.contextmanager
def gathered(model):
    """Inside, every process has all weights of a sharded `model`, in the precision that they are computed in, and may run
    it or any part of it independently, any number of times: processes may caption different numbers of images. All
    processes enter together. A model that is not sharded, or gathered already, stays as it is.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if getattr(model, "is_gathered", False) or not (units or hasattr(model, "zero3_offload")):
        yield model
        return
    model.is_gathered = True
    try:
        with _gathered_by_fsdp(model, units) if units else _gathered_by_zero(model):
            yield model
    finally:
        model.is_gathered = False


@contextlib.contextmanager
def _gathered_by_fsdp(model, units: list):
    for unit in units:
        unit.reshard()  # what an earlier pass left gathered may be out of date
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


@contextlib.contextmanager
def _gathered_by_zero(model):
    """The same for ZeRO-3, whose hooks would release what a module has used (as TRL does it for generation)."""
    import deepspeed

    offload = model.zero3_offload()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)

"""Shared by the benchmarks: model, timing, peak memory and result files. Run one from the repo's root:

python -m benchmarks.speed.captioning
"""

import os
import statistics
import time
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from common.files import write_json
from common.processes import CPUINFO
from common.provenance import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def blip_base(tiny: bool = False) -> BlipForConditionalGeneration:
    """The architecture of Salesforce/blip-image-captioning-base (12 heads in the text decoder), random weights; `tiny`, with
    two narrow layers, is for testing the benchmarks themselves."""
    torch.manual_seed(0)
    text, vision = {"num_attention_heads": 12}, {"image_size": 384, "initializer_range": 0.02}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text, vision = sizes | {"encoder_hidden_size": 32}, vision | sizes | {"patch_size": 96}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes faster in bfloat16 than in float32: a GPU if torch says so, and a processor with
    AVX-512 BF16 or AMX. On other processors bfloat16 is emulated, and several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu" or not CPUINFO.exists() or not torch.backends.mkldnn.is_available():
        return False
    flags = next((line for line in CPUINFO.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def summary(seconds: dict[str, list[float]], items: int) -> dict:
    """Rates (items per second) of alternating runs of "peer" and "ours": medians, spread, ratio of the medians."""
    rates = {name: [items / value for value in values] for name, values in seconds.items()}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}
        for name, values in rates.items()
    } | {"ratio": statistics.median(rates["ours"]) / statistics.median(rates["peer"])}


def device_memory(device: str, function) -> float | None:
    """Peak GPU memory in MiB while `function` runs, weights included; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def timed(function, device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_mib(device: str) -> float:
    """Peak memory of this process in MiB: on the GPU, or main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage's ru_maxrss: a child process inherits its parent's.
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 2**10


def write_result(path: Path, result: dict) -> None:
    write_json(path, {**result, "load_average": os.getloadavg()[0], **environment()})
    print(f"Written to {path}")

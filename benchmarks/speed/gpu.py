"""All GPU benchmarks in one command of less than 8 minutes, without a network:

    python -m benchmarks.speed.gpu                      # one CUDA GPU; writes benchmarks/results/gpu.json

Captioning, training, training with a frozen encoder, SCST, and SCST of a chat family: each compared with the plain way of
doing it in transformers, same weights and same work, with each side's GPU memory and its share of the limit that
roofline.py computes from the GPU's measured rates. Outputs are compared in float32 beforehand. Needs torch, transformers,
accelerate, peft, datasets and pillow, as in a PyTorch image with Hugging Face's libraries, and this repo.

A measure that fails or does not fit into the time is recorded as such and does not stop the others: the file is written
after each. `--device cpu --tiny` tests the command itself.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch

from benchmarks.harness import RESULTS, blip_base, device_memory, summary, timed, write_result
from benchmarks.speed import family_scst_step, roofline, scst_step, training_step
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.decoding import generate

MINUTES = 7  # after which no further measure is started


def turns(sides: dict, arguments, items: int) -> dict:
    """Rates and memory of the functions in `sides`, which alternate after one warm-up each."""
    memory = {name: device_memory(arguments.device, function) for name, function in sides.items()}
    if arguments.device != "cuda":
        for function in sides.values():
            function()
    seconds = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, function in sides.items():
            seconds[name].append(timed(function, arguments.device)[0])
    return summary(seconds, items) | {"seconds": seconds, "memory_mib": memory}


def agreed_losses(sides) -> dict[str, float]:
    """The losses of both sides in float32: with fewer digits, beams and samples that nearly tie are others."""
    losses = {side: sides.step(side) for side in ("peer", "ours")}
    if abs(losses["peer"] - losses["ours"]) > 1e-3 * max(abs(losses["peer"]), 1e-2):
        raise RuntimeError(f"the losses differ: {losses}")
    return losses


def equal_captions(sides) -> float:
    """The share of captions that both sides give."""
    said = [function() for function in sides.values()]
    length = max(tokens.shape[1] for tokens in said)
    peer, ours = (torch.nn.functional.pad(tokens, (0, length - tokens.shape[1])) for tokens in said)
    return (peer == ours).all(dim=1).float().mean().item()


def captioning(batch: int, arguments) -> dict:
    """Captions per second of transformers' `generate` and ours, weights in --dtype, 5 beams."""
    peer = blip_base(arguments.tiny).eval().to(arguments.device)
    ours = copy.deepcopy(peer, {id(weight): weight for weight in peer.parameters()})
    use_onednn_linear(use_fast_attention(ours))
    images = torch.randn(batch, 3, 384, 384, device=arguments.device)
    options = {"num_beams": 5, "max_new_tokens": arguments.tokens}
    sides = {
        "peer": lambda: peer.generate(pixel_values=images.to(peer.dtype), **options),
        "ours": lambda: generate(ours, pixel_values=images.to(ours.dtype), **options),
    }
    if (same := equal_captions(sides)) != 1:
        raise RuntimeError(f"in float32 {same:.0%} of the captions are the same")
    for model in (peer, ours):
        model.to(getattr(torch, arguments.dtype))
    same = equal_captions(sides)
    item = peer.dtype.itemsize
    phases = arguments.needs.captioning(batch, 5, arguments.tokens, item)
    return turns(sides, arguments, batch) | {"same_captions": same, "phases": phases}


def training(frozen: bool, arguments) -> dict:
    """Pairs per second of a step: one caption per row with eager attention, compared with captions that share their image."""
    images, captions = (2, 2) if arguments.tiny else (16, 5)
    settings = {"images": images, "captions_per_image": captions, "pad_to": 0, "gradient_checkpointing": False}
    settings = SimpleNamespace(**vars(arguments), **settings, without_onednn=False)
    sides = training_step.Sides(settings, frozen_vision=frozen)
    settings.dtype = "float32"
    difference = training_step.largest_gradient_difference(sides)
    losses = agreed_losses(sides)
    settings.dtype = arguments.dtype
    found = turns({side: lambda side=side: sides.step(side) for side in losses}, arguments, images * captions)
    phases = arguments.needs.training(images, captions, frozen, getattr(torch, arguments.dtype).itemsize)
    return found | {"losses": losses, "largest_relative_gradient_difference": difference, "phases": phases}


def scst(name: str, arguments) -> dict:
    """Steps per second of a loop like the published one and of objectives/scst.py."""
    samples, baseline, frozen = scst_step.SETTINGS[name]
    images = 2 if arguments.tiny else 8
    settings = SimpleNamespace(**vars(arguments), images=images, max_new_tokens=arguments.tokens)
    make = lambda: scst_step.Sides(settings, samples, baseline, frozen, scst_step.make_references())  # noqa: E731
    settings.dtype = "float32"
    losses = agreed_losses(make())
    settings.dtype = arguments.dtype
    sides = make()
    found = turns({side: lambda side=side: sides.step(side) for side in losses}, arguments, 1)
    greedy, item = int(baseline == "greedy"), getattr(torch, arguments.dtype).itemsize
    phases = arguments.needs.scst(images, samples, greedy, arguments.tokens, frozen, item)
    return found | {"losses": losses, "phases": phases}


def chat_family(arguments) -> dict:
    """Steps of SCST per second of a LLaVA, images encoded once per caption (peer) and once."""
    hidden, layers, images = (64, 2, 2) if arguments.tiny else (1024, 12, 4)
    settings = {"images": images, "samples": 5, "hidden": hidden, "layers": layers, "turns": arguments.repeats}
    settings |= {"max_new_tokens": arguments.tokens, "device": arguments.device, "output": arguments.output}
    found = family_scst_step.main(SimpleNamespace(**settings))
    seconds = {"peer": found["seconds"]["again"], "ours": found["seconds"]["once"]}
    return found | summary(seconds, 1) | {"seconds": seconds}


MEASURES = {
    **{f"captions, batch {n}": lambda arguments, n=n: captioning(n, arguments) for n in (1, 8, 32)},
    "training, all trained": lambda arguments: training(False, arguments),
    "training, vision frozen, features kept": lambda arguments: training(True, arguments),
    **{f"SCST, {name}": lambda arguments, name=name: scst(name, arguments) for name in scst_step.SETTINGS},
    "SCST of a chat family": chat_family,
}


def with_share(found: dict, machine: dict, dtype: str) -> dict:
    """`found` with each side's share of the machine's limit."""
    if (phases := found.pop("phases", None)) is None:
        return found
    least = roofline.limit(phases, machine["operations_per_second"][dtype], machine["bytes_per_second"])
    share = {side: least / statistics.median(times) for side, times in found["seconds"].items()}
    return found | {"limit_s": least, "operations": sum(work for work, _ in phases), "share_of_limit": share}


def run(name: str, arguments, machine: dict) -> dict:
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    started = time.perf_counter()
    try:
        found = with_share(MEASURES[name](arguments), machine, arguments.dtype)
    except Exception as error:  # the others are still measured
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    shares = "".join(f", {side} {share:.0%} of the limit" for side, share in found.get("share_of_limit", {}).items())
    print(f"{name}: {found['ratio']:.2f} times{shares} ({time.perf_counter() - started:.0f} s)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=20, help="tokens per caption")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the command itself")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU")
    datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp()  # for the document frequencies
    began = time.monotonic()
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    size = 256 if arguments.tiny else None
    machine = roofline.machine(arguments.device, dict.fromkeys(["float32", arguments.dtype]), size, seconds=1.0)
    print({name: f"{rate / 1e12:.1f} TFLOP/s" for name, rate in machine["operations_per_second"].items()})
    arguments.needs = roofline.Needs(arguments.tiny)
    measures = {}
    for name in arguments.only:
        late = time.monotonic() - began > 60 * MINUTES
        measures[name] = {"failed": "no time left"} if late else run(name, arguments, machine)
        write_result(arguments.output, {"settings": settings, "machine": machine, "measures": measures})
    if failed := [name for name, found in measures.items() if "failed" in found]:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

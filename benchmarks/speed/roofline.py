"""The limit of this machine, and each path's share of it.

    python -m benchmarks.speed.roofline

Measures the matrix-product rate in float32 and bfloat16 and the memory bandwidth, counts the minimal work of a caption and
a training step (floating-point operations of BLIP-base, counted by torch on the meta device; bytes of weights that each
decoding step and the optimizer must read), and divides the resulting time limit by the times in benchmarks/results that
were measured on the same processor model. A time limit is the sum over phases of the longer of the two: operations over
rate, bytes over bandwidth. Repeated computation counts against a side.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import RESULTS, blip_base, has_bfloat16, timed, write_result
from common.provenance import environment
from models.blip_attention import FAST, put_classes

FLOAT = 4  # bytes
ADAMW = 7  # numbers that AdamW reads and writes per weight and step: weight and both moments twice, gradient once
MEAN_LENGTH = 14  # tokens of training_step's captions, including start and end


def machine(device: str, dtypes=("float32", "bfloat16"), size: int | None = None, seconds: float = 2.0) -> dict:
    """{"operations_per_second": {dtype: best}, "bytes_per_second": best} of `device`, each tried for about `seconds`."""
    rates, asked = {}, size
    for dtype in dtypes:
        emulated = dtype == "bfloat16" and not has_bfloat16(
            torch.device(device)
        )  # 30 s for a product of the usual size
        size = asked or (8192 if device == "cuda" else 256 if emulated else 1536)
        left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        products = [lambda left=left, right=right: left @ right]
        if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
            # PyTorch's own product is MKL's; models.cpu_linear uses oneDNN's.
            products.append(lambda a=left, b=right: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
        rates[dtype] = max(2 * size**3 / _shortest(product, device, seconds) for product in products)
    source = torch.randn(2**30 // FLOAT if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copied = _shortest(lambda: target.copy_(source), device, seconds)
    return {"operations_per_second": rates, "bytes_per_second": 2 * source.numel() * FLOAT / copied}


def _shortest(function, device: str, seconds: float) -> float:
    timed(function, device)
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        times.append(timed(function, device)[0])
    return min(times)


class Needs:
    """The minimal operations and bytes of BLIP."""

    def __init__(self, tiny: bool = False):
        with torch.device("meta"):
            self.model = blip_base(tiny).eval()
        put_classes(FAST, self.model)
        self.decoder = sum(weight.numel() for weight in self.model.text_decoder.parameters())
        self.weights = sum(weight.numel() for weight in self.model.parameters())

    @torch.no_grad()
    def operations(self, images: int, rows: int, length: int) -> tuple[int, int]:
        """(encoding, decoding) forward operations of `rows` captions of `length` tokens for `images` images."""
        pixels, ids = torch.empty(images, 3, 384, 384), torch.zeros(rows, length, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as encoding:
                encoded = self.model.vision_model(pixel_values=pixels.to("meta")).last_hidden_state
            with FlopCounterMode(display=False) as decoding:
                self.model.text_decoder(input_ids=ids.to("meta"), encoder_hidden_states=encoded, use_cache=False)
        return encoding.get_total_flops(), decoding.get_total_flops()

    def captioning(self, images: int, beams: int, tokens: int, item: int = FLOAT) -> list[tuple[int, int]]:
        """(operations, bytes) of each phase: the decoder's weights are read again for each token."""
        encoding, decoding = self.operations(images, images * beams, tokens)
        return [(encoding, (self.weights - self.decoder) * item), (decoding, tokens * self.decoder * item)]

    def training(self, images: int, captions: int, frozen: bool, item: int = FLOAT) -> list[tuple[int, int]]:
        """A forward pass, a backward pass (twice the cost), and AdamW's step on the trained weights."""
        encoding, decoding = self.operations(images, images * captions, MEAN_LENGTH)
        trained = self.decoder if frozen else self.weights
        return [(3 * (decoding + (0 if frozen else encoding)), trained * item), (0, ADAMW * trained * FLOAT)]

    def scst(
        self, images: int, samples: int, greedy: int, tokens: int, frozen: bool, item=FLOAT
    ) -> list[tuple[int, int]]:
        """Encoding once, decoding samples and baseline, and a forward and backward pass over the samples."""
        encoding, drawing = self.operations(images, images * (samples + greedy), tokens)
        _, scoring = self.operations(images, images * samples, tokens)
        trained = self.decoder if frozen else self.weights
        phases = [(drawing, tokens * self.decoder * item), (3 * scoring, self.decoder * item)]
        return [*phases, (0 if frozen else 3 * encoding, 0), (0, ADAMW * trained * FLOAT)]


def limit(phases: list[tuple[int, int]], rate: float, bandwidth: float) -> float:
    """Seconds that no implementation can beat."""
    return sum(max(operations / rate, size / bandwidth) for operations, size in phases)


def measured(folder: Path) -> dict[str, tuple]:
    """{measure: (hardware, phases, {side: seconds})} of the results that have a limit."""
    needs, found = Needs(), {}

    def read(name):
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    if result := read("captioning.json"):
        beams, tokens = (result["settings"][name] for name in ("num_beams", "max_new_tokens"))
        for batch, rates in result["batches"].items():
            seconds = {side: int(batch) / rates[side]["median"] for side in ("peer", "ours")}
            found[f"captions, batch {batch}"] = (
                result["hardware"],
                needs.captioning(int(batch), beams, tokens),
                seconds,
            )
    if result := read("training_step.json"):
        images, captions = (result["settings"][name] for name in ("images", "captions_per_image"))
        for name, frozen in (("all trained", False), ("vision frozen, features kept", True)):
            seconds = {side: images * captions / result[name][side]["median"] for side in ("peer", "ours")}
            found[f"training, {name}"] = (result["hardware"], needs.training(images, captions, frozen), seconds)
    if result := read("scst_step.json"):
        images, tokens = (result["settings"][name] for name in ("images", "max_new_tokens"))
        for name, samples, greedy, frozen in (
            ("one sample, greedy baseline", 1, 1, False),
            ("one sample, greedy baseline, vision frozen", 1, 1, True),
            ("five samples, leave one out", 5, 0, False),
        ):
            seconds = {side: statistics.median(result[name]["seconds"][side]) for side in ("peer", "ours")}
            phases = needs.scst(images, samples, greedy, tokens, frozen)
            found[f"SCST, {name}"] = (result["hardware"], phases, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results to compare with the limit")
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each rate")
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.json")
    arguments = parser.parse_args()
    here = machine("cpu", seconds=arguments.seconds)
    rates, bandwidth = here["operations_per_second"], here["bytes_per_second"]
    for dtype, rate in rates.items():
        print(f"{dtype}: {rate / 1e9:.3g} GFLOP/s")
    print(f"memory: {bandwidth / 1e9:.1f} GB/s")
    shares, hardware = {}, environment()["hardware"]
    for name, (of_result, phases, seconds) in measured(arguments.results).items():
        if any(of_result.get(what) != hardware[what] for what in ("cpu", "instructions", "threads")):
            print(f"{name}: measured on another machine")
            continue
        least = limit(phases, rates["float32"], bandwidth)
        shares[name] = {"limit_s": least, "operations": sum(work for work, _ in phases), "seconds": seconds}
        shares[name]["share"] = {side: least / value for side, value in seconds.items()}
        said = ", ".join(f"{side} {value:.2f} s, {least / value:.0%}" for side, value in seconds.items())
        print(f"{name}: limit {least:.2f} s; {said}")
    write_result(arguments.output, {"machine": here, "float32": shares})


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

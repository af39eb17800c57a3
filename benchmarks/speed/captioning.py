"""Captions per second: beam search with transformers' BLIP and ours, same weights, images and token ids.

    python -m benchmarks.speed.captioning                                        # CPU, batches of 8, 1, 2 and 4
    python -m benchmarks.speed.captioning --device cuda --dtype bfloat16 --batch_sizes 1 8 32 128
    python -m benchmarks.speed.captioning --batch_sizes 1 --also all --repeats 3 --plot "" --output benchmarks/results/peers.json

BLIP-base at 384 px with random weights, which never end a caption, so each has --max_new_tokens tokens. All take turns in
one process; the result has every time, medians, spread and the machine, and docs/captioning.png plots it. `--also`
adds alternatives: transformers' model compiled or in bfloat16, ours in bfloat16, ours with int8 linear layers (torch's
dynamic quantisation), and ours as ONNX graphs in float32 and int8; `all` leaves bfloat16 out if the processor emulates it. The share of their tokens that equal
float32's is a result, not a condition.
"""

import argparse
import copy
import functools
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, ROOT, blip_base, has_bfloat16, summary, timed, write_result
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.decoding import generate
from models.onnx_export import write_graphs
from models.onnx_model import OnnxModel


def compiled(peer, ours):
    """transformers' model as its users compile it, without recompiling for each length."""
    model = copy.deepcopy(peer, {id(weight): weight for weight in peer.parameters()})
    model.vision_model.compile()
    model.text_decoder.compile(dynamic=True)
    return model


def int8(peer, ours):
    """Ours with int8 weights and activations rounded to int8 on the fly, by torch's own dynamic quantisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation warning
        model = use_onednn_linear(copy.deepcopy(ours), False)
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def onnx(peer, ours, int8=False):
    """Ours as ONNX graphs, run by ONNX Runtime."""
    model = use_onednn_linear(copy.deepcopy(ours), False)
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(model, Path(folder), int8)
        return OnnxModel(model.config, Path(folder))


ALSO = {
    "transformers, torch.compile": compiled,
    "transformers, bfloat16 weights": lambda peer, ours: copy.deepcopy(peer).to(torch.bfloat16),
    "ours, bfloat16 weights": lambda peer, ours: copy.deepcopy(ours).to(torch.bfloat16),
    "ours, int8 linear layers": int8,
    "ONNX, float32": onnx,
    "ONNX, int8": functools.partial(onnx, int8=True),
}


def share_of_same(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found == expected).float().mean().item() if found.shape == expected.shape else 0.0


def measure(turns: dict, batch_size: int, arguments) -> dict:
    """Rates of all sides, and for each side the lowest share of token ids equal to the peer's. A side
    of --also that fails is recorded with its error."""
    seconds, same, failed = {name: [] for name in turns}, {name: [] for name in turns}, {}
    for turn in range(arguments.repeats + 1):
        captions = {}
        for name in [name for name in turns if name not in failed]:
            try:
                elapsed, captions[name] = timed(turns[name], arguments.device)
            except Exception as error:
                if name not in ALSO:
                    raise
                failed[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                print(f"batch {batch_size}: {name} {failed[name]['failed']}")
                continue
            seconds[name] += [elapsed] * (turn > 0)
            same[name].append(share_of_same(captions[name], captions["peer"]))
        # In half precision near-ties fall either way, so there the share is a result, not a condition.
        if arguments.dtype == "float32" and same["ours"][-1] < 1:
            raise SystemExit(f"Batch {batch_size}: ours and transformers' token ids differ. No result.")
    numbers = summary({name: times for name, times in seconds.items() if name not in failed}, batch_size) | failed
    for name in ALSO:
        if "median" in numbers.get(name, {}):
            numbers[name]["same_tokens"] = min(same[name])
            said = f"{numbers[name]['median']:.3f} captions/s, same tokens {min(same[name]):.3f}"
            print(f"batch {batch_size}: {name} {said}")
    return numbers | {"same_tokens": min(same["ours"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 1, 2, 4], help="images per batch")
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side, after one warm-up turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--without_onednn", action="store_true", help="ours with PyTorch's own linear layers")
    parser.add_argument("--also", nargs="+", default=[], choices=["all", *ALSO], metavar="SIDE", help=", ".join(ALSO))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the benchmark itself")
    parser.add_argument("--output", type=Path, default=RESULTS / "captioning.json")
    parser.add_argument("--plot", default=str(ROOT / "docs" / "captioning.png"), help="empty: no plot")
    arguments = parser.parse_args()
    if "all" in arguments.also:
        emulated = not (arguments.tiny or has_bfloat16(torch.device(arguments.device)))  # minutes per caption
        arguments.also = [name for name in ALSO if not (emulated and "bfloat16" in name)]
    torch.set_num_threads(arguments.threads)

    peer = blip_base(arguments.tiny).eval().to(arguments.device, getattr(torch, arguments.dtype))
    ours = copy.deepcopy(peer, {id(weight): weight for weight in peer.parameters()})  # the same weights
    use_onednn_linear(use_fast_attention(ours), not arguments.without_onednn)
    others = {name: ALSO[name](peer, ours) for name in arguments.also}
    options = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens}
    result = {
        "measure": "captions per second",
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "plot")},
        "batches": {},
    }
    for batch_size in arguments.batch_sizes:
        pixel_values = torch.randn(batch_size, 3, 384, 384).to(peer.device, peer.dtype)
        turns = {
            "peer": lambda images=pixel_values: peer.generate(pixel_values=images, **options),
            "ours": lambda images=pixel_values: generate(ours, pixel_values=images, **options),
        }
        for name, model in others.items():
            turns[name] = lambda m=model, images=pixel_values: generate(m, pixel_values=images.to(m.dtype), **options)
        numbers = measure(turns, batch_size, arguments)
        result["batches"][str(batch_size)] = numbers
        print(
            f"batch {batch_size}: transformers {numbers['peer']['median']:.3f} captions/s, "
            f"ours {numbers['ours']['median']:.3f}, {numbers['ratio']:.2f} times, same tokens {numbers['same_tokens']:.3f}"
        )
    write_result(arguments.output, result)
    if arguments.plot:
        plot(result["batches"], Path(arguments.plot))


def plot(batches: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3), constrained_layout=True)
    sizes = sorted(map(int, batches))
    for side, name in (("ours", "here"), ("peer", "transformers")):
        rates = [batches[str(size)][side] for size in sizes]
        axis.fill_between(sizes, [r["min"] for r in rates], [r["max"] for r in rates], alpha=0.3)
        axis.plot(sizes, [r["median"] for r in rates], marker="o", label=name)
    axis.set(xlabel="images per batch", ylabel="captions per second", xticks=sizes)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

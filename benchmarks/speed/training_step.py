"""Fine-tuning pairs per second and peak memory of a step: a plain Trainer script's batch compared with ours.

    python -m benchmarks.speed.training_step                                     # CPU, 2 images with 5 captions per step
    python -m benchmarks.speed.training_step --device cuda --dtype bfloat16 --images 16

Both sides train BLIP-base at 384 px on the same (image, caption) pairs, with the same weights, loss and AdamW:

    peer    one caption per row, so an image is encoded once per caption; transformers' eager attention; loss from labels
    ours    the captions of an image share its encoding; fast attention; logits for target tokens only; on AMD
            processors oneDNN's matrix products (--without_onednn: PyTorch's)

With the vision encoder frozen, the peer has `requires_grad=False` there, and ours reads the features that an earlier
epoch cached. The two take turns in one process. Peak memory is measured in a separate process for each.
"""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, blip_base, peak_mib, summary, timed, write_result
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.vision import encode_images
from objectives.cross_entropy import caption_loss


def make_batch(images: int, captions: int, pad_to: int, device: str) -> dict[str, torch.Tensor]:
    """Random images and captions of 10 to 18 tokens including start and end, like most of COCO's, padded to the longest."""
    torch.manual_seed(1)
    rows = images * captions
    lengths = torch.randint(10, 19, (rows,))
    length = max(pad_to, int(lengths.max()))
    input_ids = torch.randint(1000, 30000, (rows, length))
    input_ids[:, 0] = 30522
    input_ids[torch.arange(rows), lengths - 1] = 102
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, 0] = -100
    batch = {
        "pixel_values": torch.randn(images, 3, 384, 384),
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "labels": labels,
    }
    return {name: value.to(device) for name, value in batch.items()}


class Sides:
    """A step of each side, on shared weights: with lr 0 a step costs the same and every turn stays comparable."""

    def __init__(self, arguments, frozen_vision: bool, only: str | None = None):
        self.arguments = arguments
        self.peer = blip_base(arguments.tiny).to(arguments.device).train()
        self.ours = copy.deepcopy(self.peer, {id(weight): weight for weight in self.peer.parameters()})
        use_onednn_linear(use_fast_attention(self.ours), not arguments.without_onednn)
        self.peer.vision_model.requires_grad_(not frozen_vision)
        if arguments.gradient_checkpointing:
            for model in (self.peer, self.ours):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        weights = [weight for weight in self.peer.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)
        batch = make_batch(arguments.images, arguments.captions_per_image, arguments.pad_to, arguments.device)
        if only != "peer":
            self.our_batch = dict(batch)
            if frozen_vision:
                self.our_batch["pixel_values"] = torch.cat(
                    [encode_images(self.ours, image).detach() for image in batch["pixel_values"].split(1)]
                )
        if only != "ours":
            pixel_values = batch["pixel_values"].repeat_interleave(arguments.captions_per_image, dim=0)
            self.peer_batch = batch | {"pixel_values": pixel_values}

    def step(self, side: str) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(self.arguments.device, torch.bfloat16, enabled=self.arguments.dtype == "bfloat16"):
            if side == "peer":
                loss = self.peer(**self.peer_batch).loss
            else:
                loss = caption_loss(self.ours, self.our_batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.peer.named_parameters() if p.grad is not None}


def largest_gradient_difference(sides: Sides) -> float:
    """Largest |difference| of any gradient, relative to the largest gradient of its tensor (floor 1e-6)."""
    sides.step("peer")
    theirs = sides.gradients()
    sides.step("ours")
    ours = sides.gradients()
    if ours.keys() != theirs.keys():
        raise SystemExit("Ours and the peer train different weights. No result.")
    return max(
        ((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)).item() for name, value in theirs.items()
    )


def peak_memory(arguments, side: str, frozen_vision: bool) -> dict:
    """Peak MiB of a process that runs two steps of one side (Adam's moments exist after the first)."""
    command = [sys.executable, "-m", __spec__.name, "--memory_of", side, *sys.argv[1:]] + ["--frozen"] * frozen_vision
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_memory(arguments) -> None:
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    sides = Sides(arguments, arguments.frozen, only=arguments.memory_of)
    for _ in range(2):
        sides.step(arguments.memory_of)
    # Weights, gradients and Adam's moments are needed for any batch; the rest is the cost of a batch.
    states = sum(p.numel() for p in sides.peer.parameters()) * 4
    states += 3 * sum(p.numel() for p in sides.peer.parameters() if p.requires_grad) * 4
    print(json.dumps({"peak_mib": peak_mib(arguments.device), "weights_gradients_moments_mib": states / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="images per step; pairs are images x captions")
    parser.add_argument("--captions_per_image", type=int, default=5)
    parser.add_argument(
        "--pad_to", type=int, default=0, help="shortest length of a row, both sides (0: longest caption)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side, after the comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the benchmark itself")
    parser.add_argument("--without_onednn", action="store_true", help="ours with PyTorch's own linear layers")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_step.json")
    parser.add_argument("--memory_of", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return report_memory(arguments)
    torch.set_num_threads(arguments.threads)

    pairs = arguments.images * arguments.captions_per_image
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "memory_of", "frozen")}
    result = {"measure": "pairs per second", "settings": settings}
    tolerance = 1e-3 if arguments.dtype == "float32" else 0.1
    for name, frozen_vision in (("all trained", False), ("vision frozen, features kept", True)):
        sides = Sides(arguments, frozen_vision)
        difference = largest_gradient_difference(sides)
        if difference > tolerance:
            raise SystemExit(f"{name}: gradients differ by {difference:.1e} of their size. No result.")
        seconds, losses = {"peer": [], "ours": []}, {}
        for _ in range(arguments.repeats):
            for side, values in seconds.items():
                elapsed, losses[side] = timed(lambda side=side, sides=sides: sides.step(side), arguments.device)
                values.append(elapsed)
        if abs(losses["ours"] - losses["peer"]) > tolerance:
            raise SystemExit(f"{name}: the losses differ: {losses}. No result.")
        del sides
        numbers = summary(seconds, pairs) | {"losses": losses, "largest_relative_gradient_difference": difference}
        print(
            f"{name}: peer {numbers['peer']['median']:.3f} pairs/s, ours {numbers['ours']['median']:.3f}, "
            f"{numbers['ratio']:.2f} times; losses {losses['peer']:.6f} and {losses['ours']:.6f}"
        )
        if not arguments.skip_memory:
            memory = {side: peak_memory(arguments, side, frozen_vision) for side in ("peer", "ours")}
            memory["ratio"] = memory["ours"]["peak_mib"] / memory["peer"]["peak_mib"]
            numbers["memory"] = memory
            print(
                f"{name}: peak memory {memory['peer']['peak_mib']:.0f} and {memory['ours']['peak_mib']:.0f} MiB, "
                f"{memory['ratio']:.2f} times"
            )
        result[name] = numbers
    write_result(arguments.output, result)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

"""Seconds of a step of self-critical training: a loop like the published one compared with ours, same samples, same loss.

    python -m benchmarks.speed.scst_step                                 # CPU, 2 images per step
    python -m benchmarks.speed.scst_step --device cuda --images 16

Both sides train BLIP-base at 384 px with random weights (which never end a caption: each has --max_new_tokens tokens) on
the same images, with the same rewards (CIDEr-D, five references per image) and AdamW:

    peer    a greedy generate for the baseline, a sampling generate, and a forward pass over the sampled captions, one per
            row; transformers' eager attention; the image encoder runs in each of the three
    ours    objectives/scst.py: one encoding for all three; fast attention; the samples of an image share its keys and
            values; logits for target tokens only; on AMD processors oneDNN's matrix products

Three settings: one sample with the greedy baseline, as published; the same with a frozen vision encoder (the published
loop only trains LoRA on the text side), where ours encodes images once for all epochs; and five samples that are each
other's baseline, for which the peer needs no greedy caption. The two take turns in one process and must reach the same
loss.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

from benchmarks.harness import RESULTS, blip_base, summary, timed, write_result
from captioner import Captioner
from collator import IGNORE, CaptionCollator
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.vision import encode_images
from objectives.policy import draw
from objectives.rewards import Rewards
from objectives.scst import SelfCritical

WORDS = list(range(1000, 1040))  # token ids of the references
SETTINGS = {
    "one sample, greedy baseline": (1, "greedy", False),
    "one sample, greedy baseline, vision frozen": (1, "greedy", True),
    "five samples, leave one out": (5, "leave_one_out", False),
}


def make_processor(size: int) -> BlipProcessor:
    """A processor with as many made-up words as BLIP's vocabulary: what they spell does not matter here."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: "[DEC]", 30523: "[ENC]"}
    tokenizer = BertTokenizer(vocab={special.get(i, f"word{i}"): i for i in range(size)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return BlipProcessor(BlipImageProcessor(), tokenizer)


def make_references() -> dict[str, list[str]]:
    """Five captions of likely words for each of 100 images."""
    words = torch.randint(WORDS[0], WORDS[-1] + 1, (100, 5, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return {str(i): [" ".join(f"word{w}" for w in line) for line in group] for i, group in enumerate(words)}


class Sides:
    """A step of each side, on shared weights: with lr 0 a step costs the same and every turn stays comparable."""

    def __init__(self, arguments, samples: int, baseline: str, frozen: bool, references: dict[str, list[str]]):
        self.samples, self.baseline = samples, baseline
        self.peer = blip_base(arguments.tiny).to(arguments.device).train()
        self.autocast = torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
        with torch.no_grad():  # make the references' words likely, or every reward would be 0
            self.peer.text_decoder.cls.predictions.decoder.bias[WORDS] += 12
        ours = copy.deepcopy(self.peer, {id(weight): weight for weight in self.peer.parameters()})
        ours = use_onednn_linear(use_fast_attention(ours), True)
        self.processor = make_processor(ours.config.text_config.vocab_size)
        self.rewards = Rewards({"cider": 1.0}, references)
        half = torch.bfloat16 if arguments.dtype == "bfloat16" else None
        self.captioner = Captioner(ours, self.processor, autocast=half, max_new_tokens=arguments.max_new_tokens)
        self.objective = SelfCritical(self.captioner, self.rewards, samples=samples, baseline=baseline)
        self.peer.vision_model.requires_grad_(not frozen)
        weights = [weight for weight in self.peer.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)
        collator = CaptionCollator(self.processor, ours.config, prompts_only=True)
        torch.manual_seed(1)
        image_ids = list(references)[: arguments.images]
        batch = collator.token_tensors([references[image_id] for image_id in image_ids])
        batch["pixel_values"] = torch.randn(arguments.images, 3, 384, 384)
        self.batch = {name: value.to(arguments.device) for name, value in batch.items()} | {"image_ids": image_ids}
        self.ours_batch = self.batch
        if frozen:
            with torch.no_grad(), self.autocast:
                self.ours_batch = self.batch | {"pixel_values": encode_images(ours, self.batch["pixel_values"])}
        torch.manual_seed(2)
        drawn = draw(self.captioner, self.captioner.encode(self.ours_batch), **self.objective.sampling).first(samples)
        start = ours.config.text_config.bos_token_id
        self.sampled = torch.full((len(drawn.tokens), arguments.max_new_tokens + 1), self.captioner.collator.pad)
        for row, tokens in zip(self.sampled, drawn.tokens, strict=True):
            row[: len(tokens) + 1] = torch.tensor([start, *tokens])
        self.sampled = self.sampled.to(arguments.device)
        self.options = {"max_new_tokens": arguments.max_new_tokens, "top_k": 0}

    def step(self, side: str) -> float:
        torch.manual_seed(2)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.peer_loss() if side == "peer" else self.objective(self.captioner.model, self.ours_batch)["loss"]
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def peer_loss(self) -> torch.Tensor:
        pixel_values, image_ids, end = self.batch["pixel_values"], self.batch["image_ids"], self.captioner.collator.end
        self.peer.eval()
        with torch.no_grad():
            # Its samples cost as much as ours; the rest uses ours, so that the losses can be compared.
            self.peer.generate(
                pixel_values=pixel_values, do_sample=True, num_return_sequences=self.samples, **self.options
            )
            sampled = self.sampled
            rewards = self.reward(sampled, self.samples)
            if self.baseline == "greedy":
                greedy = self.peer.generate(pixel_values=pixel_values, max_new_tokens=self.options["max_new_tokens"])
                baseline = self.reward(greedy, 1)
            else:
                baseline = (rewards.sum(dim=1, keepdim=True) - rewards) / (self.samples - 1)
        self.peer.train()
        ended = (sampled[:, 1:] == end).cumsum(dim=1) - (sampled[:, 1:] == end).long()
        labels = sampled[:, 1:].masked_fill(ended > 0, IGNORE)
        logits = self.peer(
            pixel_values=pixel_values.repeat_interleave(self.samples, dim=0),
            input_ids=sampled,
            attention_mask=torch.ones_like(sampled),
        ).logits[:, :-1]
        log_probs = -cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none").sum(dim=1)
        advantage = (rewards - baseline).flatten().to(log_probs.device)
        references = self.batch["labels"][:, 1:] != IGNORE
        per_image = len(references) // len(image_ids)
        return -(advantage * log_probs).sum() / self.samples * per_image / references.sum()

    def reward(self, tokens: torch.Tensor, samples: int) -> torch.Tensor:
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        ended = (tokens == self.captioner.collator.end).any(dim=1).tolist()
        groups = range(0, len(texts), samples)
        texts, ended = [texts[i : i + samples] for i in groups], [ended[i : i + samples] for i in groups]
        return self.rewards(self.batch["image_ids"], texts, ended)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="images per step")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each side, after one warm-up turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the benchmark itself")
    parser.add_argument("--output", type=Path, default=RESULTS / "scst_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp()  # for the document frequencies

    references = make_references()
    result = {"measure": "steps per second", "settings": {k: v for k, v in vars(arguments).items() if k != "output"}}
    for name, (samples, baseline, frozen) in SETTINGS.items():
        sides = Sides(arguments, samples, baseline, frozen, references)
        seconds, processor, losses = {"peer": [], "ours": []}, {"peer": [], "ours": []}, {}
        for turn in range(arguments.repeats + 1):
            for side in seconds:
                began = time.process_time()
                elapsed, losses[side] = timed(lambda side=side, sides=sides: sides.step(side), arguments.device)
                if turn:
                    seconds[side].append(elapsed)
                    processor[side].append(time.process_time() - began)
        tolerance = 1e-4 if arguments.dtype == "float32" else 0.05
        if not losses["ours"] or abs(losses["ours"] - losses["peer"]) > tolerance * max(abs(losses["peer"]), 1e-3):
            raise SystemExit(f"{name}: the losses differ: {losses}. No result.")
        # On a shared machine, CPU time is the fairer of the two.
        result[name] = {"wall": summary(seconds, 1), "processor": summary(processor, 1)}
        result[name] |= {"seconds": seconds, "processor_seconds": processor, "losses": losses}
        medians = [statistics.median(processor[side]) for side in ("peer", "ours")]
        print(
            f"{name}: peer {medians[0]:.2f} and ours {medians[1]:.2f} CPU seconds per step, "
            f"{medians[0] / medians[1]:.2f} times; losses {losses['peer']:.6f} and {losses['ours']:.6f}"
        )
        del sides
    write_result(arguments.output, result)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

"""Images per second and peak memory of a DiCO step: an implementation like the published code compared with ours.

    python -m benchmarks.speed.dico_step                                         # CPU, 2 images with 5 candidates per step

Both sides use BLIP-base at 384 px with random weights, its vision encoder frozen as published, and the same images,
rewards and AdamW; their losses and gradients must agree.

    peer    two models, each with its own vision encoder that encodes the images; beam search with transformers'
            eager attention and gradients on, a copy of the image for every beam and every candidate
    ours    objectives.dico.Dico: one model and its initial trained weights; one image encoding for decoding, policy
            and reference; fast attention, decoding without gradients

Rewards are fixed numbers, so that CLIP's time is not counted. The two take turns in one process. Peak memory is
measured in a separate process for each.
"""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor
from transformers.generation import GenerationMixin

from benchmarks.harness import RESULTS, blip_base, peak_mib, summary, timed, write_result
from benchmarks.speed.training_step import largest_gradient_difference
from captioner import Captioner
from collator import CaptionCollator
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from objectives.dico import Dico, dico_loss


class Sides:
    """A step of each side, on shared weights: with lr 0 a step costs the same and every turn stays comparable."""

    def __init__(self, arguments, only: str | None = None):
        self.arguments = arguments
        self.k = arguments.candidates
        self.peer = blip_base().to(arguments.device).train()
        self.peer.vision_model.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.peer.parameters() if p.requires_grad], lr=0.0, fused=True)
        torch.manual_seed(1)
        self.pixel_values = torch.randn(arguments.images, 3, 384, 384, device=arguments.device)
        self.rewards = torch.rand(arguments.images, self.k)
        if only != "ours":
            self.reference = copy.deepcopy(self.peer).requires_grad_(False)
        if only != "peer":
            ours = copy.deepcopy(self.peer, {id(weight): weight for weight in self.peer.parameters()})
            use_onednn_linear(use_fast_attention(ours))
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            vocabulary = {word: (0, 100, 101, 102, 103)[i] for i, word in enumerate(words)}
            vocabulary |= {f"w{i}": i for i in range(30524) if i not in vocabulary.values()}
            processor = BlipProcessor(BlipImageProcessor(), BertTokenizer(vocab=vocabulary))
            captioner = Captioner(ours, processor, max_new_tokens=arguments.max_new_tokens, early_stopping=True)
            self.dico = Dico(captioner, lambda *_: (self.rewards, {}), candidates=self.k)
            collator = CaptionCollator(processor, ours.config, prompts_only=True)
            self.batch = {
                **collator.token_tensors([["w1000 w1001"]] * arguments.images),
                "pixel_values": self.pixel_values,
                "image_ids": [str(i) for i in range(arguments.images)],
            }

    def step(self, side: str) -> float:
        self.optimizer.zero_grad()
        loss = self.published_loss() if side == "peer" else self.dico(self.dico.captioner.model, self.batch)["loss"]
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def published_loss(self) -> torch.Tensor:
        config = self.peer.config.text_config
        start = torch.full((len(self.pixel_values), 1), config.bos_token_id, device=self.pixel_values.device)
        encoded = self.peer.vision_model(pixel_values=self.pixel_values).last_hidden_state
        found = GenerationMixin.generate.__wrapped__(  # without its torch.no_grad
            self.peer.text_decoder,
            input_ids=start,
            encoder_hidden_states=encoded,
            encoder_attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long, device=encoded.device),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            num_beams=self.k,
            num_return_sequences=self.k,
            max_new_tokens=self.arguments.max_new_tokens,
            early_stopping=True,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = found.sequences
        policy = self.log_probabilities(self.peer, encoded, tokens)
        with torch.no_grad():
            encoded = self.reference.vision_model(pixel_values=self.pixel_values).last_hidden_state
            reference = self.log_probabilities(self.reference, encoded, tokens)
        return dico_loss(policy, reference, self.rewards.to(policy.device))

    def log_probabilities(self, model, encoded, tokens) -> torch.Tensor:
        logits = model.text_decoder(
            input_ids=tokens, encoder_hidden_states=encoded.repeat_interleave(self.k, dim=0), use_cache=False
        ).logits
        log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[:, :, 0]
        return (log_probs * (tokens[:, 1:] != model.config.text_config.pad_token_id)).sum(dim=1).view(-1, self.k)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.peer.named_parameters() if p.grad is not None}


def report_memory(arguments) -> None:
    sides = Sides(arguments, only=arguments.memory_of)
    for _ in range(2):
        sides.step(arguments.memory_of)
    print(json.dumps(peak_mib(arguments.device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each side, after the comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=RESULTS / "dico_step.json")
    parser.add_argument("--memory_of", choices=["peer", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        return report_memory(arguments)

    sides = Sides(arguments)
    difference = largest_gradient_difference(sides)
    if difference > 1e-2:  # beams are similar, so most of the winner's and the losers' gradients cancel
        raise SystemExit(f"Gradients differ by {difference:.1e} of their size. No result.")
    seconds, losses = {"peer": [], "ours": []}, {}
    for _ in range(arguments.repeats):
        for side, values in seconds.items():
            elapsed, losses[side] = timed(lambda side=side, sides=sides: sides.step(side), arguments.device)
            values.append(elapsed)
    del sides
    memory = {}
    for side in ("peer", "ours"):
        command = [sys.executable, "-m", __spec__.name, "--memory_of", side, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[side] = json.loads(done.stdout.splitlines()[-1])
    memory["ratio"] = memory["ours"] / memory["peer"]
    numbers = summary(seconds, arguments.images)
    print(
        f"peer {numbers['peer']['median']:.4f} images/s, ours {numbers['ours']['median']:.4f}, {numbers['ratio']:.2f} "
        f"times; peak memory {memory['peer']:.0f} and {memory['ours']:.0f} MiB; gradients differ by {difference:.1e}"
    )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "memory_of")}
    write_result(
        arguments.output,
        {
            "measure": "images per second",
            "settings": settings,
            **numbers,
            "losses": losses,
            "largest_relative_gradient_difference": difference,
            "peak_mib": memory,
        },
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each number at once
    main()

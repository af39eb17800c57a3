"""Steps per second of GRPO on a small Qwen2-VL, beside TRL's GRPOTrainer: eight captions per image.

    python3 -m venv trl_env && trl_env/bin/pip install -r requirements.txt trl==1.16.0 torchvision
    trl_env/bin/python -m benchmarks.speed.grpo_trl

The two take turns, a step each, on one machine: the same architecture, random weights, pictures, prompt, reward (words of the
caption), sampling (temperature 1, no cuts), loss (TRL's defaults) and optimizer; a step is all from pictures to new weights.
TRL's is GRPOTrainer.training_step of a batch with each image once per caption, as its data loader gives it. Wall-clock and
processor seconds; the latter are the fairer ones on a shared machine.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from benchmarks.harness import RESULTS, ROOT, summary, write_result
from captioner import Captioner
from collator import CaptionCollator
from models.loading import ready
from objectives.grpo import Grpo
from objectives.rewards import Rewards

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
import families  # noqa: E402

QUESTION = "What is in the picture?"


def make_model(hidden: int, layers: int, side: int):
    """The tests' Qwen2-VL, with wider and more layers, and pictures of `side` x `side` pixels."""
    model, processor = families.build("qwen2_vl")
    config = model.config
    heads = {"num_attention_heads": hidden // 16, "num_key_value_heads": hidden // 16}
    for name, value in {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        **heads,
    }.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * layers
    config.text_config.max_position_embeddings = 2048
    for name, value in {"embed_dim": hidden, "hidden_size": hidden, "depth": layers, "num_heads": hidden // 16}.items():
        setattr(config.vision_config, name, value)
    processor.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": side * side}
    torch.manual_seed(0)
    return ready(type(model)(config), processor), processor


class Ours:
    def __init__(self, arguments, pictures):
        self.model, processor = make_model(arguments.hidden, arguments.layers, arguments.side)
        captioner = Captioner(self.model.train(), processor, prompt=QUESTION, max_new_tokens=arguments.max_new_tokens)
        self.collator = CaptionCollator(processor, self.model.config, prompt=QUESTION, prompts_only=True)
        self.samples = [
            {"image": picture, "image_id": str(i), "captions": ["a"], "epoch": 0} for i, picture in enumerate(pictures)
        ]
        rewards = Rewards({"length": 1.0}, {str(i): ["a"] for i in range(len(pictures))})
        self.objective = Grpo(captioner, rewards, num_generations=arguments.samples)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self) -> float:
        """The mean length of the captions in tokens."""
        batch = self.collator(self.samples)
        self.objective.begin_step([batch])
        self.optimizer.zero_grad()
        result = self.objective(self.model, batch)
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(result["completions/mean_length"])


class Trl:
    def __init__(self, arguments, pictures):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        model, processor = make_model(arguments.hidden, arguments.layers, arguments.side)
        prompt = [{"role": "user", "content": QUESTION}]
        rows = [{"prompt": prompt, "image": picture} for picture in pictures]
        self.rows = [row for row in rows for _ in range(arguments.samples)]
        config = GRPOConfig(
            output_dir=str(arguments.output.with_suffix("")), per_device_train_batch_size=len(self.rows),
            gradient_accumulation_steps=1, num_generations=arguments.samples, max_completion_length=arguments.max_new_tokens,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", temperature=1.0, top_p=1.0, top_k=0,
        )  # fmt: skip
        words = lambda completions, **_: [float(len(text[0]["content"].split())) for text in completions]  # noqa: E731
        self.trainer = GRPOTrainer(
            model, words, args=config, train_dataset=Dataset.from_list([{"prompt": prompt}]), processing_class=processor
        )
        self.trainer.current_gradient_accumulation_steps = 1  # which train() sets
        self.model = self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self) -> float:
        self.optimizer.zero_grad()
        self.trainer.training_step(self.model, self.rows, None)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.trainer.state.global_step += 1
        return self.trainer._metrics["train"]["completions/mean_length"][-1]


def main(arguments) -> dict:
    pictures = [
        Image.effect_noise((arguments.side, arguments.side), 60 + i).convert("RGB") for i in range(arguments.images)
    ]
    sides = {"ours": Ours(arguments, pictures), "peer": Trl(arguments, pictures)}
    lengths = {name: [side.step()] for name, side in sides.items()}  # also the warm-up
    wall, processor = {name: [] for name in sides}, {name: [] for name in sides}
    for turn in range(arguments.turns):
        for name in sides if turn % 2 == 0 else reversed(sides):
            began, used = time.perf_counter(), time.process_time()
            lengths[name].append(sides[name].step())
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    result = {
        "what": "GRPO steps per second on a small Qwen2-VL with random weights: ours, and TRL's GRPOTrainer (peer)",
        "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
        "weights": sum(p.numel() for p in sides["ours"].model.parameters()),
        "trl": version("trl"),
        "mean_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "processor": summary(processor, 1),
        "wall_clock": summary(wall, 1),
    }
    for kind in ("processor", "wall_clock"):
        each = {name: "{median:.3f} ({min:.3f} to {max:.3f})".format(**result[kind][name]) for name in sides}
        print(f"{kind}: ours {each['ours']}, TRL {each['peer']} steps per second: {result[kind]['ratio']:.2f} times")
    print("tokens of a caption:", result["mean_length"])
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--side", type=int, default=224, help="pixels of a picture's side")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "grpo_trl.json")
    arguments = parser.parse_args()
    write_result(arguments.output, main(arguments))

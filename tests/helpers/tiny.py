"""Small models built with the real classes, and how the tests start the scripts."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forks
import ranks
from conftest import ROOT

CONFIG = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
    },
    "text_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}  # fmt: skip

# The words of the tests' own captions.
VOCABULARY = [
    "a",
    "the",
    "two",
    "three",
    "red",
    "green",
    "blue",
    "yellow",
    "circle",
    "square",
    "star",
    "dog",
    "cat",
    "man",
    "men",
    "woman",
    "child",
    "dogs",
    "jumps",
    "runs",
    "sits",
    "on",
    "in",
    "with",
    "of",
    "and",
    "near",
    "under",
    "grass",
    "water",
    "road",
    "ball",
    ".",
    ",",
    "##s",
    "picture",
    "small",
    "large",
    "left",
    "right",
]


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VOCABULARY]))
    return path


def write_config(folder: Path) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def build(folder: Path, seed: int = 0, fast_attention: bool = True):
    """(model, processor) of the tiny config."""
    import torch

    from models.loading import build_model

    torch.manual_seed(seed)
    return build_model(str(write_config(folder)), str(write_vocabulary(folder)), [], fast_attention)


def build_folder(folder: Path, seed: int = 0) -> Path:
    """A saved tiny model."""
    model, processor = build(folder, seed)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def write_photos(folder: Path, captions: dict[str, list[str]], splits: dict[str, str] | None = None) -> Path:
    """A JSONL set of noise pictures; splits gives each name its split."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, texts) in enumerate(captions.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{name}.png")
        row = {"image": f"{name}.png", "captions": texts}
        lines.append(json.dumps(row | ({"split": splits[name]} if splits else {})))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


# How the names of variables begin that are read when they are needed, not at import: a fork can be given them.
READ_LATER = ("RAY_",)


def can_fork(script: str, environment: dict) -> bool:
    known = sys.platform == "linux" and Path(script).stem in forks.SCRIPTS
    return known and all(name.startswith(READ_LATER) for name in environment) and server().fits()


def start(script: str, *arguments, processes: int = 1, **environment) -> subprocess.Popen | forks.Started:
    """A script under way; several processes are torchrun's."""
    if processes == 1 and can_fork(script, environment):
        run = {"script": str(ROOT / script), "arguments": list(map(str, arguments)), "environment": environment}
        return forks.Started(server(), run)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def run(
    script: str, *arguments, fails: bool | int = False, processes: int = 1, **environment
) -> subprocess.CompletedProcess:
    """A script run to its end; asserts that it succeeds, or with `fails` that it exits with 2, or the code that is given, and no
    traceback."""
    if can_fork(script, environment):
        done = run_forked(script, *arguments, processes=processes, environment=environment)
    else:
        process = start(script, *arguments, processes=processes, **environment)
        out, err = process.communicate(timeout=600)
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if fails:
        assert done.returncode == (2 if fails is True else fails), f"exit {done.returncode}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
    else:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}\n{done.stdout}"
    return done


@functools.cache
def server() -> forks.Server:
    """One for all tests of this process."""
    started = forks.Server()
    atexit.register(started.close)
    return started


def run_forked(script: str, *arguments, processes: int, environment: dict) -> subprocess.CompletedProcess:
    asked = {"script": str(ROOT / script), "arguments": list(map(str, arguments))}
    with tempfile.TemporaryDirectory() as folder:
        asked |= {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        codes = server().run([asked | {"environment": environment | one} for one in ranks.together(processes)])
        out, err = (Path(asked[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    code = next(filter(None, codes), 0)
    return subprocess.CompletedProcess([sys.executable, asked["script"], *asked["arguments"]], code, out, err)


def build_llm(folder: Path, texts: list[str] = ("a red circle and a blue square.",), seed: int = 0) -> Path:
    """A saved Llama of two layers with random weights, and a byte-level tokenizer trained on `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder / "llm"

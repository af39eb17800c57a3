"""Memory of each process, as estimated by train.py --dry_run and as measured, with up to two CPU processes.

    python -m benchmarks.speed.large_models

Models of the real classes with 40 to 65 million random weights are trained for two steps: by one process, by two with a
copy each (DDP), and by two that share one (FSDP2). Measured is the process's peak memory in training, minus its memory
before the model was loaded (VmHWM of /proc, reset before training). Loading is measured separately.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, write_result

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_strategy": "no",
    "save_strategy": "no", "max_txt_len": 12, "num_beams": 1, "max_new_tokens": 2, "meteor": "false", "spice": "false",
    "bootstrap_samples": 0, "report": "false", "report_to": "none", "lora_dropout": 0, "logging_steps": 1,
    "max_test_samples": 2, "max_eval_samples": 2,
}  # fmt: skip
# (model, what is trained): processes, accelerate config file, flags.
CASES = {
    ("LLaVA", "full, 1 process"): (1, None, {}),
    ("LLaVA", "full, FSDP2, 2 processes"): (2, "fsdp2", {}),
    ("LLaVA", "full, DDP, 2 processes"): (2, "ddp", {}),
    ("LLaVA", "LoRA, FSDP2, 2 processes"): (2, "fsdp2", {"use_peft": "true"}),
    ("BLIP-2 OPT", "full, no checkpointing, 1 process"): (1, None, {"gradient_checkpointing": "false"}),
    ("BLIP-2 OPT", "LoRA, 1 process"): (1, None, {"use_peft": "true"}),
    ("BLIP-2 OPT", "full, FSDP2, 2 processes"): (2, "fsdp2", {}),
}
WIDE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 4, "num_attention_heads": 10}


def save_models(folder: Path) -> list[Path]:
    """Save a BLIP-2 with OPT and a LLaVA; return their folders."""
    import families
    import torch
    from transformers import OPTConfig

    torch.manual_seed(0)
    families.VISION.update(WIDE), families.DECODER.update(WIDE), families.LLAMA.update(WIDE)
    families.LLAMA.update(num_key_value_heads=10, head_dim=64)
    words = families.opt_tokenizer()
    ids = {"bos_token_id": 2, "eos_token_id": 5, "pad_token_id": 1, "vocab_size": len(words)}
    text = OPTConfig(**ids, ffn_dim=2560, word_embed_proj_dim=640, max_position_embeddings=128, **WIDE)
    made = {"BLIP-2 OPT": blip2(families, words, text), "LLaVA": families.llava()}
    for name, (model, processor) in made.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return [folder / name for name in made]


def blip2(families, words, text):
    import transformers as t

    qformer = {**WIDE, "encoder_hidden_size": 640, "vocab_size": 32}
    config = t.Blip2Config(
        vision_config=families.VISION, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=32,
        image_token_index=words.image_token_id,
    )  # fmt: skip
    processor = t.Blip2Processor(families.blip_images(), words, num_query_tokens=32)
    return t.Blip2ForConditionalGeneration(config), processor


def measure(model: Path, dataset: Path, output: Path, processes: int, config: str | None, flags: dict) -> dict:
    """GiB: the estimate, and each process's memory in loading and in training."""
    words = {**FLAGS, **flags, "model_name_or_path": model, "dataset_name": dataset, "output_dir": output}
    words = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    launch = [sys.executable]
    if processes > 1:
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
        launch += [str(ROOT / f"recipes/accelerate/{config}.yaml"), "--num_processes", str(processes), "-m"]
    else:
        launch.append("-m")
    launch.append("benchmarks.speed.large_models_run")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"MEASURED": str(output.with_suffix("")), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*launch, *words], cwd=ROOT, env=environment, check=True)
    return json.loads(Path(f"{output.with_suffix('')}.0.json").read_text(encoding="utf-8")) | {
        f"{phase}_rank_{rank}": json.loads(Path(f"{output.with_suffix('')}.{rank}.json").read_text(encoding="utf-8"))[
            phase
        ]
        for rank in range(processes)
        for phase in ("loading", "training")
    }


def main():
    logging.basicConfig(level=logging.WARNING)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
        import tiny
        from small_run import CAPTIONS, SPLITS

        dataset = tiny.write_photos(folder / "photos", CAPTIONS, SPLITS)
        folders = {model.name: model for model in save_models(folder)}
        for number, ((name, case), (processes, config, flags)) in enumerate(CASES.items()):
            found = measure(folders[name], dataset, folder / str(number), processes, config, flags)
            rows[f"{name}, {case}"] = found
            print(name, case, found, flush=True)
    write_result(RESULTS / "large_models.json", {"gib": rows, "flags": FLAGS})


if __name__ == "__main__":
    main()

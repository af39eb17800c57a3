"""Captions of servers that speak OpenAI's protocol, compared with those of the same model here, greedily and in float32.

    python -m benchmarks.quality.servers --photos FOLDER --vllm ENV --llama ENV --llama_source FOLDER

A tiny Qwen2-VL and a tiny LLaVA with random weights, as export.py writes them, caption 20 photographs by infer.py, here and behind
each server: `transformers serve` of this environment, which needs torchvision, vLLM (an environment with it) and llama-cpp-python
with its `server` extra (another one, and its unpacked source, which has the converter to GGUF). Each photograph is captioned twice:
cut to 112 x 84 pixels (LLaVA: 112 x 112), which no server has to resize, as its sides are multiples of two patches; and as it is, at
most 240 pixels long, which each resizes in its own way. Here the pictures are captioned that were sent: those after the JPEG.
Captions are texts of whole printable tokens, so that equal texts are equal tokens.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import ImageOps

from benchmarks.harness import RESULTS, ROOT, write_result

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
import families  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from llm_server import picture_in  # noqa: E402

from arguments import ImageServerArguments  # noqa: E402
from captioner import Captioner  # noqa: E402
from captioning.server import ServerCaptioner  # noqa: E402
from data.images import open_image  # noqa: E402

PHOTOS, NEW_TOKENS, PATCH, SIDE, LONGEST = 20, 16, 14, 112, 240
PROMPT = "Describe the image in one sentence."
VARIABLES = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Pillow decodes where torchvision's own decoder does not load: its build for CUDA, beside a torch for the CPU.
TRANSFORMERS = """
import io, PIL.Image, torchvision
from torchvision.transforms.functional import pil_to_tensor
if not torchvision.io.image._has_image_ops():
    torchvision.io.decode_image = lambda buffer, **_: pil_to_tensor(PIL.Image.open(io.BytesIO(bytes(buffer))).convert("RGB"))
from transformers.cli.transformers import main
main()
"""
# llama.cpp knows tokenizers by a digest of what they make of a text: this one splits words as GPT-2's does.
CONVERTER = (
    "import runpy, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; from conversion.base import TextModel; "
    "TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'; sys.argv[:2] = ['convert_hf_to_gguf.py']; "
    "runpy.run_path(sys.path[0] + '/convert_hf_to_gguf.py', run_name='__main__')"
)


def write_plainly(model, words) -> None:
    """Let the model write whole printable tokens only, as a trained one does, and end some captions by itself."""
    with torch.no_grad():
        spoken = [i for i in range(len(words)) if (word := words.decode([i])).isascii() and word.isprintable()]
        spoken = [i for i in spoken if i not in words.all_special_ids] + [words.eos_token_id]
        silent = torch.ones(len(words), dtype=torch.bool)
        silent[spoken] = False
        model.lm_head.weight[silent] = model.lm_head.weight[spoken].mean(dim=0)  # never the highest logit
        model.lm_head.weight[words.eos_token_id] *= 2


def save_llava(folder: Path) -> None:
    """A LLaVA as wide as the Qwen2-VL below."""
    torch.manual_seed(0)
    words = families.llama_tokenizer("<image>", extra_special_tokens=families.IMAGE)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "initializer_range": 0.1}
    text = transformers.LlamaConfig(
        vocab_size=len(words),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **families.LLAMA | sizes | {"head_dim": 64},
    )
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.image_token_id)
    model = transformers.LlavaForConditionalGeneration(config)
    write_plainly(model, words)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    model.save_pretrained(folder)
    transformers.LlavaProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=families.LLAVA,
    ).save_pretrained(folder)  # fmt: skip


def save_qwen2_vl(folder: Path) -> None:
    """A Qwen2-VL whose random weights are wide enough for captions that differ with the picture."""
    torch.manual_seed(0)
    words = families.qwen_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = words.convert_tokens_to_ids
    tokens = {f"{name}_token_id": ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": ids(f"<|{name}_pad|>") for name in ("image", "video")}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    text = families.qwen_text(words, **sizes, head_dim=64, rope_parameters=rope, initializer_range=0.1)
    vision = {"patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2, "depth": 3, "num_heads": 2}
    vision |= {"embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2, "initializer_range": 0.1}
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    )
    write_plainly(model, words)
    limits = {"shortest_edge": 8 * (2 * PATCH) ** 2, "longest_edge": 4096 * (2 * PATCH) ** 2}  # as llama.cpp's
    images = transformers.Qwen2VLImageProcessor(size=limits, patch_size=PATCH)
    video = transformers.Qwen2VLVideoProcessor(size=limits, patch_size=PATCH)
    model.save_pretrained(folder)
    transformers.Qwen2VLProcessor(images, words, video, chat_template=families.QWEN).save_pretrained(folder)


def save_photos(photos: list[Path], size: tuple[int, int], folder: Path) -> None:
    """The pictures of both conditions, cut to `size` and as they are, and in sent-* what infer.py sends of them."""
    sends = ServerCaptioner("m", ImageServerArguments(base_url="http://127.0.0.1:9/v1", max_side=LONGEST))
    for condition in ("whole", "as_they_are"):
        for name in (condition, f"sent-{condition}"):
            (folder / name).mkdir()
        for number, photo in enumerate(photos):
            image = open_image(str(photo))
            image = ImageOps.fit(image, size) if condition == "whole" else image
            image.save(folder / condition / f"{number:02}.png")
            content = sends.picture({"image": image, "image_id": number}).messages[0]["content"]
            picture_in(content[0]["image_url"]["url"]).save(folder / f"sent-{condition}" / f"{number:02}.png")


def captions(photos: Path, output: Path, *flags) -> tuple[list[str], dict]:
    """(captions, _report.json) of infer.py."""
    words = [photos, "--output", output, "--prompt", PROMPT, "--max_new_tokens", NEW_TOKENS, *flags]
    subprocess.run([sys.executable, "infer.py", *map(str, words)], cwd=ROOT, env=VARIABLES, check=True)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [row.get("caption", "") for row in rows], json.loads(
        Path(f"{output}.shards/_report.json").read_text(encoding="utf-8")
    )


@torch.inference_mode()
def margins(captioner: Captioner, photos: list[Path], theirs: list[str]) -> list[float]:
    """Of each caption that a server writes otherwise: the difference of the two highest logits here, at the token where they
    part. Next to zero: two tokens are equally likely, and rounding decides."""
    found = []
    for photo, other in zip(photos, theirs, strict=True):
        batch = captioner.collator([{"image": str(photo), "image_id": ""}])
        tokens = captioner.rows(captioner.generate_tokens(batch))[0]
        (text,) = captioner.texts(torch.tensor([tokens]))
        if text == other:
            continue
        texts = [captioner.texts(torch.tensor([tokens[:length]]))[0] for length in range(1, len(tokens) + 1)]
        parts = next((n for n, text in enumerate(texts) if not other.startswith(text)), len(tokens) - 1)
        inputs = captioner.training_batch(batch, [tokens[: parts + 1]])
        inputs.pop("labels")
        best = captioner.model(**inputs).logits[0, -2].topk(2).values
        found.append(round(float(best[0] - best[1]), 5))
    return found


@contextlib.contextmanager
def serving(command: list, port: int, log: Path):
    """A server, once it answers; stopped at the end."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(list(map(str, command)), env=VARIABLES, stdout=file, stderr=file, cwd=log.parent)
    try:
        deadline = time.monotonic() + 900
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(encoding="utf-8")[-4000:])
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def to_gguf(source: Path, model: Path, folder: Path) -> tuple[Path, Path]:
    """The model and its vision encoder as GGUF files in float32."""
    files = folder / "model.gguf", folder / "mmproj.gguf"
    for file, more in zip(files, ([], ["--mmproj"]), strict=True):
        words = [
            sys.executable,
            "-c",
            CONVERTER,
            source / "vendor/llama.cpp",
            model,
            "--outtype",
            "f32",
            "--outfile",
            file,
        ]
        subprocess.run(list(map(str, [*words, *more])), check=True, env=VARIABLES)
    return files


def version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# Each with the size of the pictures that it does not resize.
MODELS = {"LLaVA": (save_llava, (SIDE, SIDE)), "Qwen2-VL": (save_qwen2_vl, (SIDE, SIDE * 3 // 4))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs; the first 20 by name")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="those to compare")
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM")
    parser.add_argument("--llama", type=Path, help="an environment with llama-cpp-python[server]")
    parser.add_argument("--llama_source", type=Path, help="its unpacked source, of the same version")
    parser.add_argument("--output", type=Path, default=RESULTS / "servers.json")
    arguments = parser.parse_args()
    photos, models = sorted(arguments.photos.rglob("*.jpg"))[:PHOTOS], {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            models[name] = compare(name, photos, Path(folder), arguments)
    write_result(arguments.output, {"photographs": len(photos), "models": models})


def compare(name: str, photos: list[Path], folder: Path, arguments) -> dict:
    """The model's captions of both conditions here and behind each server."""
    save, size = MODELS[name]
    model = folder / "m"
    save(folder / "trained")
    subprocess.run(
        [sys.executable, "export.py", folder / "trained", "--output_dir", model], cwd=ROOT, env=VARIABLES, check=True
    )
    save_photos(photos, size, folder)
    conditions = {"whole patches": folder / "whole", "as they are": folder / "as_they_are"}
    here = ["--model_name_or_path", model, "--num_beams", 1, "--bf16", "false"]
    sent = {name: place.parent / f"sent-{place.name}" for name, place in conditions.items()}
    ours = {name: captions(place, folder / f"{place.name}.jsonl", *here)[0] for name, place in sent.items()}
    captioner = Captioner.from_pretrained(str(model), prompt=PROMPT, num_beams=1, max_new_tokens=NEW_TOKENS)
    prompt_tokens = {
        name: sum(
            len(captioner.collator([{"image": str(file), "image_id": ""}])["input_ids"][0])
            for file in sorted(place.iterdir())
        )
        for name, place in sent.items()
    }

    port, plain = free_port(), {"": []}
    servers = {"transformers serve": (sys.executable, "transformers", str(model), plain, [
        sys.executable, "-c", TRANSFORMERS, "serve", model, "--port", port, "--device", "cpu", "--dtype", "float32",
    ])}  # fmt: skip
    if arguments.vllm:
        servers["vLLM"] = (arguments.vllm / "bin/python", "vllm", "m", plain, [
            arguments.vllm / "bin/vllm", "serve", model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
            "--max-model-len", 256, "--enforce-eager", "--served-model-name", "m", "--max-num-seqs", 8,
        ])  # fmt: skip
    if arguments.llama:
        python = arguments.llama / "bin/python"
        text, vision = to_gguf(arguments.llama_source, model, folder)
        # Its server penalises repetition unless it is told otherwise.
        asked = {", its own repeat_penalty": [], ", repeat_penalty 1": ["--extra_body", '{"repeat_penalty": 1}']}
        servers["llama.cpp"] = (python, "llama-cpp-python", "m", asked, [
            python, "-m", "llama_cpp.server", "--model", text, "--clip_model_path", vision, "--chat_format", "mtmd",
            "--n_ctx", 512, "--type_k", 0, "--type_v", 0, "--model_alias", "m", "--host", "127.0.0.1", "--port", port,
        ])  # fmt: skip
    rows = {}
    for name, (python, package, served, asked, command) in servers.items():
        with serving(command, port, folder / "server.log"):
            for (how, more), (condition, place) in itertools.product(asked.items(), conditions.items()):
                flags = ["--model_name_or_path", f"openai:{served}", "--base_url", f"http://127.0.0.1:{port}/v1"]
                flags += ["--max_side", LONGEST, "--concurrency", 4, "--max_retries", 1, *more]
                output = folder / f"{package}-{place.name}{how}.jsonl"
                theirs, report = captions(place, output, *flags)
                row = rows.setdefault(name + how, {"version": version(python, package)})
                row[condition] = {
                    "equal": sum(one == other for one, other in zip(ours[condition], theirs, strict=True)),
                    "prompt_tokens": report["tokens_in"],
                    "margins": margins(captioner, sorted(sent[condition].iterdir()), theirs),
                }
                print(name + how, condition, row[condition], flush=True)
    different = {name: len(set(texts)) for name, texts in ours.items()}
    return {"different_captions": different, "prompt_tokens_here": prompt_tokens, "servers": rows}


if __name__ == "__main__":
    main()

"""Models built from the configs that were published with them, at a fraction of their depth and width.

What the files hold otherwise (ids, activations, tied weights, sizes of images, settings that only older releases know)
is as published: fixtures/configs/README.md. Vocabularies are stand-ins with the special tokens at their own ids.
"""

import importlib.util
import json
import shutil

import families
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, BertTokenizer, PreTrainedTokenizerFast

from captioner import Captioner
from models.families import family_of
from models.loading import load_model

CONFIGS = ROOT / "tests/fixtures/configs"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BLIP = {"text_config": SMALL, "vision_config": SMALL}
BLIP2 = {"qformer_config": SMALL | {"encoder_hidden_size": 32}, "vision_config": SMALL}
T5 = {"d_ff": 64, "d_kv": 16, "d_model": 32, "num_decoder_layers": 2, "num_heads": 2, "num_layers": 2}
OPT = {"ffn_dim": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART = {**SIDES, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2}
DAVIT = {"embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 2], "num_groups": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
REDUCED = {
    "blip-image-captioning-base": BLIP,
    "blip-image-captioning-large": BLIP | {"text_config": SMALL | {"encoder_hidden_size": 32}},
    "blip2-opt-2.7b": BLIP2 | {"text_config": OPT},
    "blip2-flan-t5-xl": BLIP2 | {"text_config": T5},
    "git-base": SMALL | {"vision_config": SMALL},
    "git-large": SMALL | {"vision_config": SMALL},
    "vit-gpt2-image-captioning": {"encoder": SMALL, "decoder": {"n_embd": 32, "n_head": 2, "n_layer": 2}},
    "Florence-2-base": {"text_config": BART, "vision_config": DAVIT | {"projection_dim": 32}},
    "SmolVLM2-500M-Video-Instruct": {
        "text_config": SMALL | {"num_key_value_heads": 1, "head_dim": 16}, "vision_config": SMALL,
    },
    "Qwen2.5-VL-7B-Instruct": SMALL | {
        "hidden_size": 256, "num_key_value_heads": 1,  # 16, 24 and 24 of half a head's 128 numbers are rotated
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256},
    },
}  # fmt: skip
NEEDS = {"SmolVLM2-500M-Video-Instruct": ("torchvision", "num2words"), "Qwen2.5-VL-7B-Instruct": ("torchvision",)}


def stand_in(size: int, tokens: dict[str, int], before=(), after=(), processor_class="", **names):
    """A byte-level tokenizer of `size` tokens, with these at their ids, and no merges."""
    vocabulary = {id: token for token, id in tokens.items()}
    free = iter([*(t for t in sorted(pre_tokenizers.ByteLevel.alphabet()) if t not in tokens), *map(str, range(size))])
    vocabulary = {vocabulary.get(id) or f"{next(free)}": id for id in range(size)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([token for token in tokens if token != "Ċ"])
    if before or after:
        around = [(token, bpe.token_to_id(token)) for token in (*before, *after)]
        single = " ".join([*before, "$A", *after])
        bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, processor_class=processor_class, **names)


def bert(test_data, processor_class, *more):
    lines = (test_data / "bert-base-uncased" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {word: id for id, word in enumerate([*lines, *more])}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, processor_class=processor_class)


def tokenizer_of(name: str, test_data):
    image = {"extra_special_tokens": {"image_token": "<image>"}}
    if name.startswith("blip-image"):
        return bert(test_data, "BlipProcessor")
    if name.startswith("git"):
        return bert(test_data, "GitProcessor")
    if name == "blip2-opt-2.7b":
        tokens = {"<s>": 0, "<pad>": 1, "</s>": 2, "Ċ": 50118}
        names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
        return stand_in(50265, tokens, before=["</s>"], processor_class="Blip2Processor", **names)
    if name == "blip2-flan-t5-xl":
        names = {"eos_token": "</s>", "pad_token": "<pad>"}
        return stand_in(32100, {"<pad>": 0, "</s>": 1}, after=["</s>"], processor_class="Blip2Processor", **names)
    if name.startswith("vit-gpt2"):
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        return stand_in(50257, {"<|endoftext|>": 50256}, **names)
    if name.startswith("Florence"):
        tokens = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<image>": 51289}
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **image}
        return stand_in(51290, tokens, ["<s>"], ["</s>"], "Florence2Processor", **names)
    if name.startswith("SmolVLM"):
        tokens = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<global-img>": 49152}
        tokens |= {f"<row_{r + 1}_col_{c + 1}>": 49153 + 6 * r + c for r in range(6) for c in range(6)}
        tokens |= {"<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}
        names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
        template = "<|im_start|>" + families.IDEFICS
        return stand_in(49280, tokens, processor_class="SmolVLMProcessor", chat_template=template, **names)
    tokens = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    tokens |= {"<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": families.QWEN}
    return stand_in(151665, tokens, processor_class="Qwen2_5_VLProcessor", **names)


def reduced(config: dict, smaller: dict) -> dict:
    return config | {k: reduced(config.get(k, {}), v) if isinstance(v, dict) else v for k, v in smaller.items()}


def test_every_config_is_tested():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(REDUCED)


@pytest.mark.parametrize("name", REDUCED)
def test_a_model_of_the_published_config_captions_a_photo(name, test_data, tmp_path):
    if missing := [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]:
        pytest.skip(f"its processor needs {' and '.join(missing)}")
    published = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    config = reduced(published, REDUCED[name])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    built = AutoConfig.from_pretrained(tmp_path)
    family = family_of(built)
    model = (
        family.model_class.from_config(built)
        if hasattr(family.model_class, "from_config")
        else family.model_class(built)
    )
    model.save_pretrained(tmp_path / "weights")
    weights = tmp_path / "weights" / "model.safetensors"
    if name.startswith("vit-gpt2"):  # as it was published
        from safetensors.torch import load_file

        torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    else:
        shutil.copy(weights, tmp_path)
    tokenizer_of(name, test_data).save_pretrained(tmp_path)
    for path in (CONFIGS / name).glob("*processor*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")

    loaded, processor = load_model(str(tmp_path))
    own = dict(model.named_parameters())
    for parameter_name, parameter in loaded.named_parameters():
        if "embed" not in parameter_name and "lm_head" not in parameter_name:  # lengthened for BLIP-2's placeholder
            assert parameter.equal(own[parameter_name]), parameter_name
    captioner = Captioner(loaded.eval(), processor, num_beams=2, max_new_tokens=5, min_new_tokens=3)
    photo = sorted((test_data / "flickr8k" / "Flicker8k_Dataset").glob("*.jpg"))[0]
    (caption,) = captioner([str(photo)])
    assert isinstance(caption, str)
    tokens = captioner.generate_tokens(captioner.collator([{"image": str(photo), "image_id": "0"}]))
    assert 3 <= len(captioner.rows(tokens)[0]) <= 5

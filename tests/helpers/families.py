"""A tiny model of every family, built with the real classes: `build(name)` gives (model, processor)."""

import importlib.util
import os

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ALL = [
    "blip", "git", "blip2-opt", "blip2-t5", "instructblip-t5", "instructblip-vicuna", "paligemma", "idefics2", "idefics3",
    "idefics3-llama3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_onevision", "internvl",
    "mllama", "janus", "vit-gpt2", "pix2struct", "florence2", "kosmos-2",
]  # fmt: skip
# Their processors have a part for videos, which the library has with torchvision only; SmolVLM's also asks for num2words.
WITH_VIDEOS = {"smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"}


# Where all are too many, as where another environment runs them: make test has the families that differ most.
CHOSEN = os.environ.get("CAPTION_TEST_FAMILIES", "").split() or ALL


def _parameter(name: str):
    if name not in CHOSEN:
        return pytest.param(name, marks=pytest.mark.skip(reason="not one of CAPTION_TEST_FAMILIES"))
    needs = ["torchvision"] * (name in WITH_VIDEOS) + ["num2words"] * (name == "smolvlm")
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    marks = pytest.mark.skipif(bool(absent), reason=f"the processor of {name} needs {' and '.join(absent)}")
    return pytest.param(name, marks=marks)


NAMES = [_parameter(name) for name in ALL]
SIDE = 32
TEXT = [
    "a dog runs on the grass", "two men in the water", "a woman sits on a ball", "the red circle", "a child jumps",
    "a cat near the road", "three dogs under a star", "the small blue square", "a man and a woman", "a large yellow ball",
    "a picture of", "Describe the image in one sentence.", "caption en", "User:", "Assistant:", "caption:",
]  # fmt: skip

IMAGE = {"image_token": "<image>"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}END\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 8}
# The default of BLIP's kind and of Pix2Struct is 1e-10, with which they see nothing.
SIGHT = {"initializer_range": 0.02}
SEEING = VISION | SIGHT
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = DECODER | {"num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}


def tokenizer(special: list[str], before=(), after=(), metaspace=False, **names) -> t.PreTrainedTokenizerFast:
    """A byte-level BPE (or Metaspace BPE) of the tests' words, with these special tokens around a text."""
    bpe = Tokenizer(models.BPE())
    if metaspace:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_special_tokens(special)
    if before or after:
        pairs = [(token, bpe.token_to_id(token)) for token in (*before, *after)]
        bpe.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]), special_tokens=list(dict(pairs).items())
        )
    return t.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def bert() -> t.BertTokenizer:
    import tiny

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.VOCABULARY, "short", "image", "description", ":"]
    return t.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def opt_tokenizer():
    return tokenizer(
        ["<s>", "<pad>", "</s>", "<image>"], before=["</s>"], bos_token="</s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=IMAGE,
    )  # fmt: skip


def t5_tokenizer():
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "extra_special_tokens": IMAGE}
    return tokenizer(special, after=["</s>"], metaspace=True, **names)


def llama_tokenizer(*more: str, **names):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"} | names
    return tokenizer(["<unk>", "<s>", "</s>", *more], before=["<s>"], **names)


def vicuna_tokenizer():
    return llama_tokenizer("<image>", extra_special_tokens=IMAGE)


def opt_config(words) -> t.OPTConfig:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0}
    line_end = words("\n", add_special_tokens=False)["input_ids"]
    assert len(line_end) == 1
    ids = {"bos_token_id": 2, "eos_token_id": line_end[0], "pad_token_id": 1}
    return t.OPTConfig(vocab_size=len(words), **{**DECODER, **sizes, **ids})


def t5_config(words) -> t.T5Config:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    return t.T5Config(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes, **kind)


def llama_config(words, kind=t.LlamaConfig) -> t.LlamaConfig:
    return kind(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0, **LLAMA)


def blip_images(**kw):
    return t.BlipImageProcessor(size={"height": SIDE, "width": SIDE}, **kw)


def with_queries(kind: str, words, text_config):
    """BLIP-2 or InstructBLIP around a language model."""
    image_token = words.image_token_id
    qformer = {**DECODER, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "blip-2":
        config = t.Blip2Config(
            vision_config=SEEING, qformer_config=qformer, text_config=text_config.to_dict(), num_query_tokens=4,
            image_token_index=image_token,
        )  # fmt: skip
        model, processor = (
            t.Blip2ForConditionalGeneration(config),
            t.Blip2Processor(blip_images(), words, num_query_tokens=4),
        )
        torch.nn.init.normal_(model.query_tokens)  # as a trained model's: from zeros, training starts slowly
        return model, processor
    seen = bert()
    config = t.InstructBlipConfig(
        vision_config=SEEING, qformer_config={**qformer, "vocab_size": len(seen)}, text_config=text_config.to_dict(),
        num_query_tokens=4, image_token_index=image_token,
    )  # fmt: skip
    processor = t.InstructBlipProcessor(blip_images(), words, qformer_tokenizer=seen, num_query_tokens=4)
    model = t.InstructBlipForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, processor


def git():
    words = bert()
    config = t.GitConfig(
        vision_config=VISION, vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=0,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **DECODER,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return t.GitForCausalLM(config), t.GitProcessor(images, words)


def paligemma():
    words = llama_tokenizer("<image>", extra_special_tokens=IMAGE)
    text = llama_config(words, t.GemmaConfig)
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION), text_config=text, image_token_index=words.image_token_id,
        projection_dim=32, vocab_size=len(words),
    )  # fmt: skip
    images = t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // 8) ** 2
    return t.PaliGemmaForConditionalGeneration(config), t.PaliGemmaProcessor(images, words)


def idefics3():
    words = llama_tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
    config = t.Idefics3Config(
        vision_config=t.models.idefics3.Idefics3VisionConfig(**VISION), text_config=llama_config(words), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = t.Idefics3ImageProcessor(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    template = TEMPLATE.replace("IMAGE", "<image>").replace("END", "<end_of_utterance>")
    processor = t.Idefics3Processor(images, words, image_seq_len=4, chat_template=template)
    return t.Idefics3ForConditionalGeneration(config), processor


def llava():
    words = llama_tokenizer("<image>", extra_special_tokens=IMAGE)
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=llama_config(words), image_token_index=words.image_token_id,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = t.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


# Families that chat -------------------------------------------------------------------------------------------------
# Chat templates in the structure that their publishers gave them: who writes the start token, what stands around a turn.


def content(image: str, text: str = "{{ part['text'] }}") -> str:
    """The parts of a message: `image` for each picture, `text` for each text."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'text' %}" + text + "{% endif %}"
        "{% endfor %}{% endif %}"
    )


def chatml(image: str, system: str = "") -> str:
    first = "{% if loop.first and message['role'] != 'system' %}" + system + "{% endif %}"
    return (
        "{% for message in messages %}" + (first if system else "") + "<|im_start|>{{ message['role'] }}\n"
        + content(image) + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip


QWEN = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
)
IDEFICS = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + content("<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}" + content("{{ '<start_of_image>' }}", "{{ part['text'] | trim }}")
    + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
MLLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + content("<|image|>", "{{ part['text'] | trim }}")
    + "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The answer is written with a space before its line end, which the generation prompt lacks: it is no prefix.
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
JANUS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>: ' }}{% else %}{{ '<|Assistant|>: ' }}"
    "{% endif %}" + content("<image_placeholder>\n") + "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)


def qwen_tokenizer(*more: str, **names):
    """ChatML's: no start token, the end of a turn and the padding are two special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    return tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **names)


def qwen_text(words, **kw) -> dict:
    return {**LLAMA, "vocab_size": len(words), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 0, **kw}


def qwen_vl(kind: str):
    words = qwen_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = words.convert_tokens_to_ids
    tokens = {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip
    patch = {"patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision = {**patch, "depth": 2, "num_heads": 2, "in_channels": 3}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = qwen_text(words, rope_parameters=rope)
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        model, config, processor = t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig, t.Qwen2VLProcessor
    elif kind == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 32}
        vision |= {"fullatt_block_indexes": [1]}
        model, config, processor = t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig, t.Qwen2_5_VLProcessor
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16}
        vision |= {"deepstack_visual_indexes": [0, 1]}
        text["rope_parameters"] = rope | {"mrope_interleaved": True}
        model, config, processor = t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, t.Qwen3VLProcessor
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}  # numbers of pixels, as published
    images = t.Qwen2VLImageProcessor(size=sizes, patch_size=8, temporal_patch_size=2, merge_size=2)
    video = t.Qwen3VLVideoProcessor if kind == "qwen3_vl" else t.Qwen2VLVideoProcessor
    processor = processor(images, words, video(size=sizes, patch_size=8), chat_template=QWEN)
    return model(config(text_config=text, vision_config=vision, **tokens)), processor


def idefics2():
    words = llama_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    perceiver |= {"hidden_size": 32, "num_key_value_heads": 2}
    config = t.Idefics2Config(
        vision_config=VISION, text_config=llama_config(words, t.MistralConfig), perceiver_config=perceiver,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = t.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": SIDE}, do_image_splitting=False)
    processor = t.Idefics2Processor(images, words, image_seq_len=4, chat_template=IDEFICS)
    return t.Idefics2ForConditionalGeneration(config), processor


TILES = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]


def idefics3_llama3():
    """As Idefics3-8B-Llama3: the template writes the start token, and so does the tokenizer; pictures are tiled."""
    special = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *TILES]
    words = llama_tokenizer(*special)
    config = t.Idefics3Config(
        vision_config=t.models.idefics3.Idefics3VisionConfig(**VISION), text_config=llama_config(words), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = t.Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = t.Idefics3Processor(images, words, image_seq_len=4, chat_template="{{ bos_token }}" + IDEFICS)
    return t.Idefics3ForConditionalGeneration(config), processor


def smolvlm():
    special = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *TILES]
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", *special], bos_token="<|im_start|>", eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    text = llama_config(words)
    text.eos_token_id, text.pad_token_id = words.eos_token_id, 0
    config = t.SmolVLMConfig(
        vision_config=t.models.smolvlm.SmolVLMVisionConfig(**VISION), text_config=text, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = t.SmolVLMImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = t.SmolVLMProcessor(
        images, words, t.SmolVLMVideoProcessor(size={"longest_edge": SIDE}), image_seq_len=4,
        chat_template="<|im_start|>" + IDEFICS,
    )  # fmt: skip
    return t.SmolVLMForConditionalGeneration(config), processor


def gemma3():
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = llama_tokenizer(*names.values(), "<start_of_turn>", "<end_of_turn>", extra_special_tokens=names)
    text = t.Gemma3TextConfig(
        vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0, query_pre_attn_scalar=16,
        sliding_window=64, **LLAMA,
    )  # fmt: skip
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION), text_config=text, mm_tokens_per_image=4,
        image_token_index=words.image_token_id, image_token_id=words.image_token_id,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
    )  # fmt: skip
    images = t.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    model = t.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # begins as zeros
    return model, t.Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=4)


def llava_onevision():
    words = qwen_tokenizer(
        "<image>", "<video>", extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}
    )
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, SIDE]]
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=t.Qwen2Config(**qwen_text(words)),
        image_token_index=words.image_token_id, video_token_index=words.video_token_id, image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = t.LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints)
    video = t.LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})
    processor = t.LlavaOnevisionProcessor(
        images, words, video, num_image_tokens=(SIDE // 8) ** 2, vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def internvl():
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    words = qwen_tokenizer(*names.values(), extra_special_tokens=names)
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}
    config = t.InternVLConfig(
        vision_config=vision, text_config=t.Qwen2Config(**qwen_text(words)), image_seq_length=4,
        image_token_id=words.context_image_token_id, downsample_ratio=0.5,
    )  # fmt: skip
    images = t.GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    video = t.InternVLVideoProcessor(size={"height": SIDE, "width": SIDE})
    processor = t.InternVLProcessor(
        images, words, video, image_seq_length=4, chat_template=chatml("{{ '<IMG_CONTEXT>\n' }}")
    )
    return t.InternVLForConditionalGeneration(config), processor


def mllama():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
    words = tokenizer(
        special,
        before=["<|begin_of_text|>"],
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 64,
        "vision_output_dim": 64, "image_size": SIDE, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]],
    }  # fmt: skip
    sizes = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    text = {
        **sizes, "num_hidden_layers": 3, "vocab_size": len(words), "cross_attention_layers": [1], "bos_token_id": 0,
        "eos_token_id": words.eos_token_id, "pad_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    config = t.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<|image|>")
    )
    model = t.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "attn_gate" in name or "mlp_gate" in name or name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)  # as a trained model's: from zero, no picture is seen
    images = t.MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=4)
    return model, t.MllamaProcessor(images, words, chat_template=MLLAMA)


def janus():
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = llama_tokenizer(*names.values(), "<|User|>", "<|Assistant|>", extra_special_tokens=names)
    vision = {**VISION, "projection_dim": 32, "depth": 2, "num_image_tokens": (SIDE // 8) ** 2}
    vision.pop("intermediate_size")
    vq = {
        "embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32, "hidden_size": 32,
    }  # fmt: skip
    config = t.JanusConfig(
        text_config=llama_config(words).to_dict(),
        vision_config=vision,
        vq_config=vq,
        image_token_id=words.image_token_id,
    )
    images = t.JanusImageProcessor(size={"height": SIDE, "width": SIDE}, min_size=8)
    processor = t.JanusProcessor(images, words, chat_template=JANUS, num_image_tokens=(SIDE // 8) ** 2)
    return t.JanusForConditionalGeneration(config), processor


CHAT = {
    "git": git, "paligemma": paligemma, "idefics2": idefics2, "idefics3": idefics3, "idefics3-llama3": idefics3_llama3,
    "smolvlm": smolvlm, "qwen2_vl": lambda: qwen_vl("qwen2_vl"), "qwen2_5_vl": lambda: qwen_vl("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen_vl("qwen3_vl"), "gemma3": gemma3, "llava": llava, "llava_onevision": llava_onevision,
    "internvl": internvl, "mllama": mllama, "janus": janus,
}  # fmt: skip


def vit_gpt2():
    words = tokenizer(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    kind = {"is_decoder": True, "add_cross_attention": True, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = t.VisionEncoderDecoderConfig(
        encoder=t.ViTConfig(**VISION, hidden_dropout_prob=0.0).to_dict(),
        decoder=t.GPT2Config(vocab_size=len(words), **sizes, **kind, **rates).to_dict(),
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    images = t.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    return t.VisionEncoderDecoderModel(config), t.TrOCRProcessor(images, words)


def pix2struct():
    words = t5_tokenizer()
    sizes = {"hidden_size": 32, "d_ff": 64, "d_kv": 16, "dropout_rate": 0.0}
    text = {"vocab_size": len(words), "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, "eos_token_id": 1}
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_embed_hidden_size": 192, "seq_len": 16, **SIGHT}
    config = t.Pix2StructConfig(text_config=sizes | text, vision_config=sizes | vision)
    images = t.Pix2StructImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=16)
    return t.Pix2StructForConditionalGeneration(config), t.Pix2StructProcessor(images, words)


def florence2():
    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"], before=["<s>"], after=["</s>"], bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=IMAGE,
    )  # fmt: skip
    sides = {"encoder": 2, "decoder": 2}
    text = t.BartConfig(
        vocab_size=len(words), d_model=32, max_position_embeddings=128, dropout=0.0, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, **{f"{side}_layers": 2 for side in sides},
        **{f"{side}_attention_heads": 2 for side in sides}, **{f"{side}_ffn_dim": 64 for side in sides},
    )  # fmt: skip
    vision = {
        "depths": (1, 1, 1, 1),
        "embed_dim": (8, 16, 16, 32),
        "num_heads": (1, 2, 2, 2),
        "num_groups": (1, 2, 2, 2),
    }
    vision |= {"patch_stride": (4, 2, 1, 1), "window_size": 4, "projection_dim": 32, "drop_path_rate": 0.0}
    config = t.Florence2Config(vision_config=vision, text_config=text, image_token_id=words.image_token_id)
    images = t.CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    images.image_seq_length = (SIDE // 8) ** 2 + 1
    return t.Florence2ForConditionalGeneration(config), t.Florence2Processor(images, words)


def kosmos2():
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = tokenizer([*names.values()], before=["<s>"], after=["</s>"], metaspace=True, **names)
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = t.Kosmos2Processor(images, words)
    text = {"vocab_size": len(words), "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2, "dropout": 0.0}
    config = t.Kosmos2Config(
        text_config=text | {"max_position_embeddings": 128, "attention_dropout": 0.0}, vision_config=VISION,
        latent_query_num=64,
    )  # fmt: skip
    model = t.Kosmos2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.image_to_text_projection.dense.weight, std=0.5)  # features are of length 1
    return model, processor


CHAT |= {"vit-gpt2": vit_gpt2, "pix2struct": pix2struct, "florence2": florence2, "kosmos-2": kosmos2}


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    if name == "blip":
        import tempfile
        from pathlib import Path

        import tiny

        with tempfile.TemporaryDirectory() as folder:
            return tiny.build(Path(folder), seed)
    words = {"opt": opt_tokenizer, "t5": t5_tokenizer, "vicuna": vicuna_tokenizer}.get(name.rpartition("-")[2])
    if words:
        words, text = words(), {"opt": opt_config, "t5": t5_config, "vicuna": llama_config}[name.rpartition("-")[2]]
        model, processor = with_queries("blip-2" if name.startswith("blip2") else "instructblip", words, text(words))
    else:
        model, processor = CHAT[name]()
    from models.loading import ready

    return ready(model, processor), processor

"""A tiny model of every family, built with the real classes: `build(name)` gives (model, processor)."""

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

NAMES = [
    "blip", "git", "blip2-opt", "blip2-t5", "instructblip-t5", "instructblip-vicuna", "paligemma", "idefics3", "llava",
]  # fmt: skip
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
            vision_config=VISION, qformer_config=qformer, text_config=text_config.to_dict(), num_query_tokens=4,
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
        vision_config=VISION, qformer_config={**qformer, "vocab_size": len(seen)}, text_config=text_config.to_dict(),
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
    words = llama_tokenizer("<image>", "<end>", extra_special_tokens=IMAGE)
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=llama_config(words), image_token_index=words.image_token_id,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    template = TEMPLATE.replace("IMAGE", "<image>").replace("END", "<end>")
    processor = t.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


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
        model, processor = {"git": git, "paligemma": paligemma, "idefics3": idefics3, "llava": llava}[name]()
    from models.loading import ready

    return ready(model, processor), processor

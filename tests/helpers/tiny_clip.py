"""A small random CLIP, saved."""

import tiny
import torch
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

WIDTH, LAYERS, HEADS, SIDE, PATCH, EMBED, LENGTH = 32, 2, 2, 48, 16, 24, 20


def words():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *[chr(c) for c in range(97, 123)]]
    special += [f"##{chr(c)}" for c in range(97, 123)]
    return {word: number for number, word in enumerate(dict.fromkeys([*special, *tiny.VOCABULARY]))}


def write_clip(folder, seed=0, activation="quick_gelu", mean=None):
    tokenizer = BertTokenizer(vocab=words(), do_lower_case=True)
    torch.manual_seed(seed)
    layers = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "hidden_act": activation,
        "num_attention_heads": HEADS,
    }  # fmt: skip
    ends = {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id, "pad_token_id": 0}
    config = CLIPConfig(
        vision_config={**layers, "image_size": SIDE, "patch_size": PATCH},
        text_config={**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH},
        projection_dim=EMBED,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # no bias of zero, no scale of one: a tensor in the wrong place must show
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if mean:
        CLIPImageProcessor(image_mean=mean, image_std=mean).save_pretrained(folder)
    return folder

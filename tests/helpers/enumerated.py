"""A captioner of so few words that every caption can be tried, and the gradient of the expected reward that follows."""

import itertools
import json

import pytest
import tiny
import torch

from captioner import Captioner
from collator import CaptionCollator
from models.loading import build_model
from objectives.scst import SelfCritical

REFERENCES = {"0": ["a dog", "a red dog"], "1": ["dog", "red"], "2": ["a red", "a a"]}
LENGTH = 3


def build(tmp_path):
    """The captioner, in training mode, with dropout."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red"]))
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    config = tiny.CONFIG | {"text_config": tiny.CONFIG["text_config"] | rates}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model, processor = build_model(str(tmp_path / "config.json"), str(tmp_path / "vocab.txt"), [])
    # Some captions are likely and some are not, so that a wrong gradient is far from the right one.
    model.text_decoder.bert.embeddings.word_embeddings.weight.data.mul_(15)
    model.train()
    return Captioner(model, processor, num_beams=3, max_new_tokens=LENGTH)


def batch_of(captioner, image_ids, prompts_only=SelfCritical.prompts_only):
    collator = CaptionCollator(captioner.processor, captioner.model.config, prompts_only=prompts_only)
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(len(image_ids), 3, 32, 32, generator=generator),
        "image_ids": list(image_ids),
        **collator.token_tensors([REFERENCES[i] for i in image_ids]),
    }


def all_captions(captioner):
    """Every list of tokens that can be drawn."""
    others = [token for token in range(len(captioner.processor.tokenizer)) if token != captioner.collator.end]
    for length in range(LENGTH):
        yield from ([*words, captioner.collator.end] for words in itertools.product(others, repeat=length))
    yield from map(list, itertools.product(others, repeat=LENGTH))


def true_gradient(captioner, rewards, batch, temperature=1.0, top_p=1.0):
    """Of the expected reward of one image, by trying every caption, with the library's own forward pass."""
    model, captions = captioner.model, list(all_captions(captioner))
    rows = captioner.training_batch(captioner.encode(batch), captions)
    model.eval()
    logits = model(pixel_values=batch["pixel_values"], input_ids=rows["input_ids"]).logits / temperature
    model.train()
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.detach().sort(dim=-1, descending=True)
        nucleus = torch.zeros_like(ordered).scatter(-1, order, (ordered.cumsum(-1) - ordered < top_p).float())
        probabilities = probabilities * nucleus
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    texts = captioner.texts(captions)
    ended = [caption[-1] == captioner.collator.end for caption in captions]
    reward, _ = rewards(batch["image_ids"], [texts], [ended])
    each = []
    for row, caption in enumerate(captions):
        # Position 0 is the start token, and its output predicts the first token.
        each.append(torch.stack([probabilities[row, i, token] for i, token in enumerate(caption)]).prod())
    each = torch.stack(each)
    assert each.sum().item() == pytest.approx(1, abs=1e-5)
    return flat_gradient(model, (each * reward[0]).sum())


def flat_gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(objective, captioner, batch, truth, chunks=40):
    """(cosine of the mean estimate with the truth, mean squared distance from it in standard errors)."""
    items = batch["labels"][:, 1:].ne(-100).sum()
    captions = len(batch["labels"])
    torch.manual_seed(0)
    estimates = []
    for _ in range(chunks):
        loss = objective(captioner.model, batch)["loss"]
        estimates.append(flat_gradient(captioner.model, -loss * items / captions))
    estimates = torch.stack(estimates)
    mean, error = estimates.mean(dim=0), estimates.std(dim=0) / chunks**0.5
    moved = error > 1e-3 * error.max()
    z = (mean - truth)[moved] / error[moved]
    return torch.cosine_similarity(mean, truth, dim=0).item(), z.square().mean().item()

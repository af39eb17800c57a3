"""Every family trains, captions, saves and reloads alike, on tiny models of the real classes."""

import re

import families
import pytest
import torch
from PIL import Image

from captioner import Captioner
from collator import CaptionCollator
from objectives import CrossEntropy, caption_loss, token_log_probs

WORDS = families.TEXT[:10]


def samples(captions=WORDS, sizes=((8, 8),)):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, caption in enumerate(captions):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        width, height = sizes[number % len(sizes)]
        image = Image.fromarray(pixels).resize((width * 4, height * 4), Image.Resampling.NEAREST)
        group = [caption] if isinstance(caption, str) else caption
        found.append({"image": image, "image_id": str(number), "captions": group, "epoch": 0})
    return found


@pytest.fixture(params=families.NAMES)
def model_and_processor(request):
    return families.build(request.param)


def fit(model, batch, steps=350, lr=3e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        CrossEntropy()(model, batch)["loss"].backward()
        optimizer.step()
    return model.eval()


def test_ten_pairs_are_memorised_and_given_back_one_by_one_and_reloaded(model_and_processor, tmp_path):
    model, processor = model_and_processor
    pairs = samples(sizes=((8, 8), (12, 8)))
    captioner = Captioner(model, processor, early_stopping=False, num_beams=3, max_new_tokens=20)
    captioner.save_settings()
    fit(model, CaptionCollator(processor, model.config, prompt=captioner.prompt)(pairs))
    images = [sample["image"] for sample in pairs]
    assert captioner(images) == WORDS
    assert [captioner([image])[0] for image in images] == WORDS
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Captioner.from_pretrained(str(tmp_path))
    assert again.prompt == captioner.prompt
    assert again.settings == captioner.settings
    assert again(images) == WORDS


def test_every_parameter_moves(model_and_processor):
    model, processor = model_and_processor
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    collator = CaptionCollator(processor, model.config, prompt="caption:")
    fit(model, collator(samples()), steps=10)
    still = [name for name, parameter in model.named_parameters() if parameter.equal(before[name])]
    unused = UNUSED.get(model.config.model_type, "nothing")
    assert [name for name in still if not re.match(unused, name)] == []


# What the library's own forward pass never reads: poolers, and the last text layer of InstructBLIP's Q-Former.
UNUSED = {
    "instructblip": r"qformer\.encoder\.layer\.1\.(intermediate|output)\.",
    "paligemma": r"model\.vision_tower\.(vision_model\.)?head\.",
    "llava": r"model\.vision_tower\.(vision_model\.)?post_layernorm\.",
}


GOLDEN = {
    # (prompt, caption) as tokens with labels; | stands before the first token that is learnt
    "blip": "[DEC] a picture of | a dog [SEP]",
    "git": "[CLS] a picture of | a dog [SEP]",
    "blip2-opt": "<image> <image> <image> <image> </s> a picture of | a dog \\n",
    "blip2-t5": "<image> <image> <image> <image> a picture of </s> | a dog </s>",
    "instructblip-t5": "<image> <image> <image> <image> a picture of </s> | a dog </s>",
    "instructblip-vicuna": "<image> <image> <image> <image> <s> a picture of | a dog </s>",
    "paligemma": "<image> " * 16 + "<s> a picture of \\n | a dog </s>",
    "idefics3": "<s> User: <fake_token_around_image> <global-img> <image> <image> <image> <image> "
    "<fake_token_around_image> a picture of <end_of_utterance> \\n Assistant: | a dog <end_of_utterance>",
    "llava": "<s> User: " + "<image> " * 16 + "a picture of <end> \\n Assistant: | a dog <end>",
}


@pytest.mark.parametrize("name", families.NAMES)
def test_labels_are_the_caption_and_its_end_and_nothing_else(name):
    model, processor = families.build(name)
    batch = CaptionCollator(processor, model.config, prompt="a picture of ")(samples(["a dog", "two men in the water"]))
    tokenizer = processor.tokenizer
    learnt = batch["labels"][0] != -100
    inputs = batch["input_ids"][0]
    if "decoder_input_ids" in batch:
        shifted = batch["decoder_input_ids"][0, : int(learnt.sum())]
        assert shifted.tolist() == [0, *batch["labels"][0][learnt][:-1].tolist()]
        before, target = inputs, batch["labels"][0][learnt]
    else:
        assert batch["labels"][0][learnt].equal(inputs[learnt])
        first = int(learnt.nonzero()[0])
        before, target = inputs[:first], inputs[learnt]
        assert learnt[first : first + len(target)].all()
        assert batch["attention_mask"][0].tolist() == [1] * (first + len(target)) + [0] * (
            len(inputs) - first - len(target)
        )

    def words(ids):
        text = "".join(
            f" {t} " if t in tokenizer.added_tokens_encoder else t for t in map(tokenizer.decode, split(ids))
        )
        return " ".join(text.replace("\n", " \\n ").split())

    def split(ids):  # runs of ordinary tokens are decoded together
        run = []
        for token in ids.tolist():
            if token in tokenizer.added_tokens_decoder:
                yield from ([run] if run else [])
                run = []
                yield [token]
            else:
                run.append(token)
        yield from ([run] if run else [])

    assert f"{words(before)} | {words(target)}" == " ".join(GOLDEN[name].split())


def test_captions_of_an_image_have_the_loss_of_single_pairs(model_and_processor):
    """Grouped captions, whose image is encoded once where the family can, and pairs are the same training."""
    model, processor = model_and_processor
    model.eval()  # without dropout
    collator = CaptionCollator(processor, model.config)
    grouped = samples([WORDS[:3], WORDS[3:5]])
    single = [{**sample, "captions": [caption]} for sample in grouped for caption in sample["captions"]]
    losses, gradients = [], []
    for batch in (collator(grouped), collator(single)):
        model.zero_grad()
        loss = caption_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient - other).norm() <= 1e-4 * other.norm() + 1e-7, name


def test_log_probabilities_of_generated_tokens_are_those_they_were_generated_with(model_and_processor):
    """Shifted by one, or with another prompt, they would not be: what SCST and DiCO learn from."""
    model, processor = model_and_processor
    model.eval()
    captioner = Captioner(model, processor, num_beams=1, max_new_tokens=8)
    batch = captioner.collator(samples(WORDS[:2], sizes=((8, 8), (12, 8))))
    torch.manual_seed(0)
    tokens = captioner.generate_tokens(batch, do_sample=True, num_return_sequences=3, top_k=0)
    sampled = captioner.training_batch(batch, captioner.rows(tokens))
    with torch.no_grad():
        log_probs = token_log_probs(model, sampled)
    rows = sampled["labels"] != -100
    assert log_probs[rows].lt(0).all()
    assert log_probs[~rows].eq(0).all()
    greedy = captioner.training_batch(batch, captioner.rows(captioner.generate_tokens(batch)))
    with torch.no_grad():
        best = token_log_probs(model, greedy)
    scored = captioner.generate_tokens(batch, return_dict_in_generate=True, output_logits=True)
    for position, logits in enumerate(scored.logits):
        expected = logits.float().log_softmax(-1)
        for row in range(2):
            places = (greedy["labels"][row] != -100).nonzero().flatten()
            if position < len(places):
                token = greedy["labels"][row, places[position]]
                assert best[row, places[position]] == pytest.approx(expected[row, token].item(), abs=1e-4)

"""Images that are asked different things in one batch: each row is trained and captioned as it is alone."""

import families
import pytest
import torch
from PIL import Image

from captioner import Captioner
from collator import IGNORE, CaptionCollator
from common.errors import UserError
from data.prompts import PROMPTS
from models.families import base_model, family_of
from objectives import caption_loss, token_log_probs

ASKED = ["a picture of", "Describe the red circle near the water in one sentence.", "a small"]


def samples(prompts=ASKED):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, prompt in enumerate(prompts):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
        captions = families.TEXT[2 * number : 2 * number + 2]
        found.append({"image": image, "image_id": str(number), "captions": captions, "epoch": 0, PROMPTS: [prompt] * 2})
    return found


@pytest.fixture(scope="module", params=families.NAMES)
def disturbed(request):
    """(model, processor) whose weights are large enough for words to matter."""
    model, processor = families.build(request.param)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), processor


def per_row(model, batch) -> torch.Tensor:
    """(rows,) summed log-probability."""
    with torch.no_grad():
        return token_log_probs(model, batch).sum(dim=1)


def test_a_row_has_the_loss_that_it_has_alone_with_its_own_prompt(disturbed):
    model, processor = disturbed
    collator = CaptionCollator(processor, model.config, max_txt_len=60)
    together = per_row(model, collator(samples()))
    for number, sample in enumerate(samples()):
        constant = CaptionCollator(processor, model.config, max_txt_len=60, prompt=ASKED[number])
        for place, caption in enumerate(sample["captions"]):
            alone = constant([{name: v for name, v in sample.items() if name != PROMPTS} | {"captions": [caption]}])
            torch.testing.assert_close(together[2 * number + place], per_row(model, alone)[0], rtol=1e-4, atol=1e-4)
    assert together.unique().numel() == len(together)


def test_labels_are_the_captions_whatever_their_prompts(disturbed):
    model, processor = disturbed
    labels = CaptionCollator(processor, model.config, max_txt_len=60)(samples())["labels"]
    for row, caption in zip(labels, [text for sample in samples() for text in sample["captions"]], strict=True):
        learnt = row[row != IGNORE]
        assert processor.decode(learnt, skip_special_tokens=True).strip() == caption
        (places,) = (row != IGNORE).nonzero(as_tuple=True)
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_caption_is_the_one_that_its_prompt_gives_alone(disturbed, beams):
    model, processor = disturbed
    captioner = Captioner(model, processor, num_beams=beams, max_new_tokens=6, keep_prompt=True)
    batch = captioner.collator(samples())
    together = captioner.caption_batch(batch)
    alone = [captioner.with_settings(prompt)([s["image"]]) for prompt, s in zip(ASKED, samples(), strict=True)]
    assert together == alone
    assert all(text.startswith(prompt) for (text,), prompt in zip(together, ASKED, strict=True))
    sweep = captioner.caption_batch(batch, [captioner, captioner.with_settings(max_new_tokens=2)])
    assert [first for first, _ in sweep] == [text for (text,) in alone]


def test_a_prompt_with_columns_needs_a_row(disturbed):
    captioner = Captioner(*disturbed, prompt="a {colour} dog")
    with pytest.raises(UserError, match=r"'a \{colour\} dog' holds columns, and there is no row"):
        captioner([samples()[0]["image"]])
    batch = captioner.collator([samples()[0]])
    assert captioner.caption_batch(batch) == [captioner.with_settings(ASKED[0])([samples()[0]["image"]])]


def test_doubled_braces_are_text():
    model, processor = families.build("blip")
    words = lambda prompt: Captioner(model, processor, prompt=prompt).collator.words  # noqa: E731
    assert [words(prompt) for prompt in ("a {{small}} dog", '{"a": {"b": 1}}', "{} { }")] == [
        "a {small} dog",
        '{"a": {"b": 1}}',
        "{} { }",
    ]


def test_only_chat_models_take_a_system_prompt(disturbed):
    model, processor = disturbed
    if not family_of(model.config).chats:
        with pytest.raises(UserError, match="takes no system prompt"):
            Captioner(model, processor, system_prompt="Be short.")
        return
    collator = Captioner(model, processor, system_prompt="Be short.").collator
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED[0]}]}
    turns = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, asked]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.startswith(processor.apply_chat_template(turns[:1]))
    images = [samples()[0]["image"]]
    theirs = processor(images=[images], text=[text], add_special_tokens=collator.adds_special_tokens)["input_ids"]
    assert collator(samples()[:1])["input_ids"].tolist() == [list(theirs[0])]


def test_the_loss_of_a_conversation_is_the_librarys(disturbed):
    """The library's own loss of the whole conversation, with the tokens before the answer left out of its labels."""
    model, processor = disturbed
    if not family_of(model.config).chats:
        pytest.skip("asked by a chat template only")
    collator = CaptionCollator(processor, model.config)
    batch = collator(samples())
    for row, sample in enumerate(samples()):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED[row]}]},
            {"role": "assistant", "content": [{"type": "text", "text": sample["captions"][1]}]},
        ]
        before = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
        whole = processor.apply_chat_template(turns)
        texts = {"add_special_tokens": collator.images.adds_special_tokens, "return_tensors": "pt"}
        # Where answers open otherwise than the generation prompt, captions are trained behind the latter.
        opened = whole.rpartition(sample["captions"][1])[0] if whole.startswith(before) else before
        whole = opened + sample["captions"][1]
        inputs = dict(processor(images=[[sample["image"]]], text=[whole], **texts))
        length = processor(images=[[sample["image"]]], text=[before], **texts)["input_ids"].shape[1]
        along = inputs["input_ids"].shape
        inputs |= {n: torch.cat([v, v[:, -1:]], 1) for n, v in inputs.items() if v.shape[:2] == along}
        inputs["input_ids"][0, -1] = collator.images.end
        labels = inputs["input_ids"].clone()
        labels[:, :length] = IGNORE
        with torch.no_grad():
            theirs = base_model(model)(**inputs, labels=labels).loss
        ours = batch["labels"][2 * row + 1]
        found = -per_row(model, batch)[2 * row + 1] / (ours != IGNORE).sum()
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    assert caption_loss(model, batch).isfinite()


def test_an_answer_begins_with_the_words_that_are_given(disturbed):
    model, processor = disturbed
    if not family_of(model.config).chats:
        with pytest.raises(UserError, match="--start_with is for chat models"):
            Captioner(model, processor, start_with="a small")
        return
    captioner = Captioner(model, processor, num_beams=1, max_new_tokens=6, start_with="a small ")
    together = captioner.caption_batch(captioner.collator(samples()))
    assert all(text.startswith("a small") for (text,) in together)
    # What follows is what the model writes behind these words: as a caption that begins with them is continued.
    free = Captioner(model, processor, num_beams=1, max_new_tokens=1)
    for (text,), sample in zip(together, samples(), strict=True):
        batch = free.collator([sample])
        begun = [processor.tokenizer(captioner.collator.lead + "a small", add_special_tokens=False)["input_ids"]]
        inputs = {n: v for n, v in batch.items() if isinstance(v, torch.Tensor)}
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor(begun)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():  # as of other words of the answer
            inputs[name] = torch.nn.functional.pad(
                inputs[name], (0, len(begun[0])), value=family_of(model.config).caption_tokens[name]
            )
        with torch.no_grad():
            settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": captioner.collator.end}
            new = model.generate(**inputs, **settings, pad_token_id=captioner.collator.pad)
            new = new[0, batch["input_ids"].shape[1] :]
        assert text == " ".join(processor.decode(new, skip_special_tokens=True).split())

"""Every family trains, captions, saves and reloads alike, on tiny models of the real classes."""

import re

import families
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, LlavaForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from captioner import Captioner
from collator import CaptionCollator, input_size
from models import vision
from models.decoding import generate
from models.families import ENCODED, family_of, model_inputs
from models.loading import ready
from models.prefix import may_share
from models.vision import encodes_once
from objectives import CrossEntropy, caption_loss, token_log_probs
from objectives.cross_entropy import target_logits

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


SHAPES = ((8, 8), (20, 8), (6, 16))  # of pictures: processors that cut tiles or patches make other numbers of each


@pytest.fixture(scope="module", params=families.NAMES)
def disturbed(request):
    """(captioner, batch of three pictures) of a model whose weights are large enough for pictures to matter."""
    model, processor = families.build(request.param)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    captioner = Captioner(model.eval(), processor, num_beams=1, max_new_tokens=6)
    return captioner, captioner.collator(samples(WORDS[:3], SHAPES))


def one_by_one(captioner, rows, times) -> list[torch.Tensor]:
    """The log-probabilities of the tokens of each of `rows`, an image and a row at a time, never encoded beforehand."""
    found = []
    for number, row in enumerate(rows):
        batch = captioner.collator([samples(WORDS[:3], SHAPES)[number // times]])
        with torch.no_grad():
            log_probs = token_log_probs(captioner.model, captioner.training_batch(batch, [row]))
        found.append(log_probs[log_probs != 0])
    return found


def test_the_tiny_model_sees_its_picture(model_and_processor):
    """Else no test with it could tell one picture from another."""
    model, processor = model_and_processor
    collator = CaptionCollator(processor, model.config)
    batch = collator([sample | {"captions": ["a dog runs"]} for sample in samples(WORDS[:2])])
    with torch.no_grad():
        one, other = token_log_probs(ready(model.eval(), processor), batch)
    assert (one - other).abs().max() > 1e-5


# Families whose library class takes no encoded images, or takes them in a way of its own.
ENCODED_AGAIN = {"mllama"}


def test_samples_are_scored_on_their_own_picture(disturbed):
    captioner, batch = disturbed
    torch.manual_seed(0)
    encoded = captioner.encode(batch)
    if captioner.model.config.model_type not in ENCODED_AGAIN:
        assert encodes_once(captioner.model)
        pixels = captioner.collator.family.pixels
        assert ENCODED in encoded or not encoded[pixels].equal(batch[pixels])
    rows = captioner.rows(captioner.generate_tokens(encoded, do_sample=True, num_return_sequences=3, top_k=0))
    expected = one_by_one(captioner, rows, times=3)
    swapped = one_by_one(captioner, rows[3:] + rows[:3], times=3)  # on the pictures of others
    assert max((a - b).abs().max() for a, b in zip(expected, swapped[6:] + swapped[:6], strict=True)) > 1e-3
    for images in (encoded, batch):
        together = captioner.training_batch(images, rows)
        with torch.no_grad():
            log_probs = token_log_probs(captioner.model, together)
        for row, alone in zip(log_probs, expected, strict=True):
            torch.testing.assert_close(row[row != 0], alone, atol=1e-5, rtol=0)


def test_beams_and_samples_of_encoded_pictures_are_those_of_pixels(disturbed):
    captioner, batch = disturbed
    beams = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    encoded = captioner.encode(batch)
    first, again = (captioner.rows(captioner.generate_tokens(encoded, **beams)) for _ in range(2))
    assert first == again == captioner.rows(captioner.generate_tokens(batch, **beams))


# Families with a prompt of image tokens that read it again: Kosmos-2 has positions by the token, Mllama's cache holds images.
READ_AGAIN = {"kosmos-2": {"captions": False, "beams": False}, "mllama": {"captions": True, "beams": False}}


def test_beams_samples_and_sweeps_that_share_a_prompt_are_those_of_the_library(disturbed):
    captioner, batch = disturbed
    model, kind = captioner.model, captioner.model.config.model_type
    scored = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 5}
    ways = (
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    )
    inputs = model_inputs(model.config, captioner._on_device(batch))
    for way in ways:
        found = {}
        for shared in (False, True):
            torch.manual_seed(0)
            if shared or not may_share(model):
                found[shared] = captioner.generate_tokens(batch, **way, **scored)
            else:
                found[shared] = generate(model, **inputs, **captioner.search(**way, **scored))
                found[shared].sequences = found[shared].sequences[:, inputs["input_ids"].shape[1] :]
        assert found[True].sequences.equal(found[False].sequences)
        for ours, library in zip(found[True].scores, found[False].scores, strict=True):
            torch.testing.assert_close(ours, library, atol=1e-5, rtol=1e-5)
    captioners = [captioner.with_settings(num_beams=beams) for beams in (1, 3)]
    swept = captioner.caption_batch(batch, captioners)
    assert [list(of) for of in zip(*swept, strict=True)] == [
        [texts[0] for texts in c.caption_batch(batch)] for c in captioners
    ]
    if may_share(model):
        with torch.no_grad():
            last = model.config.get_text_config().vocab_size - 1  # ordinary words: special tokens are at the front
            token_log_probs(model, captioner.training_batch(captioner.encode(batch), [[last, last - 1], [last]] * 3))
        assert {name: vision._EQUAL[model][name] for name in ("captions", "beams")} == READ_AGAIN.get(
            kind, {"captions": True, "beams": True}
        )
    else:
        assert kind not in ("llava", "gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")


def test_no_token_sees_what_it_is_to_predict(disturbed):
    """The logits before a caption's last token do not move when that token is another."""
    captioner, batch = disturbed
    first = captioner.model.config.get_text_config().vocab_size - 14  # ordinary words: special tokens are at the front
    rows = [[first + 4 * row + column for column in range(4)] for row in range(3)]
    logits = []
    for last in (0, 1):
        changed = captioner.training_batch(batch, [[*row[:-1], row[-1] + last] for row in rows])
        with torch.no_grad():
            logits.append(target_logits(captioner.model, changed)[0])
    assert logits[0].equal(logits[1])  # target_logits are those that predict: the last token's own are not among them
    other = captioner.training_batch(batch, [[row[0] + 1, *row[1:]] for row in rows])
    with torch.no_grad():
        moved = target_logits(captioner.model, other)[0] - logits[0]
    assert moved.view(3, 4, -1).abs().amax(dim=2).gt(1e-6).tolist() == [[False, True, True, True]] * 3


def test_prompt_ids_are_those_of_the_library(disturbed):
    captioner, batch = disturbed
    if not family_of(captioner.model.config).chats:
        pytest.skip("no chat template")
    for row, mask, sample in zip(batch["input_ids"], batch["attention_mask"], samples(WORDS[:3], SHAPES), strict=True):
        content = [{"type": "image", "image": sample["image"]}, {"type": "text", "text": captioner.prompt}]
        ids = captioner.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        assert row[mask.bool()].tolist() == list(ids)


class Prefer(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [token for token in self.tokens if token < scores.shape[1]]] += 1e4
        return scores


def test_placeholders_are_never_sampled(disturbed):
    captioner, batch = disturbed
    placeholders = captioner.collator.placeholders
    image = getattr(captioner.model.config, "image_token_id", None)
    assert image is None or image in placeholders
    for sampling in ({"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}):
        tokens = captioner.generate_tokens(
            batch, logits_processor=LogitsProcessorList([Prefer(placeholders)]), **sampling
        )
        assert not set(tokens.flatten().tolist()) & set(placeholders)


def test_an_unknown_input_along_the_text_is_refused_by_its_name(disturbed):
    captioner, batch = disturbed
    if captioner.collator.decoder_prompt is not None:
        pytest.skip("the caption is not behind the prompt")
    known = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="'speaker_ids' runs along the prompt"):
        captioner.training_batch(known | {"speaker_ids": torch.zeros_like(known["input_ids"])}, [[5, 6]] * 3)


def test_augmentation_aims_at_what_the_processor_makes(disturbed):
    """A size only where every picture becomes of that size."""
    captioner, _ = disturbed
    size = input_size(captioner.processor.image_processor)
    pixels = [captioner.collator([sample]).get("pixel_values") for sample in samples(WORDS[:3], SHAPES)]
    if size is None:
        assert captioner.model.config.model_type in (
            "idefics2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "mllama",
            "pix2struct",
        )  # fmt: skip
    else:
        assert [tuple(found.shape) for found in pixels] == [(1, 3, *size)] * 3


def template(user: str, bot: str, generation: str = "") -> str:
    """A chat template of two turns, SAID being what is said in them, and its generation prompt."""
    user = repr(user).replace("SAID", "<image>' + message['content'][1]['text'] + '")
    bot = repr(bot).replace("SAID", "' + message['content'][0]['text'] + '")
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ " + user + " }}{% else %}{{ " + bot + " }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + repr(generation) + " }}{% endif %}"
    )


@pytest.mark.parametrize(
    ("texts", "before", "learnt", "said"),
    [
        # A generation prompt that is no prefix of the conversation, as LLaVA-OneVision's; one that opens a thought.
        (("User \nSAID.", "Bot \nSAID.", "Bot\n"), "User \n<image>Say.Bot\n", "a dog", "right behind the generation"),
        (("User\nSAID.", "Bot\nSAID.", "Bot\n<s>\n"), "User\n<image>Say.Bot\n<s>\n", "a dog", "right behind the gen"),
        # A thought that the generation prompt opens and a conversation closes, as Qwen3-VL-Thinking's.
        (("User\nSAID.", "Bot\n<think>\n\n</think>\n\nSAID.", "Bot\n<think>\n"),
         "User\n<image>Say.Bot\n<think>\n\n</think>\n\n", "a dog", "is added"),
        # No generation prompt at all; one with the space left to the answer; one as it should be.
        (("User: SAID.", "Bot: SAID."), "User: <image>Say.Bot:", " a dog", "is added"),
        (("User: SAID.", "Bot: SAID.", "Bot:"), "User: <image>Say.Bot:", " a dog", ""),
        (("User\nSAID.", "Bot\nSAID.", "Bot\n"), "User\n<image>Say.Bot\n", "a dog", ""),
    ],
)  # fmt: skip
def test_the_answer_begins_where_the_template_says(texts, before, learnt, said, caplog):
    model, processor = families.build("llava")
    processor.chat_template = template(*texts)
    caplog.clear()
    batch = CaptionCollator(processor, model.config, prompt="Say")(samples(["a dog"]))
    assert (said in caplog.text and caplog.text.count("\n") == 1) if said else not caplog.text
    learning, ids = batch["labels"][0] != -100, batch["input_ids"][0]
    start = int(learning.nonzero()[0])
    decode = processor.tokenizer.decode
    assert decode(ids[:start]).replace("<image>" * 16, "<image>").removeprefix("<s>") == before
    assert decode(ids[start:]) == learnt + "</s>"
    assert learning[start:].all()


def test_a_template_without_answers_is_refused():
    model, processor = families.build("llava")
    processor.chat_template = template("SAID", "")
    with pytest.raises(ValueError, match="leaves out the text of an answer"):
        CaptionCollator(processor, model.config, prompt="Say")


class Deaf(LlavaForConditionalGeneration):
    """A release of the library whose model passes over encoded images."""

    def forward(self, *args, mm_encoder_outputs=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_where_encoded_images_change_logits_pixels_are_used_and_it_is_said(caplog):
    model, processor = families.build("llava")
    captioner = Captioner(model.eval(), processor, num_beams=1, max_new_tokens=6)
    batch = captioner.collator(samples(WORDS[:3], SHAPES))
    rows = [[40, 41], [42, 43]] * 3
    with torch.no_grad():
        expected = token_log_probs(model, captioner.training_batch(captioner.encode(batch), rows))
        model.__class__ = Deaf
        vision._EQUAL.clear()
        found = token_log_probs(model, captioner.training_batch(captioner.encode(batch), rows))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "gives other logits for encoded images" in caplog.text


def test_tiles_that_cannot_be_repeated_are_refused():
    """Repeating rows would give an image the tiles of another: three pictures of 9 tiles in all."""
    model, processor = families.build("llava")
    captioner = Captioner(model.eval(), processor, num_beams=1, max_new_tokens=6)
    model.__class__ = type("Old", (LlavaForConditionalGeneration,), {"forward": lambda self, **inputs: None})
    batch = captioner.collator(samples(WORDS[:3], SHAPES))
    batch["pixel_values"] = batch["pixel_values"].repeat(3, 1, 1, 1)
    with pytest.raises(ValueError, match="9 rows of pixel_values for 3 images"):
        captioner.generate_tokens(batch, num_beams=2)
    with pytest.raises(ValueError, match="model_kwargs"):  # a caption per image comes as far as generate
        captioner.generate_tokens(batch, num_beams=1)
    passed = captioner.training_batch(batch, [[5, 6]] * 6)
    with pytest.raises(ValueError, match="9 rows of pixel_values for 3 images"):
        target_logits(model, passed)


@pytest.mark.parametrize(("kind", "message"), [("udop", "words of a page"), ("clip", "Known families: blip, ")])
def test_what_cannot_caption_is_refused_by_its_reason(kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        family_of(AutoConfig.for_model(kind))
    names = str(caught.value).rpartition("Known families: ")[2].removesuffix(".").split(", ")
    if kind == "clip":
        kinds = {
            "blip2": "blip-2",
            "instructblip": "instructblip",
            "vit": "vision-encoder-decoder",
            "kosmos": "kosmos-2",
        }
        assert set(names) == {kinds.get(name.partition("-")[0], name.partition("-")[0]) for name in families.ALL}
        assert "udop" not in names


def test_a_pix2struct_that_answers_questions_is_refused_by_its_reason():
    model, processor = families.build("pix2struct")
    processor.image_processor.is_vqa = True
    with pytest.raises(ValueError, match="takes header text"):
        ready(model, processor)


def fit(model, batch):
    """Trains until the pairs are known: two short rounds of the learning rate get there in fewer steps than a long one."""
    for _ in range(5):
        if fit_once(model, batch, steps=150) < 0.02:
            break


def fit_once(model, batch, steps, lr=3e-3) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss = CrossEntropy()(model, batch)["loss"]
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


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
    again = Captioner.from_pretrained(str(tmp_path), bf16=False)
    assert again.prompt == captioner.prompt
    assert again.settings == captioner.settings
    assert again(images) == WORDS


def test_every_parameter_moves(model_and_processor):
    model, processor = model_and_processor
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    collator = CaptionCollator(processor, model.config, prompt="caption:")
    fit_once(model, collator(samples()), steps=30)
    still = [name for name, parameter in model.named_parameters() if parameter.equal(before[name])]
    unused = UNUSED.get(model.config.model_type, "nothing")
    assert [name for name in still if not re.match(unused, name)] == []


# What the library's own forward pass never reads: poolers, and the last text layer of InstructBLIP's Q-Former.
UNUSED = {
    "instructblip": r"qformer\.encoder\.layer\.1\.(intermediate|output)\.",
    "gemma3": r"model\.vision_tower\.(vision_model\.)?head\.",
    "janus": r"model\.(vqmodel|generation_)",  # the half that draws images
    "paligemma": r"model\.vision_tower\.(vision_model\.)?head\.",
    "llava_onevision": r"model\.vision_tower\.(vision_model\.)?post_layernorm\.",
    "qwen3_vl": r"model\.visual\.deepstack_merger_list\.1\.",  # the tiny model has no layer for it
    "llava": r"model\.vision_tower\.(vision_model\.)?post_layernorm\.",
    "vision-encoder-decoder": r"encoder\.pooler\.",
}


TILES = " \\n ".join(
    " ".join(f"<fake_token_around_image> <row_{row}_col_{column}> " + "<image> " * 4 for column in (1, 2))
    for row in (1, 2)
)
TILES += " \\n \\n <fake_token_around_image> <global-img> " + "<image> " * 4 + "<fake_token_around_image>"
QWEN = (
    "<|im_start|> system \\n You are a helpful assistant. <|im_end|> \\n <|im_start|> user \\n <|vision_start|> "
    + "<|image_pad|> " * 4
    + "<|vision_end|> a picture of <|im_end|> \\n <|im_start|> assistant \\n | a dog <|im_end|>"
)
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
    "idefics2": "<s> User: <fake_token_around_image> <image> <image> <image> <image> <fake_token_around_image> a picture of "
    "<end_of_utterance> \\n Assistant: | a dog <end_of_utterance>",
    "idefics3-llama3": f"<s> User: {TILES} a picture of <end_of_utterance> \\n Assistant: | a dog <end_of_utterance>",
    "smolvlm": f"<|im_start|> User: {TILES} a picture of <end_of_utterance> \\n Assistant: | a dog <end_of_utterance>",
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": "<s> <start_of_turn> user \\n \\n \\n <start_of_image> "
    + "<image_soft_token> " * 4
    + "<end_of_image> \\n \\n a picture of <end_of_turn> \\n <start_of_turn> model \\n | a dog <end_of_turn>",
    "llava_onevision": "<|im_start|> user "
    + "<image> " * 36
    + "\\n a picture of <|im_end|> <|im_start|> assistant \\n | a dog <|im_end|>",
    "internvl": "<|im_start|> user \\n <img> "
    + "<IMG_CONTEXT> " * 4
    + "</img> \\n a picture of <|im_end|> \\n <|im_start|> assistant \\n | a dog <|im_end|>",
    "mllama": "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> \\n \\n <|image|> a picture of <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> \\n \\n | a dog <|eot_id|>",
    "janus": "<s> <|User|> : <begin_of_image> "
    + "<image_placeholder> " * 16
    + "<end_of_image> \\n a picture of \\n \\n <|Assistant|> : | a dog </s>",
    "llava": "<s> USER: " + "<image> " * 16 + "\\n a picture of ASSISTANT: | a dog </s>",
    "vit-gpt2": "<|endoftext|> a picture of | a dog <|endoftext|>",
    "pix2struct": "<pad> a picture of | a dog </s>",
    "florence2": "<image> " * 17 + "<s> a picture of </s> | a dog </s>",
    "kosmos-2": "<s> <image> IMAGE </image> a picture of | a dog </s>",
}


@pytest.mark.parametrize("name", families.NAMES)
def test_labels_are_the_caption_and_its_end_and_nothing_else(name):
    model, processor = families.build(name)
    collator = CaptionCollator(processor, model.config, prompt="a picture of ")
    batch = collator(samples(["a dog", "two men in the water"]))
    tokenizer = processor.tokenizer
    learnt = batch["labels"][0] != -100
    inputs = batch["input_ids"][0]
    if "decoder_input_ids" in batch:
        start = [2, 0] if name == "florence2" else [0]
        shifted = batch["decoder_input_ids"][0, : len(start) - 1 + int(learnt.sum())]
        assert shifted.tolist() == [*start, *batch["labels"][0][learnt][:-1].tolist()]
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

    found = f"{words(before)} | {words(target)}"
    found = re.sub("(?<=<image> ).*(?= </image>)", "IMAGE", found)  # Kosmos-2 has the first 64 words there
    assert found == " ".join(GOLDEN[name].split())


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

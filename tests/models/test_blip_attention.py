"""Fast BLIP attention gives the library's numbers: the peer in every test is an untouched transformers model."""

import contextlib
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextSelfAttention

from models.blip_attention import (
    FastTextAttention,
    FastTextDecoder,
    TextDecoder,
    target_positions,
    use_fast_attention,
)

VOCABULARY, START, SEP = 120, 118, 3


def tiny_blip(seed: int = 0, dropout: float = 0.0, smoothing: float = 0.0) -> BlipForConditionalGeneration:
    torch.manual_seed(seed)
    config = BlipConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": START,
            "sep_token_id": SEP,
            "eos_token_id": SEP,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            "attention_probs_dropout_prob": dropout,
            "label_smoothing": smoothing,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
            "attention_dropout": dropout,
        },
    )
    return BlipForConditionalGeneration(config).eval()


def eager_and_fast(**settings) -> tuple[BlipForConditionalGeneration, BlipForConditionalGeneration]:
    eager = tiny_blip(**settings)
    return eager, use_fast_attention(copy.deepcopy(eager))


def random_captions(rows: int, length: int, seed: int = 0, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Captions of all lengths from 3 to `length`; their labels skip the start token and padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, START, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        padding = row % (length - 2)
        if padding and padding_side == "right":
            attention_mask[row, -padding:] = 0
        elif padding:
            attention_mask[row, :padding] = 0
    input_ids[attention_mask == 0] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[attention_mask.cumsum(dim=1) == 1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def random_images(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def photo_paths(test_data: Path) -> list[Path]:
    return sorted((test_data / "flickr8k" / "Flicker8k_Dataset").glob("*.jpg"))


def real_photos(test_data: Path, count: int) -> torch.Tensor:
    photos = [Image.open(path).convert("RGB").resize((32, 32)) for path in photo_paths(test_data)[:count]]
    return torch.stack([torch.from_numpy(numpy.array(photo)) for photo in photos]).permute(0, 3, 1, 2) / 127.5 - 1


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_loss_logits_and_gradients_equal_eager(padding_side):
    for seed in range(10):
        eager, fast = eager_and_fast(seed=seed)
        batch = {"pixel_values": random_images(6, seed), **random_captions(6, 9, seed, padding_side)}
        theirs, ours = eager(**batch), fast(**batch)
        real = batch["attention_mask"].bool()  # padding before a caption sees nothing, and what it says is never read
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-5, atol=1e-5)
        theirs.loss.backward()
        ours.loss.backward()
        assert_equal_gradients(gradients(fast), gradients(eager))


@pytest.mark.parametrize("enabled", [True, False])
def test_grouped_captions_equal_one_image_a_caption(enabled):
    eager = tiny_blip()
    grouped = use_fast_attention(copy.deepcopy(eager), enabled)
    images, captions = random_images(3), random_captions(15, 8)
    theirs = eager(pixel_values=images.repeat_interleave(5, dim=0), **captions)
    ours = grouped(pixel_values=images, **captions)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    ours.loss.backward()
    assert_equal_gradients(gradients(grouped), gradients(eager))


def test_uneven_groups_are_refused():
    model = use_fast_attention(tiny_blip())
    with pytest.raises(ValueError, match="7 captions for 3 images"):
        model(pixel_values=random_images(3), **random_captions(7, 6))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_from_target_positions_equals_the_models_own(enabled, smoothing):
    eager = tiny_blip(smoothing=smoothing)
    model = use_fast_attention(copy.deepcopy(eager), enabled)
    images, captions = random_images(2), random_captions(6, 8)
    captions["labels"][:, :3] = -100  # a prompt
    theirs = eager(pixel_values=images.repeat_interleave(3, dim=0), **captions)
    labels = captions.pop("labels")
    positions = target_positions(labels)
    logits = model(pixel_values=images, **captions, logits_to_keep=positions).logits
    targets = labels[:, 1:][labels[:, 1:] != -100]
    assert logits.shape == (len(targets), VOCABULARY)
    assert len(targets) < labels.numel()
    torch.testing.assert_close(logits, theirs.logits[positions], rtol=1e-5, atol=1e-5)
    loss = cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    loss.backward()
    assert_equal_gradients(gradients(model), gradients(eager))


def test_encoded_images_stand_in_for_pixels():
    eager, fast = eager_and_fast()
    images, captions = random_images(2), random_captions(6, 8)
    embeds = fast.vision_model(pixel_values=images).last_hidden_state.detach()
    theirs = eager(pixel_values=images.repeat_interleave(3, dim=0), **captions)
    ours = fast(pixel_values=embeds, **captions)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    assert not any(name.startswith("vision_model") for name in gradients(fast))


def test_state_dict_and_parameters_stay_the_librarys():
    eager, fast = eager_and_fast()
    assert list(fast.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in eager.named_modules()]


def test_switching_back_gives_bit_equal_eager_results():
    eager, fast = eager_and_fast()
    batch = {"pixel_values": random_images(4), **random_captions(4, 8)}
    restored = use_fast_attention(fast, False)
    assert torch.equal(restored(**batch).logits, eager(**batch).logits)


def test_a_saved_model_is_a_plain_transformers_model(tmp_path):
    eager, fast = eager_and_fast()
    fast.save_pretrained(tmp_path)
    loaded = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["BlipForConditionalGeneration"]
    batch = {"pixel_values": random_images(4), **random_captions(4, 8)}
    assert torch.equal(loaded(**batch).logits, eager(**batch).logits)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_fast_attention(duplicate):
    _, fast = eager_and_fast()
    other = duplicate(fast)
    assert [type(module) for module in other.modules()] == [type(module) for module in fast.modules()]
    batch = {"pixel_values": random_images(2), **random_captions(6, 8)}
    expected = fast(**batch).logits
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()  # a copy that still pointed at the original would notice
    assert torch.equal(other(**batch).logits, expected)


def test_attention_dropout_falls_in_training_only():
    eager, fast = eager_and_fast(dropout=0.3)
    batch = {"pixel_values": random_images(2), **random_captions(2, 8)}
    torch.testing.assert_close(fast(**batch).logits, eager(**batch).logits, rtol=1e-5, atol=1e-5)
    fast.train()
    torch.manual_seed(0)
    first = fast(**batch).logits
    second = fast(**batch).logits
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean_loss_of_eager():
    # The random numbers differ, their distribution must not: means over many passes agree within four standard errors.
    eager, fast = eager_and_fast(dropout=0.3)
    batch = {"pixel_values": random_images(4), **random_captions(4, 8)}
    losses = {}
    for name, model in (("eager", eager.train()), ("fast", fast.train())):
        torch.manual_seed(1)
        with torch.no_grad():
            losses[name] = torch.stack([model(**batch).loss for _ in range(400)])
    error = sum(values.var() / len(values) for values in losses.values()).sqrt()
    assert abs(losses["eager"].mean() - losses["fast"].mean()) < 4 * error
    assert losses["fast"].std() == pytest.approx(losses["eager"].std().item(), rel=0.2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    eager, fast = eager_and_fast()
    batch = {"pixel_values": random_images(2), **random_captions(6, 8)}
    peer_batch = batch | {"pixel_values": batch["pixel_values"].repeat_interleave(3, dim=0)}
    fast.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        fast.enable_input_require_grads()
        fast.vision_model.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    fast(**batch).loss.backward()
    eager.train()(**peer_batch).loss.backward()
    assert_equal_gradients(gradients(fast), gradients(eager))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_autocast_is_as_close_to_float32_as_eager_autocast(dtype, enabled, padding_side):
    """Half precision tolerance: fast attention is no further from float32 than 1.5 times eager's own distance."""
    eager = tiny_blip()
    model = use_fast_attention(copy.deepcopy(eager), enabled)
    captions = random_captions(12, 9, padding_side=padding_side)
    real = captions["attention_mask"].bool()  # what a padding position says is nobody's concern
    images = random_images(12)
    with torch.no_grad():
        exact = eager(pixel_values=images, **captions).logits[real]
        with torch.autocast("cpu", dtype=dtype):
            theirs = eager(pixel_values=images, **captions).logits[real].float()
            ours = model(pixel_values=images, **captions).logits[real].float()
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_as_close_to_float32_as_eager_ones(dtype):
    eager = tiny_blip()
    captions, images = random_captions(12, 9), random_images(12)
    real = captions["attention_mask"].bool()
    with torch.no_grad():
        exact = eager(pixel_values=images, **captions).logits[real]
        half = copy.deepcopy(eager).to(dtype)
        theirs = half(pixel_values=images.to(dtype), **captions).logits[real].float()
        ours = use_fast_attention(half)(pixel_values=images.to(dtype), **captions).logits[real].float()
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_bfloat16_training_step_has_finite_gradients():
    _, fast = eager_and_fast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(pixel_values=random_images(3), **random_captions(15, 9, padding_side="left")).loss
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(fast).values())


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_trains_the_same_adapters(patch_first):
    peft = pytest.importorskip("peft")

    def with_lora(model, fast):
        if fast and patch_first:
            use_fast_attention(model)
        torch.manual_seed(5)
        config = peft.LoraConfig(
            r=4, target_modules=["query", "key", "value", "qkv", "projection"], init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).eval()
        return use_fast_attention(model) if fast and not patch_first else model

    eager, fast = with_lora(tiny_blip(), False), with_lora(tiny_blip(), True)
    images, captions = random_images(2), random_captions(6, 8)
    theirs = eager(pixel_values=images.repeat_interleave(3, dim=0), **captions)
    ours = fast(pixel_values=images, **captions)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    ours.loss.backward()
    assert_equal_gradients(gradients(fast), gradients(eager))
    assert all("lora" in name for name in gradients(fast))


def test_torch_compile_gives_the_same_gradients():
    eager, fast = eager_and_fast()
    images, captions = random_images(2), random_captions(6, 8)
    compiled = torch.compile(fast, backend="aot_eager")
    theirs = eager(pixel_values=images.repeat_interleave(3, dim=0), **captions)
    ours = compiled(pixel_values=images, **captions)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    ours.loss.backward()
    assert_equal_gradients(gradients(fast), gradients(eager))


DDP_STEP = """
import os, sys, torch, torch.distributed as dist
from test_blip_attention import *
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.parallel.DistributedDataParallel(use_fast_attention(tiny_blip()))
images, captions = random_images(4), random_captions(12, 8)
mine = slice(6 * rank, 6 * rank + 6)
labels = captions["labels"]
logits = model(pixel_values=images[2 * rank : 2 * rank + 2], input_ids=captions["input_ids"][mine],
               attention_mask=captions["attention_mask"][mine], logits_to_keep=target_positions(labels[mine])).logits
targets = labels[mine, 1:][labels[mine, 1:] != -100]
total = (labels[:, 1:] != -100).sum()
# DDP averages over the two processes, so the sum of losses is multiplied by two.
(cross_entropy(logits, targets, reduction="sum") / total * 2).backward()
if rank == 0:
    torch.save(gradients(model.module), sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_get_the_gradients_of_one(tmp_path):
    script, result = tmp_path / "step.py", tmp_path / "gradients.pt"
    script.write_text(DDP_STEP)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [
                str(ROOT),
                *(str(ROOT / "tests" / room) for room in (".", "helpers", "models")),
                os.environ.get("PYTHONPATH", ""),
            ]
        ),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, result]
    subprocess.run(command, env=environment, check=True, timeout=120)
    eager = tiny_blip()
    eager(pixel_values=random_images(4).repeat_interleave(3, dim=0), **random_captions(12, 8)).loss.backward()
    assert_equal_gradients(torch.load(result, weights_only=True), gradients(eager))


def test_real_photos_and_captions_give_eager_results(test_data):
    photos = real_photos(test_data, 20)
    captions_of: dict[str, list[str]] = {}
    for line in (test_data / "flickr8k" / "Flickr8k.token.txt").read_text().splitlines():
        name, caption = line.split("\t")
        captions_of.setdefault(name.split("#")[0], []).append(caption)
    names = [path.name for path in photo_paths(test_data)[:20]]
    # Word lengths stand in for token ids: the lengths and repetitions of real captions, no tokenizer needed.
    rows = [
        [START, *[4 + len(word) for word in caption.split()], SEP] for name in names for caption in captions_of[name]
    ]
    assert len(rows) == 5 * len(names)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    captions = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "labels": input_ids.masked_fill(input_ids == 0, -100),
    }
    eager, fast = eager_and_fast()
    theirs = eager(pixel_values=photos.repeat_interleave(5, dim=0), **captions)
    ours = fast(pixel_values=photos, **captions)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


def kinds(model) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "Blip" in str(type(module).__mro__)}


def assert_captions_of_library(model, eager):
    arguments = {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8}
    images = random_images(4)
    assert torch.equal(
        model.generate(pixel_values=images, **arguments), eager.generate(pixel_values=images, **arguments)
    )
    captions = random_captions(8, 6)
    theirs = eager(pixel_values=images.repeat_interleave(2, dim=0), **captions).logits
    torch.testing.assert_close(model(pixel_values=images, **captions).logits, theirs, rtol=1e-5, atol=1e-5)


def test_a_renamed_argument_switches_to_the_librarys_attention_with_one_warning(monkeypatch, caplog):
    """What transformers 5.24 did to `past_key_values`, once more: the argument and its caller have another name."""
    plain = BlipTextSelfAttention.forward

    def attention(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                  memory=None, **kwargs):  # fmt: skip
        assert not kwargs
        return plain(self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, memory)

    def layer(self, hidden_states, attention_mask=None, encoder_hidden_states=None, cache=None, past_key_values=None,
              **kwargs):  # fmt: skip
        states = {"attention_mask": attention_mask, "encoder_hidden_states": encoder_hidden_states}
        context, maps = self.self(hidden_states, memory=past_key_values if cache is None else cache, **states)
        return self.output(context, hidden_states), maps

    eager = tiny_blip()
    monkeypatch.setattr(BlipTextSelfAttention, "forward", attention)
    monkeypatch.setattr(BlipTextAttention, "forward", layer)
    model = use_fast_attention(copy.deepcopy(eager))
    [record] = caplog.records
    assert "memory, kwargs), which is new. Captions and losses are correct" in record.getMessage()
    assert f"transformers {transformers.__version__}" in record.getMessage()
    assert not kinds(model) & {"FastTextAttention", "FastVisionAttention", "FastTextDecoder"}
    assert_captions_of_library(model, eager)


def test_a_class_of_somebody_elses_is_left_in_place(caplog):
    class Renamed(BlipTextSelfAttention):
        def forward(self, hidden_states, mask=None, encoder_hidden_states=None, attention_mask=None, **kwargs):
            kwargs |= {"attention_mask": attention_mask, "encoder_hidden_states": encoder_hidden_states}
            context, maps = super().forward(hidden_states, **kwargs)
            return 2 * context, maps

    eager = tiny_blip()
    for module in eager.modules():
        if type(module) is BlipTextSelfAttention:
            module.__class__ = Renamed
    model = use_fast_attention(copy.deepcopy(eager))
    [record] = caplog.records
    assert "Renamed is used in place of BlipTextSelfAttention" in record.getMessage()
    assert "Renamed" in kinds(model)
    assert_captions_of_library(model, eager)


def swallows_its_cache(self, *args, cache=None, past_key_values=None, **kwargs):
    return plain_forward(self, *args, **kwargs)


plain_forward = FastTextAttention.forward
FAULTS = {
    "a cache that is ignored": (FastTextAttention, "forward", swallows_its_cache),
    "beams that are not followed": (FastTextDecoder, "_reorder_cache", lambda self, cache, beams: cache),
    "the image of another": (FastTextDecoder, "embeddings_for_rows", lambda self, images, rows: images.flip(0)),
    "an error": (FastTextAttention, "forward", lambda self, *args, **kwargs: {}["past_key_values_length"]),
    "no numbers": (FastTextAttention, "forward", lambda self, states, *a, **kw: (states * float("nan"), None)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "meta"])
def test_a_fast_path_with_other_numbers_is_not_used(fault, dtype, monkeypatch, caplog):
    monkeypatch.setattr(*FAULTS[fault])
    eager = tiny_blip().to(dtype)
    model = use_fast_attention(copy.deepcopy(eager))
    [record] = caplog.records
    assert "Fast attention is off, since with transformers" in record.getMessage()
    assert "standard deviations" in record.getMessage() or "KeyError" in record.getMessage()
    assert not kinds(model) & {"FastTextAttention", "FastVisionAttention", "FastTextDecoder"}
    if dtype == torch.float32:
        assert_captions_of_library(model, eager)


def test_a_thin_layer_with_other_numbers_is_an_error(monkeypatch):
    monkeypatch.setattr(
        TextDecoder, "embeddings_for_rows", lambda self, images, rows: images.repeat(rows // len(images), 1, 1)
    )
    with pytest.raises(RuntimeError, match=r"cannot be used with transformers .* reading grouped captions"):
        use_fast_attention(tiny_blip(), False)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, "meta", "lora", "dropout"])
def test_the_check_passes_and_leaves_no_trace(kind, caplog):
    model = tiny_blip(dropout=0.3 if kind == "dropout" else 0.0)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.3))
    elif kind != "dropout":
        model = model.to(kind)
    model.train()
    list(model.modules())[5].eval()
    state, training = torch.get_rng_state(), [module.training for module in model.modules()]
    with torch.device("meta") if kind == "meta" else contextlib.nullcontext():
        use_fast_attention(model)
    assert not caplog.records
    assert {"FastTextAttention", "FastVisionAttention", "FastTextDecoder"} <= kinds(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    assert all(weight.grad is None and not weight.is_inference() for weight in model.parameters())


def test_no_argument_is_swallowed():
    _, fast = eager_and_fast()
    states = torch.randn(1, 3, 32)
    attention = fast.text_decoder.bert.encoder.layer[0].attention.self
    with pytest.raises(TypeError, match="memory"):
        attention(states, memory=None)
    encoded = fast.vision_model(random_images(1)).last_hidden_state
    with pytest.raises(TypeError, match="output_attentions"):
        fast.vision_model(encoded, output_attentions=True)
    for part in (fast.vision_model, fast.text_decoder, fast):
        given = {"pixel_values": random_images(1), "input_ids": torch.tensor([[START]])}
        given.pop({fast.vision_model: "input_ids", fast.text_decoder: "pixel_values"}.get(part), None)
        with pytest.raises(ValueError, match="keeps no attention maps"):
            part(**given, output_attentions=True)

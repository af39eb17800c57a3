"""oneDNN's linear layers give PyTorch's numbers."""

import copy

import pytest
import torch
from test_blip_attention import assert_equal_gradients, gradients, random_captions, random_images, tiny_blip
from torch import nn

from models import cpu_linear
from models.blip_attention import use_fast_attention
from models.cpu_linear import OneDnnLinear, _product_is_right, use_onednn_linear


@pytest.fixture(autouse=True)
def _as_on_an_amd_processor(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (24,), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_pytorchs(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    ours = use_onednn_linear(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(ours) is OneDnnLinear
    inputs = [torch.randn(shape).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [plain(inputs[0]), ours(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    target = torch.randn_like(outputs[0])
    for output in outputs:
        (output * target).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(ours), gradients(plain))


def test_broadcast_and_transposed_tensors():
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    ours = use_onednn_linear(nn.Sequential(copy.deepcopy(plain)))
    for layer in (plain, ours):
        input = torch.arange(24 * 12.0).reshape(24, 4, 3).transpose(0, 2) / 100
        layer(input).sum().backward()  # sum's gradient is one number with strides of 0
    torch.testing.assert_close(ours[0].weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[0].bias.grad, plain.bias.grad)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_blip_trains_the_same(checkpointing):
    eager = tiny_blip().train()
    ours = use_onednn_linear(use_fast_attention(copy.deepcopy(eager)))
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    images, captions = random_images(2), random_captions(6, 8)
    theirs = eager(pixel_values=images.repeat_interleave(3, dim=0), **captions)
    result = ours(pixel_values=images, **captions)
    torch.testing.assert_close(result.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    result.loss.backward()
    assert_equal_gradients(gradients(ours), gradients(eager))
    assert list(ours.state_dict()) == list(eager.state_dict())


def test_blip_captions_are_identical():
    for seed in range(5):
        eager = tiny_blip(seed)
        ours = use_onednn_linear(use_fast_attention(copy.deepcopy(eager)))
        images = random_images(20, seed)
        for options in ({}, {"num_beams": 5}):
            theirs = eager.generate(pixel_values=images, max_new_tokens=12, **options)
            assert torch.equal(ours.generate(pixel_values=images, max_new_tokens=12, **options), theirs)


def test_frozen_weights_get_no_gradient():
    layer = use_onednn_linear(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    layer[0].requires_grad_(False)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer[0].weight.grad is None
    assert layer[1].weight.grad is not None


def test_lora_on_top():
    peft = pytest.importorskip("peft")
    results = []
    for switch in (lambda model: model, use_onednn_linear):
        model = switch(tiny_blip())
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=["query", "value", "qkv"], init_lora_weights=False)
        model = switch(peft.get_peft_model(model, config).eval())
        model(pixel_values=random_images(3), **random_captions(3, 8)).loss.backward()
        results.append(gradients(model))
    assert_equal_gradients(results[1], results[0])


def test_autocast_compile_and_half_precision_go_pytorchs_way():
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    ours = use_onednn_linear(nn.Sequential(copy.deepcopy(plain)))
    input = torch.randn(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(input), plain(input))
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(input), plain(input))
    ours.to(torch.bfloat16), plain.to(torch.bfloat16)
    assert torch.equal(ours(input.bfloat16()), plain(input.bfloat16()))


def test_switching_back_and_other_processors_leave_pytorchs_layers(monkeypatch):
    model = use_onednn_linear(nn.Sequential(nn.Linear(4, 4)))
    assert type(use_onednn_linear(model, False)[0]) is nn.Linear
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: False)
    assert type(use_onednn_linear(model)[0]) is nn.Linear


@pytest.mark.parametrize(
    ("product", "reason"), [(lambda *_: torch.zeros(4, 3, 5), "other numbers"), (lambda: 0, "takes 0 positional")]
)
def test_another_operator_is_not_used(product, reason, monkeypatch, caplog):
    monkeypatch.setattr("models.cpu_linear.onednn_is_faster", lambda: True)
    monkeypatch.setattr("models.cpu_linear._product", product)
    _product_is_right.cache_clear()
    try:
        layers = [use_onednn_linear(torch.nn.Linear(2, 3)) for _ in range(2)]
    finally:
        _product_is_right.cache_clear()
    assert [type(layer) for layer in layers] == [torch.nn.Linear] * 2
    [record] = caplog.records
    assert reason in record.getMessage()


@pytest.mark.parametrize(("capability", "maker", "expected"), [
    ("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False),
])  # fmt: skip
def test_onednn_is_for_amd_processors_with_avx512(capability, maker, expected, tmp_path, monkeypatch):
    monkeypatch.undo()  # the fixture's answer
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(cpu_linear, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_linear.onednn_is_faster() == expected

"""Float32 linear layers through oneDNN on AMD processors with AVX-512, where PyTorch's default, Intel's MKL, runs at half
speed.

On such an EPYC one thread of MKL gives 60 to 90 GFLOP/s on BLIP's layers and oneDNN, which every PyTorch for x86
includes, 130 to 200 (benchmarks/NOTES.md). BLIP is nearly all linear layers, so captioning and training on such a CPU
take about 0.6 of the time. The results differ only by float32 rounding, from another order of summation. On processors
with AVX2 only, or in virtual machines that expose no more, MKL is faster: 70 GFLOP/s, oneDNN 51 to 63.
"""

import functools
import logging

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from common.processes import CPUINFO

logger = logging.getLogger(__name__)


def use_onednn_linear(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Switches the linear layers of `model` to oneDNN, in place, or back; does nothing on processors other than AMD's
    with AVX-512.

    Weights, state dict and modules stay as they are: only the class of plain `nn.Linear` modules changes. A call takes
    PyTorch's usual path whenever it is not on the CPU, not float32, empty, under autocast, or compiled.
    """
    if not enabled or (onednn_is_faster() and _product_is_right()):
        before, after = (nn.Linear, OneDnnLinear) if enabled else (OneDnnLinear, nn.Linear)
        for module in model.modules():
            if type(module) is before:
                module.__class__ = after
    return model


@functools.cache
def _product_is_right() -> bool:
    """Whether the operator, which is private to PyTorch, still takes these arguments and gives the product."""
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 8), (5, 8), (5,)))
    try:
        product = _product(left, right, bias)
        right_numbers = torch.allclose(product, left @ right.T + bias, rtol=1e-4, atol=1e-5)
        reason = None if right_numbers else "gives other numbers"
    except (RuntimeError, TypeError) as error:
        reason = f"fails ({str(error).splitlines()[0]})"
    if reason:
        logger.warning(
            "oneDNN is not used for linear layers, since with torch %s its operator %s. Captions are correct, but take "
            "about 1.5 times as long on AMD processors.",
            torch.__version__,
            reason,
        )
    return reason is None


def onednn_is_faster() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and CPUINFO.exists()
        and "AuthenticAMD" in CPUINFO.read_text(encoding="utf-8")
    )


class OneDnnLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (
            input.device.type != "cpu"
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or input.numel() == 0
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return _product(input, self.weight, self.bias)
        return _OneDnnLinearFunction.apply(input, self.weight, self.bias)


class _OneDnnLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = _product(rows, weight.t()).view(input.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _product(rows.t(), input.reshape(-1, input.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_input, of_weight, of_bias


def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right.T + bias`. The operator has no gradient of its own; torch.compile's CPU code calls it as well."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")

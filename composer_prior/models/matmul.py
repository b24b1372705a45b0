"""Matrix products at the speed of the processor.

PyTorch's float32 products on the CPU go to MKL, which leaves processors of other makers than Intel on their slower
instructions; oneDNN, which PyTorch ships too, does not. Without it, scoring took 1.22 times as long on two cores of an
AMD EPYC with AVX2, and a training step 1.02 times (``python -m benchmarks.libraries``). The results differ in rounding
only.

Before its version 3.11.2, oneDNN lets the stack pointer lead into the heap while it multiplies, and a signal that comes
then, such as SIGTERM to a run, destroys what lies there (uxlfoundation/oneDNN, pull request 4855). Python handles
signals on a stack of their own where there is one, as :mod:`faulthandler` makes it.
"""

import faulthandler
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
_STDERR = 2  # by number, because sys.stderr may be None or a notebook's


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, ``[m, k]`` and ``[k, n]``, outside of autograd; ``a`` is best contiguous."""
    return _onednn(a, b.T) if _has_onednn(a, b) else a @ b


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` whose float32 products on the CPU are oneDNN's; on other devices and types it is ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        if _has_onednn(input, self.weight) and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(input, self.weight, self.bias)
        return super().forward(input)


def use_onednn(model: Model) -> Model:
    """Give every plain ``nn.Linear`` of a model the forward of :class:`OneDNNLinear`; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return model


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(input, weight)
        return _onednn(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        rows, grad_rows = input.flatten(0, -2), grad.flatten(0, -2)  # [n, in], [n, out]
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(grad_rows, weight.T).view_as(input) if needs_input else None,
            _transposed_product(grad_rows, rows) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
        )


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` of ``[n, k]`` and ``[n, m]``; oneDNN wants one of them moved, so it is the narrower."""
    if a.shape[1] <= b.shape[1]:
        return _onednn(a.T.contiguous(), b.T)
    return _onednn(b.T.contiguous(), a.T).T


def _has_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN takes this product: plain float32 tensors on the CPU, of a build that has it."""
    return (
        torch.backends.mkldnn.is_available()
        and a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.numel() > 0
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (a, b))  # no DTensor
    )


def _onednn(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(a, weight, bias)``."""
    if torch.compiler.is_compiling():
        return _opaque_linear(a, weight, bias)
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return F.linear(a, weight, bias)
    if not faulthandler.is_enabled():
        faulthandler.enable(_STDERR)
    return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")


@torch.library.custom_op("composer_prior::linear", mutates_args=())
def _opaque_linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """To torch.compile, whose own rule for oneDNN's product takes constant weights only, a step without inside."""
    return _onednn(a, weight, bias)


@_opaque_linear.register_fake
def _(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(*a.shape[:-1], weight.shape[0])

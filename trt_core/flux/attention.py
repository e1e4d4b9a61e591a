"""Attention between segments: PyTorch's kernels by name, and which of them run on this GPU for these shapes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import Attention
from . import flash3_attention, fused, operators, side_stream
from .fp8_attention import attend_fp8
from .segments import AttentionFunction, BesideAttention

_SDP_BACKEND = {
    Attention.CUDNN: SDPBackend.CUDNN_ATTENTION,
    Attention.FLASH: SDPBackend.FLASH_ATTENTION,
    Attention.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    Attention.MATH: SDPBackend.MATH,
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by PyTorch's own choice of kernel. q, k, v [B, L, H, D] to [B, L, H * D].

    `mask` broadcasts to [B, H, L, L]: bool (True attends) or added to the logits.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attention_function(kernel: Attention) -> AttentionFunction:
    """Attention by one kernel, callable inside compiled code. `AUTO` leaves the choice to PyTorch."""
    if kernel is Attention.AUTO:
        return attend
    if kernel is Attention.FP8:
        return attend_fp8
    if kernel is Attention.FLASH3:
        return _attend_flash3
    backend = _SDP_BACKEND[kernel]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return _operator(kernel, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return attention


def beside_attention(kernel: Attention) -> BesideAttention | None:
    """This kernel's attention with a product beside it, callable inside compiled code, or None."""
    if kernel in (Attention.AUTO, Attention.FP8):
        return None
    if kernel is Attention.FLASH3:
        return _JOINED

    def beside(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return _BESIDE(q, k, v, x, weight, bias, kernel.value)

    return beside


def _attend_flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash3_attention.attend(q, k, v).flatten(2)


def _operator(kernel: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator that `sdpa_kernel` would lead to; q, k, v [B, H, L, D] and the result too.

    Compiled code calls it by name: `sdpa_kernel` in a graph makes AOTAutograd bypass its cache ("Unsupported
    call_function target _backend_from_string"), and every new process would trace the blocks again.
    """
    aten = torch.ops.aten
    if kernel is Attention.CUDNN:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    if kernel is Attention.EFFICIENT:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    if kernel is Attention.MATH:
        return aten._scaled_dot_product_attention_math(q, k, v)[0]
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def runnable_kernels(dtype: torch.dtype, device: torch.device, heads: int, head_dim: int) -> list[Attention]:
    """The kernels that this device runs for heads of this size, tried on a few tokens. A CPU has one: `AUTO`."""
    if device.type != "cuda":
        return [Attention.AUTO]
    kernels = (*_SDP_BACKEND, Attention.FLASH3)
    return [kernel for kernel in kernels if runs(kernel, dtype, device, heads, head_dim)]


def runs(kernel: Attention, dtype: torch.dtype, device: torch.device, heads: int, head_dim: int) -> bool:
    """Whether this kernel runs on this device for heads of this size, tried on a few tokens."""
    if kernel is Attention.FLASH3 and flash3_attention.why_not(dtype, device, head_dim) is not None:
        return False
    sample = torch.randn(1, 64, heads, head_dim, device=device, dtype=dtype)
    try:
        attention_function(kernel)(sample, sample, sample)
    except RuntimeError:  # PyTorch's "No available kernel"
        return False
    return True


def _beside(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    attend_by, product = attention_function(Attention(kernel)), _empty_product(x, weight)
    with _beside_stream(x) as side:
        attn = attend_by(q, k, v)
        with torch.cuda.stream(side):  # with None where it is
            fused.write_product(x.flatten(0, -2), weight, bias, product.flatten(0, -2), gelu=True)
    return attn, product


def _beside_stream(x: Tensor) -> AbstractContextManager[torch.cuda.Stream | None]:
    """A stream beside the current one for several pictures, None for one."""
    return side_stream.forked(x.device) if x.shape[0] > 1 else nullcontext()


def _one_after_the_other(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return attention_function(Attention(kernel))(q, k, v), fused.gelu_product(x, weight, bias)


def _beside_shapes(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])), _empty_product(x, weight)


def _empty_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _joined(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = _empty_joined(q, k, v, x, weight, bias)
    attn, product = out.split((out.shape[-1] - weight.shape[0], weight.shape[0]), -1)
    with _beside_stream(x) as side:
        flash3_attention.attend_into(q, k, v, attn.unflatten(-1, q.shape[2:]))
        with torch.cuda.stream(side):
            fused.write_product(x.flatten(0, -2), weight, bias, product.flatten(0, -2), gelu=True)
    return out


def _joined_on_cpu(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat((_attend_flash3(q, k, v), fused.gelu_product(x, weight, bias)), -1)


def _empty_joined(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[2] * q.shape[3] + weight.shape[0]))


# An operator, because Inductor launches everything that it compiles on one stream. Measured on an H100, whole steps of
# two pictures in turns: 236.1 to 236.5 ms for 239.6 to 240.6 with whole blocks. For one picture, as chains of a single
# block's kernels, nothing is gained (2.00 to 2.06 ms for 1.97 to 2.09). Nor is it in FP8, where the GELU alone can be
# beside attention: whole steps of one picture took 76.1 to 76.3 ms for 75.7 to 75.8, of two 148.3 to 148.8 for 148.7 to
# 150.2.
_BESIDE = operators.define(
    __name__,
    "attention_beside_product(Tensor q, Tensor k, Tensor v, Tensor x, Tensor weight, Tensor bias, str kernel)"
    " -> (Tensor, Tensor)",
    _beside, _one_after_the_other, _beside_shapes,
)  # fmt: skip

# FlashAttention-3 and the product write into one tensor, which the next layer multiplies as it is: another kernel's
# output would have to be copied there.
_JOINED = operators.define(
    __name__,
    "attention_joined_with_product(Tensor q, Tensor k, Tensor v, Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _joined, _joined_on_cpu, _empty_joined,
)  # fmt: skip

"""FP8 simulated in plain PyTorch, without any code of the library: what rounding alone costs, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .model import LORA_TARGETS

_E4M3_MAX = 448.0
_TINY = 1e-12


def rounded(x: Tensor) -> Tensor:
    """`x` on the E4M3 grid with a scale per row of the last axis, in fp32."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=_TINY) / _E4M3_MAX
    return (wide / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[None]:
    """While inside, every linear layer of a block multiplies rounded weights with rounded inputs, in the model's dtype.

    Modulations (`norm...linear`) stay exact, as they do where bases are on the GPU; in eight bits, with bases in host
    memory, their error counts as the library's own. Weights are rounded at each call and not changed.
    """
    layers = [module for name, module in model.named_modules() if _is_block_linear(name, module)]
    try:
        for module in layers:
            module.forward = _forward(module)
        yield
    finally:
        for module in layers:
            del module.forward


def _is_block_linear(name: str, module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear) and "transformer_blocks." in name and name.endswith(LORA_TARGETS)
    return is_linear and not name.endswith(".linear")


def _forward(module: nn.Linear) -> object:
    def forward(x: Tensor) -> Tensor:
        return F.linear(rounded(x).to(x.dtype), rounded(module.weight).to(x.dtype), module.bias)

    return forward


class FakeAttention(TorchFunctionMode):
    """While entered, PyTorch's attention rounds q and k, v by one scale, each probability, and the result."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
        return torch.stack([_attention(*heads) for heads in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, [B, L, D]. Head by head: logits of all of them take gigabytes. v's scale is its own here, which is no
    worse than one for all heads: E4M3's error does not grow with the range above it."""
    scale = v.float().abs().amax().clamp(min=_TINY) / _E4M3_MAX
    logits = _grid(q) @ _grid(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    out = (_grid(weights * _E4M3_MAX) / _E4M3_MAX) @ _grid(v / scale) / weights.sum(-1, keepdim=True)
    return (_grid(out) * scale).to(q.dtype)


def _grid(x: Tensor) -> Tensor:
    return x.float().clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()

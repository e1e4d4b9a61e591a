"""FlashAttention-3 for Hopper in bf16 (Shah et al. 2024, arXiv:2407.08608): the forward, from the wheel `fa3-fwd`.

PyTorch brings FlashAttention-2. Measured on an H100 for 24 heads of 4608 tokens, in turns with cuDNN's kernel: 0.422 ms
for 0.456, and for two pictures 0.873 for 0.925; error to fp64 as cuDNN's.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import first_line
from ..packages import FLASH3, FLASH3_CAPABILITY, FLASH3_REQUIREMENT, install_line
from . import operators

_MODULE = "fa3_fwd"
_HEAD_DIMS = (64, 96, 128, 192, 256)


def installed() -> bool:
    return importlib.util.find_spec(_MODULE) is not None


def why_not(dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
    """Why it cannot run here for heads of this size, or None."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != FLASH3_CAPABILITY:
        return f"its kernels are for compute capability 9.0 (H100, H200), and this GPU has {_dotted(capability)}"
    if dtype is not torch.bfloat16 or head_dim not in _HEAD_DIMS:
        return f"it has no kernel for heads of {head_dim} in {dtype}"
    if not installed():
        return f"{FLASH3} is not installed: {install_line(FLASH3_REQUIREMENT)}"
    return _why_not_loaded()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, H, D] of operands of that shape, each with a dense last axis; v may be a view of longer rows."""
    return _OPERATOR(q, k, v)


@cache
def _load() -> None:
    # Its kernels alone: the Python around them wants einops and registers gradients.
    importlib.import_module(f"{_MODULE}._C")


def _why_not_loaded() -> str | None:
    try:
        _load()
    except (ImportError, OSError) as error:
        return f"{FLASH3} does not start with torch {torch.__version__}: {first_line(error)}"
    return None


def attend_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    """`attend` on a GPU, for eager calls, written to `out` [B, L, H, D], whose last axis alone must be dense."""
    _load()  # a process that finds its plan, and its blocks compiled, has asked nobody whether it can run
    # One split: without it the kernel's own rule asks how long sequences are, and may sum in another order.
    return torch.ops.fa3_fwd.fwd(q, k, v, out=out, softmax_scale=q.shape[-1] ** -0.5, num_splits=1)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_into(q, k, v, None)


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).contiguous()


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


_OPERATOR = operators.define(
    __name__, "attend(Tensor q, Tensor k, Tensor v) -> Tensor", _attend, _reference, _empty
)  # fmt: skip

"""An FP8 product as torch.export sees it, in operations that TensorRT's converters know (`backends/tensorrt_fp8.py`).

E4M3 numbers are numbers of bf16, too, so their product needs no scale: `q @ weight.T` is multiplied by the scales
afterwards. TensorRT takes a matrix product of two tensors that come from E4M3 as an FP8 product, whatever their scales
are: one for each row, one for a tensor, from calibration or from the activation itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exporting() -> bool:
    """Whether torch.export is tracing, not Dynamo, which answers True to is_exporting() as well."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def scaled_linear(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """What `fp8.scaled_linear` computes, with the same arguments; for fp16 and bf16 the bare product is bf16.

    Not fp16: a sum of K products of E4M3 numbers reaches K * 448 * 448.
    """
    kind = torch.float32 if dtype is torch.float32 else torch.bfloat16
    product = F.linear(q.to(kind), weight.to(kind)).float()
    return (product * q_scale * weight_scale.reshape(-1) + bias.float()).to(dtype)

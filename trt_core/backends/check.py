"""Whether a compiled segment computes what PyTorch computes, as a ratio of errors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import BuildFailed
from ..flux.linear import unquantized_inputs
from .base import CompiledSegment, Request

_CHECK_IMG_TOKENS, _CHECK_TXT_TOKENS = 512, 64
_ANOTHER = "It is not used; another backend takes its place."
_FLOOR_EPS = {torch.float32: 8.0, torch.bfloat16: 0.125, torch.float16: 0.125}
"""Errors below this many eps are no error. Eager PyTorch in fp32 agrees with itself exactly, so there the floor is the
bound; in half precision it lies far below eager's own error (0.2 to 0.7 eps) and only guards the division."""


def error_ratio(compiled: CompiledSegment, request: Request) -> float:
    """Error of the compiled segment against fp32, in multiples of eager PyTorch's error in the same dtype.

    An FP8 segment's reference multiplies the same FP8 weights with inputs that are not quantized, so its ratio compares
    with the error of the quantization itself. Inputs are random at the scale of a trained model. Ratios, because
    absolute errors depend on weights and depth (a bf16 product of 3072 terms is off by 0.3 % by itself).
    """
    profile, segment = request.profile, request.segment
    img = min(max(_CHECK_IMG_TOKENS, profile.img_tokens.min), profile.img_tokens.max)
    txt = min(max(_CHECK_TXT_TOKENS, profile.txt_tokens.min), profile.txt_tokens.max)
    sizes = (profile.batch.opt, img, txt)
    inputs = segment.random_inputs(*sizes, request.dtype, request.device, weights=request.weights)
    function = request.reference
    with torch.no_grad():
        eager = function(*inputs)
        seen = compiled(*inputs)
        with _UpcastWeights(), unquantized_inputs():
            count = len(segment.activations)
            reference = function(*(tensor.float() for tensor in inputs[:count]), *inputs[count:])
    floor = _FLOOR_EPS[request.dtype] * torch.finfo(request.dtype).eps
    ratios = [relative_l2(s, r) / max(relative_l2(e, r), floor) for s, e, r in zip(seen, eager, reference, strict=True)]
    return float(torch.tensor(ratios).max())  # Python's max would pass over a NaN that does not come first


class _UpcastWeights(TorchFunctionMode):
    """Linear layers and norms take their weights in fp32, one at a time: an fp32 copy of a whole double block would
    take 0.9 GB of the GPU memory that the model needs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.linear, F.rms_norm):
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
            kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        return function(*args, **kwargs)


def check(compiled: CompiledSegment, request: Request, bound: float) -> float:
    """The error ratio; raises `BuildFailed` where it is above `bound` or not a number."""
    what = f"{compiled.backend.value}'s {request.segment.name.value}"
    return bounded(error_ratio(compiled, request), bound, what)


def bounded(ratio: float, bound: float, what: str, fix: str = _ANOTHER, widget: str = "") -> float:
    """The error ratio of `what` where it is within `bound`; raises `BuildFailed` else."""
    if not ratio <= bound:
        error = f"{what} has {ratio:.1f} times eager PyTorch's error."
        raise BuildFailed(error, expected=f"At most {bound} times.", fix=fix, widget=widget)
    return ratio


def relative_l2(seen: Tensor, reference: Tensor) -> float:
    """||seen - reference|| / ||reference|| in fp32."""
    reference = reference.float()
    return float((seen.float() - reference).norm() / reference.norm().clamp_min(1e-30))

"""Whether a compiled segment computes what PyTorch computes, as a ratio of errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BuildFailed
from .base import CompiledSegment, Request

_CHECK_IMG_TOKENS, _CHECK_TXT_TOKENS = 512, 64
_ROUNDING_FLOOR = 4.0
"""Errors below this many roundings of the dtype are no error: in fp32 eager PyTorch agrees with itself exactly."""


def error_ratio(compiled: CompiledSegment, request: Request) -> float:
    """Error of the compiled segment against fp32, in multiples of eager PyTorch's error in the same dtype.

    Inputs are random at the scale of a trained model. Ratios, because absolute errors depend on weights and depth
    (a bf16 product of 3072 terms is off by 0.3 % by itself).
    """
    profile, segment = request.profile, request.segment
    img = min(max(_CHECK_IMG_TOKENS, profile.img_tokens.min), profile.img_tokens.max)
    txt = min(max(_CHECK_TXT_TOKENS, profile.txt_tokens.min), profile.txt_tokens.max)
    inputs = segment.random_inputs(profile.batch.opt, img, txt, request.dtype, request.device)
    function = request.reference
    with torch.no_grad():
        eager = function(*inputs)
        seen = compiled(*inputs)
        for index, tensor in enumerate(inputs):
            inputs[index] = tensor.float()  # one by one: never both copies of a whole block
        reference = function(*inputs)
    floor = _ROUNDING_FLOOR * torch.finfo(request.dtype).eps / 8
    ratios = [relative_l2(s, r) / max(relative_l2(e, r), floor) for s, e, r in zip(seen, eager, reference, strict=True)]
    return float(torch.tensor(ratios).max())  # Python's max would pass over a NaN that does not come first


def check(compiled: CompiledSegment, request: Request, bound: float) -> float:
    """The error ratio; raises `BuildFailed` where it is above `bound` or not a number."""
    ratio = error_ratio(compiled, request)
    if not ratio <= bound:
        raise BuildFailed(
            f"{compiled.backend.value}'s {request.segment.name.value} has {ratio:.1f} times eager PyTorch's error.",
            expected=f"At most {bound} times.",
            fix="It is not used; another backend takes its place.",
        )
    return ratio


def relative_l2(seen: Tensor, reference: Tensor) -> float:
    """||seen - reference|| / ||reference|| in fp32."""
    reference = reference.float()
    return float((seen.float() - reference).norm() / reference.norm().clamp_min(1e-30))

"""Whether FP8 blocks multiply in FP8: the largest product of each kind of block, both ways, on this device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.compiler import SegmentCompiler
from .config import Attention
from .flux import fp8
from .flux.catalogue import BlockKind
from .measure import median_milliseconds
from .plan import WHOLE_SEGMENT, Measurement


def rank_products(compiler: SegmentCompiler) -> tuple[frozenset[BlockKind], list[Measurement]]:
    """Kinds of blocks whose FP8 weights are better widened and multiplied in the model's dtype, and what was measured.

    FP8's product alone against widening and the other product: quantizing inputs, which FP8 needs besides, is part of
    the operation before it. Nothing is measured on a CPU, where FP8 is arithmetic for tests.
    """
    return _ranked(compiler) if compiler.device.type == "cuda" else (frozenset(), [])


def _ranked(compiler: SegmentCompiler) -> tuple[frozenset[BlockKind], list[Measurement]]:
    wide, measured = set(), []
    for kind in (kind for kind in BlockKind if compiler.precision(WHOLE_SEGMENT[kind]).fp8):
        times = {words: median_milliseconds(run, compiler.device, 5, 2) for words, run in _ways(compiler, kind)}
        measured += [Measurement(f"{kind.value} product", words, ms) for words, ms in times.items()]
        if times[_WIDENED] < times[_FP8]:
            wide.add(kind)
    return frozenset(wide), measured


_FP8, _WIDENED = "fp8", "widened"


def _ways(compiler: SegmentCompiler, kind: BlockKind) -> list[tuple[str, Callable[[], Tensor]]]:
    weight, scale = _largest(compiler, kind)
    profile = compiler.profile
    tokens = profile.img_tokens.opt + (profile.txt_tokens.opt if kind is BlockKind.SINGLE else 0)
    x = torch.randn((profile.batch.opt * tokens, weight.shape[1]), device=compiler.device, dtype=compiler.dtype)
    q, q_scale = fp8.quantize_rows(x)
    return [
        (_FP8, lambda: fp8.scaled_linear(q, q_scale, weight, scale, None, compiler.dtype)),
        (_WIDENED, lambda: F.linear(x, fp8.dequantize(weight, scale, compiler.dtype))),
    ]


def _largest(compiler: SegmentCompiler, kind: BlockKind) -> tuple[Tensor, Tensor]:
    """The largest FP8 matrix of a block and its scale: bound ones, or random ones where nothing is bound."""
    request = compiler.request(WHOLE_SEGMENT[kind], Attention.AUTO)
    names, weights = request.segment.weights, request.weights
    if not weights:
        inputs = compiler.inputs(WHOLE_SEGMENT[kind], Attention.AUTO)
        weights = inputs[len(request.segment.activations) :]
    index = max((i for i, bound in enumerate(names) if bound.dtype is fp8.FP8), key=lambda i: weights[i].numel())
    return weights[index], weights[index + 1]

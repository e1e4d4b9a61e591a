"""Which of cuBLASLt's kernels are fastest for a step's products while the GPU is busy: at its power limit.

cuBLASLt proposes large tiles that two groups of warps compute together. Where each group has a tile of its own, one
stores its sums, with bias and GELU, while the other multiplies. An H200 under load computes FLUX's products in bf16 so
in 0.92 to 0.93 of the time, and the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .backends.compiler import SegmentCompiler
from .background import Stopwatch
from .flux import cublaslt, fp8
from .flux.block_products import block_products
from .flux.catalogue import BlockKind
from .flux.cublaslt_kernels import Kernel
from .flux.products import Product
from .host import stop_if_cancelled
from .measure import in_turns
from .plan import WHOLE_SEGMENT, KernelChoice, Measurement

_LOG = logging.getLogger("trt_core.plan")
_TURNS, _TURN_MS = 3, 6.0
_SMALLEST_FLOPS = 2e10
"""Smaller products end before Python has launched the next one."""
_WORTH_IT = 0.99
"""A kernel is taken below this part of the time of cuBLASLt's choice."""
OWN = "cuBLASLt's choice"


def _kernels(*words: str) -> tuple[Kernel, ...]:
    split = (word.split() for word in words)
    return tuple(Kernel(tile, cluster, int(option)) for tile, cluster, option in split)


# What was fastest, or near, for one of FLUX's products of 512 to 9216 rows on an H200 under load, of all kernels that
# cuBLASLt has: 2200 in bf16, 1700 in FP8.
_PLAIN = _kernels(
    "128x128 2x1 1", "128x128 1x1 3", "128x152 1x1 3", "128x168 1x1 3", "128x136 1x1 1", "128x144 1x1 3",
    "128x160 1x1 1", "120x128 1x2 2", "96x128 1x1 2", "128x104 2x1 1", "192x96 1x1 1", "128x256 1x1 6",
)  # fmt: skip
_GELU = _kernels(
    "128x128 1x1 3", "128x128 2x1 1", "112x128 1x1 2", "112x128 1x2 2", "128x136 1x1 1", "128x152 1x1 3",
    "128x160 1x1 3", "128x168 1x1 3", "192x112 1x1 3", "96x128 1x1 2",
)  # fmt: skip
_ONTO = _kernels(
    "280x128 1x1 6", "280x128 1x2 6", "192x192 1x1 7", "144x128 2x1 0", "144x128 1x2 2", "256x144 1x1 7",
    "128x224 2x1 7",
)  # fmt: skip
_FP8 = _kernels(
    "128x128 2x1 1", "128x128 1x1 1", "128x128 1x2 3", "128x136 1x1 3", "128x168 1x1 7", "192x144 1x1 5",
    "128x96 2x1 1", "96x128 1x1 2", "96x128 1x1 6", "256x96 1x1 5", "128x120 2x1 3", "128x216 1x1 7", "192x128 1x2 7",
    "128x104 1x2 3",
)  # fmt: skip


def candidates(product: Product) -> Sequence[Kernel]:
    """Kernels that may be the fastest for it."""
    if product.fp8:
        return _FP8
    return _ONTO if product.onto else _GELU if product.gelu else _PLAIN


def rank_kernels(
    compiler: SegmentCompiler, turns: int = _TURNS, turn_ms: float = _TURN_MS
) -> tuple[tuple[KernelChoice, ...], list[Measurement]]:
    """The kernels to take for this model's products at the profile's optimum, and what was measured.

    Nothing where products are not cuBLASLt's. Raises `BuildCancelled`.
    """
    device = compiler.device
    if device.type != "cuda" or cublaslt.why_not(device.index) or compiler.dtype is not torch.bfloat16:
        return (), []
    watch, chosen, measured = Stopwatch(), [], []
    for name, product in _measurable(compiler).items():
        stop_if_cancelled(compiler.progress, "Choosing kernels for matrix products")
        times = measure(product, device, turns, turn_ms)
        best = min(times, key=lambda kernel: times[kernel])
        if best is not None and times[best] < _WORTH_IT * times[None]:
            chosen.append(KernelChoice(product, best))
        else:
            best = None
        measured += [Measurement(name, _words(kernel), times[kernel]) for kernel in dict.fromkeys((None, best))]
    torch.cuda.empty_cache()
    _LOG.info("kernels for %d of %d matrix products chosen, %.1f s", len(chosen), len(measured), watch.seconds())
    return tuple(chosen), measured


def _words(kernel: Kernel | None) -> str:
    return OWN if kernel is None else f"cuBLASLt {kernel.tile}, {kernel.cluster}, {kernel.option}"


def _measurable(compiler: SegmentCompiler) -> Mapping[str, Product]:
    profile, found = compiler.profile, {}
    for kind in BlockKind:
        fp8 = bool(compiler.precision(WHOLE_SEGMENT[kind]).fp8) and kind not in compiler.wide
        opts = (profile.batch.opt, profile.img_tokens.opt, profile.txt_tokens.opt)
        found |= block_products(kind, compiler.arch, *opts, fp8)
    return {name: product for name, product in found.items() if product.flops >= _SMALLEST_FLOPS}


def measure(product: Product, device: torch.device, turns: int, turn_ms: float) -> Mapping[Kernel | None, float]:
    """Milliseconds of the product by each candidate, None for cuBLASLt's own choice, in turns without a pause."""
    inputs = ProductInputs(product, device)
    calls: dict[Kernel | None, Callable[[], object]] = {
        kernel: partial(inputs.run, kernel) for kernel in (None, *candidates(product)) if inputs.run(kernel)
    }
    return in_turns(calls, device, turns, turn_ms)


class ProductInputs:
    """Random tensors of one product, which take the power that a model's do; zeros take less."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product = product
        self.x, self.weight = (_normal(n, product.width, device) for n in (product.rows, product.columns))
        self.weight *= product.width**-0.5
        self.bias = None if product.onto else _normal(1, product.columns, device)[0]
        self.out = _normal(product.rows, product.columns, device)
        if product.fp8:
            (self.x, self.x_scale), (self.weight, self.weight_scale) = map(fp8.quantize_rows, (self.x, self.weight))

    def run(self, kernel: Kernel | None) -> bool:
        """Writes the product to `out`; False where cuBLASLt cannot."""
        if self.product.fp8:
            scales = self.x_scale, self.weight, self.weight_scale
            return cublaslt.multiply(self.x, *scales, self.bias, self.out, kernel=kernel)
        about = {"gelu": self.product.gelu, "onto": self.product.onto}
        return cublaslt.multiply_bf16(self.x, self.weight, self.bias, self.out, **about, kernel=kernel)


def _normal(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

"""Which of cuBLASLt's kernels are fastest for a step's products where the GPU is at its power limit.

Steps of FLUX are: an H200 takes 700 W, and its clocks fall from 1980 to about 1450 MHz. A kernel that needs fewer of
them, but more energy, gains nothing there. Measured on H200s, whole steps in bf16 in turns with cuBLASLt's choices:
kernels chosen in turns of 6 ms, too short for clocks to change, took 0.93 of all products' time, and the step 1.003;
those chosen at settled clocks bring a step of one picture from 119.1 to 117.7 ms, and of two from 239.1 to 236.0.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .backends.compiler import SegmentCompiler
from .background import Stopwatch
from .config import Attention
from .flux import cublaslt, fp8
from .flux.block_products import block_products
from .flux.catalogue import BlockKind
from .flux.cublaslt_kernels import OWN, Kernel
from .flux.products import Product
from .host import stop_if_cancelled
from .measure import settled_milliseconds
from .plan import WHOLE_SEGMENT, KernelChoice, Measurement

_LOG = logging.getLogger("trt_core.plan")
_STAGE = "Choosing kernels for matrix products"
_SETTLE_MS, _TAKEN_MS, _FIRST_SETTLE_MS = 60.0, 60.0, 200.0
_FEW_ROWS = 1024
"""Up to here a product is one of few tiles, and wants small ones."""
_SMALLEST_FLOPS = 2e10
"""Smaller products end before Python has launched the next one."""
_WORTH_IT = 0.99
"""A kernel is taken below this part of the time of cuBLASLt's choice."""
_HOPELESS = 1.06
"""To cuBLASLt's choice at the clocks that another kernel has left: what is as much slower there is not settled."""


def _kernels(*words: str) -> tuple[Kernel, ...]:
    split = (word.split() for word in words)
    return tuple(Kernel(tile, cluster, int(option)) for tile, cluster, option in split)


# On H200s, of the 2200 kernels that cuBLASLt has in bf16 and the 1700 in FP8, first those that were fastest for one of
# FLUX's products of 512 to 9216 rows in turns of 6 ms; of these, and of their tiles with other clusters and options,
# those that were fastest for 4608 rows at settled clocks.
CANDIDATES: Mapping[str, tuple[Kernel, ...]] = {
    "plain": _kernels(
        "128x160 2x1 1", "128x256 2x1 5", "128x256 2x1 4", "192x192 2x1 5", "128x128 2x1 1", "128x192 2x1 4",
        "96x128 2x1 0", "144x128 1x2 2", "280x128 1x2 6",
    ),
    "gelu": _kernels("128x160 2x1 1", "128x168 2x1 1", "112x128 1x2 2", "128x256 2x1 5", "128x128 2x1 1"),
    "onto": _kernels("280x128 1x2 6", "192x192 2x1 5", "192x192 1x2 6", "128x288 2x1 5"),
    "few rows": _kernels("96x128 1x1 2", "128x128 1x1 3"),
    "fp8": _kernels("128x224 2x1 5", "192x144 2x1 5", "192x144 1x2 5", "128x128 1x2 3"),
    "fp8, few rows": _kernels("96x128 1x1 2", "96x128 1x1 6", "128x96 2x1 1"),
}  # fmt: skip


def candidates_digest() -> str:
    """Another one for other candidates: what a remembered plan was chosen from."""
    return hashlib.sha256(repr(CANDIDATES).encode()).hexdigest()[:16]


def candidates(product: Product) -> Sequence[Kernel]:
    """Kernels that may be the fastest for it."""
    if product.rows <= _FEW_ROWS:
        return CANDIDATES["fp8, few rows" if product.fp8 else "few rows"]
    if product.fp8:
        return CANDIDATES["fp8"]
    return CANDIDATES["onto" if product.onto else "gelu" if product.gelu else "plain"]


def rank_kernels(compiler: SegmentCompiler, attention: Attention) -> tuple[tuple[KernelChoice, ...], list[Measurement]]:
    """The kernels to take for this model's products at the profile's optimum, and what was measured.

    `attention`: the kernel in plain blocks. Nothing where products are not cuBLASLt's. Raises `BuildCancelled`.
    """
    device = compiler.device
    if device.type != "cuda" or cublaslt.why_not(device.index) or compiler.dtype is not torch.bfloat16:
        return (), []
    watch, chosen, measured, settle_ms = Stopwatch(), [], [], _FIRST_SETTLE_MS
    products = _measurable(compiler, attention is Attention.FLASH3)
    for done, (name, product) in enumerate(products.items()):
        stop_if_cancelled(compiler.progress, _STAGE)
        compiler.progress.update(_STAGE, done, len(products))
        times = measure(product, device, settle_ms, _TAKEN_MS)
        best, settle_ms = _best(times), _SETTLE_MS
        if best is not None:
            chosen.append(KernelChoice(product, best))
        measured += [Measurement(name, kernel.words(), times[kernel]) for kernel in (OWN, best) if kernel]
    torch.cuda.empty_cache()
    _LOG.info("cuBLASLt's kernels for matrix products: %d chosen, %.1f s", len(chosen), watch.seconds())
    return tuple(chosen), measured


def measure(
    product: Product, device: torch.device, settle_ms: float = _SETTLE_MS, taken_ms: float = _TAKEN_MS
) -> Mapping[Kernel, float]:
    """Milliseconds of the product by each candidate and by cuBLASLt's own choice, at clocks that have settled."""
    calls = ProductInputs(product, device).calls((OWN, *candidates(product)))
    return settled_milliseconds(calls, device, settle_ms, taken_ms, _HOPELESS)


def _best(times: Mapping[Kernel, float]) -> Kernel | None:
    """None where cuBLASLt's choice is as fast as any."""
    best = min(times, key=lambda kernel: times[kernel])
    return best if times[best] < _WORTH_IT * times[OWN] else None


def _measurable(compiler: SegmentCompiler, joined: bool) -> Mapping[str, Product]:
    profile = compiler.profile
    opts, found = (profile.batch.opt, profile.img_tokens.opt, profile.txt_tokens.opt), {}
    for kind in BlockKind:
        in_fp8 = bool(compiler.precision(WHOLE_SEGMENT[kind]).fp8) and kind not in compiler.wide
        found |= block_products(kind, compiler.arch, *opts, in_fp8, joined)
    return {name: product for name, product in found.items() if product.flops >= _SMALLEST_FLOPS}


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

    def calls(self, kernels: Iterable[Kernel]) -> dict[Kernel, Callable[[], object]]:
        """`run` with each of the kernels that can compute this product; each has run once."""
        return {kernel: partial(self.run, kernel) for kernel in kernels if self.run(kernel)}

    def run(self, kernel: Kernel | None) -> bool:
        """Writes the product to `out`, without a `kernel` as blocks do; False where cuBLASLt cannot."""
        if self.product.fp8:
            scales = self.x_scale, self.weight, self.weight_scale
            return cublaslt.multiply(self.x, *scales, self.bias, self.out, kernel=kernel)
        about = {"gelu": self.product.gelu, "onto": self.product.onto}
        return cublaslt.multiply_bf16(self.x, self.weight, self.bias, self.out, **about, kernel=kernel)


def _normal(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

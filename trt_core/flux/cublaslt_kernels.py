"""Kernels of cuBLASLt by its own numbers, and which of them a product takes on a GPU.

cuBLASLt proposes a kernel for a product from a model of an idle GPU. Steps of FLUX run at the GPU's power limit, where
other ones are faster (`kernel_ranking`). What was measured is remembered here, for all models of the process: it holds
for the GPU and the product's size, and whatever kernel is taken computes the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from .products import Product

TILES = {
    "96x128": 28, "112x128": 165, "120x128": 171, "128x96": 33, "128x104": 402, "128x120": 404, "128x128": 20,
    "128x136": 405, "128x144": 406, "128x152": 407, "128x160": 29, "128x168": 408, "128x216": 413, "128x224": 414,
    "128x256": 23, "144x128": 184, "192x96": 458, "192x112": 460, "192x128": 31, "192x144": 463, "192x192": 209,
    "256x96": 495, "256x128": 24, "256x144": 500, "280x128": 238, "384x96": 547, "128x192": 32, "128x288": 421,
}  # fmt: skip
"""cublasLtMatmulTile_t."""
CLUSTERS = {"1x1": 2, "2x1": 3, "4x1": 4, "1x2": 5, "2x2": 6, "4x2": 7, "1x4": 8, "2x4": 9}
"""cublasLtClusterShape_t: how many tiles share what they read."""
OPTIONS = range(8)
_FARTHEST = 2.0
"""A kernel that was measured serves products with up to this many times the rows, or as many times fewer."""
_MANY_ROWS = 2048
"""From here on a product can be cut at no cost: an H200 computes 8192 and 9216 rows as fast in two halves."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """The tile of the result that one thread block computes, the cluster of tiles, and cuBLASLt's custom option.

    The option is not documented. As kernels are named: 1 swaps the operands, 2 goes through tiles along the other axis,
    4 lets both groups of warps compute one tile; without it each has its own, and one stores while the other computes.
    """

    tile: str
    cluster: str
    option: int

    def words(self) -> str:
        """For logs, reports and benchmarks."""
        return "cuBLASLt's choice" if self == OWN else f"cuBLASLt {self.tile}, {self.cluster}, {self.option}"


OWN = Kernel("own", "own", 0)
"""Stands for the one that cuBLASLt proposes."""

_Key = tuple[int, bool, bool, bool, int, int]

_LOCK = threading.Lock()
_PREFERRED: dict[_Key, dict[int, Kernel]] = {}


def prefer(device_index: int, kernels: Mapping[Product, Kernel]) -> None:
    """From now on these products take these kernels on this GPU, and products of similar size, too."""
    with _LOCK:
        for product, kernel in kernels.items():
            _PREFERRED.setdefault(_key(device_index, product), {})[product.rows] = kernel


def preferred(device_index: int, product: Product) -> Kernel | None:
    """The kernel of the product that was measured with the most similar number of rows, or None."""
    known = _PREFERRED.get(_key(device_index, product), {})
    nearest = _nearest(known, product.rows)
    return known[nearest] if nearest and _times(nearest, product.rows) <= _FARTHEST else None


def at_once(device_index: int, product: Product) -> int | None:
    """How many rows of the product to multiply at a time, about as many as were measured; None where nothing says so.

    So a kernel that was chosen for one picture serves any number, and larger ones.
    """
    measured = _nearest(_PREFERRED.get(_key(device_index, product), {}), product.rows)
    if measured is None or measured < _MANY_ROWS:
        return None
    return -(-product.rows // max(1, round(product.rows / measured)))


def _nearest(known: Mapping[int, Kernel], rows: int) -> int | None:
    return min(known, key=lambda others: _times(others, rows), default=None)


def _times(rows: int, others: int) -> float:
    return max(rows, others) / min(rows, others)


def _key(device_index: int, product: Product) -> _Key:
    return device_index, product.fp8, product.gelu, product.onto, product.columns, product.width

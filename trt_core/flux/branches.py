"""LoRAs that stay beside the stored matrices of modulations, as low-rank products of their own.

Merged, a change of half a percent of an eight-bit matrix arrives as a handful of steps of its rounding, which moves all
tokens alike: of a LoRA of 1 %, merged into E4M3, 0.71 to 1.36 arrived in plain PyTorch and 1.40 on an H100. Beside the
matrix it arrives whole, no matrix is written, and at rank 16 a step reads 0.05 of 12.6 GB more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .storage import AddedProduct, project


@dataclass(frozen=True, slots=True)
class Branch:
    """One layer's: `up` [N, R], and its rows of `Branches.down`."""

    up: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """`down` [all R, K] in fp32, strengths multiplied in, and each layer's part ("double_blocks.0.img_mod.lin").

    All modulations have one input, so that its products with every `down` are one kernel.
    """

    down: Tensor
    layers: Mapping[str, Branch]

    @classmethod
    def empty(cls, shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> Branches:
        """For layers of these rows, columns and ranks; every element is zero."""
        layers, start = {}, 0
        for name, (rows, _, rank) in shapes.items():
            layers[name] = Branch(torch.zeros((rows, rank), dtype=dtype, device=device), start, start + rank)
            start += rank
        width = next(iter(shapes.values()))[1]
        return cls(torch.zeros((start, width), dtype=torch.float32, device=device), layers)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """As `empty` takes them: equal shapes can be written in place."""
        width = self.down.shape[1]
        return {name: (branch.up.shape[0], width, branch.up.shape[1]) for name, branch in self.layers.items()}

    @property
    def bytes(self) -> int:
        return self.down.nbytes + sum(branch.up.nbytes for branch in self.layers.values())

    def added(self, x: Tensor) -> dict[str, AddedProduct]:
        """What is added to the product of x [B, K] with each layer that a LoRA changes."""
        projected = project(x, self.down)
        return {name: AddedProduct(b.up, projected[:, b.start : b.stop]) for name, b in self.layers.items()}

    def delta(self, layer: str) -> Tensor | None:
        """The same as a matrix [N, K] in fp32."""
        branch = self.layers.get(layer)
        return None if branch is None else branch.up.float() @ self.down[branch.start : branch.stop]

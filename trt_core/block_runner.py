"""Compiled blocks one at a time, for a host that runs the loop over blocks itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .execution import BlockWeights, DoubleBlock, Pe, SingleBlock
from .flux.branches import Branches
from .flux.modulation_table import ModulationOf, ModulationTable
from .flux.open_sum import closed
from .flux.stem import Modulations


class BlockRunner:
    """The blocks of one module for one call's shapes. Valid until it is loaded, refitted, compiled or closed."""

    def __init__(
        self, double: Sequence[DoubleBlock], single: Sequence[SingleBlock], tensors: Mapping[str, Tensor], hidden: int,
        double_weights: Sequence[BlockWeights], single_weights: Sequence[BlockWeights], branches: Branches | None,
        table: ModulationTable | None,
    ) -> None:  # fmt: skip
        self._double, self._single, self._tensors, self._hidden = double, single, tensors, hidden
        self._double_weights, self._single_weights, self._branches = double_weights, single_weights, branches
        self._table = table
        self._vec: Tensor | None = None
        self._modulations: ModulationOf | None = None

    @torch.no_grad()
    def double(
        self, index: int, img: Tensor, txt: Tensor, vec: Tensor, pe: Pe, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Double block `index`: img [B, n_img, hidden], txt [B, n_txt, hidden], vec [B, hidden] to (img, txt)."""
        img_mod, txt_mod = (self._modulation(f"double_blocks.{index}.{stream}_mod", vec) for stream in _STREAMS)
        img_out, txt_out = self._double[index](img, txt, img_mod, txt_mod, pe, self._double_weights[index], mask)
        return closed(img_out), closed(txt_out)

    @torch.no_grad()
    def single(self, index: int, x: Tensor, vec: Tensor, pe: Pe, mask: Tensor | None = None) -> Tensor:
        """Single block `index`: x [B, n_txt + n_img, hidden], text first."""
        mod = self._modulation(f"single_blocks.{index}.modulation", vec)
        return closed(self._single[index](x, mod, pe, self._single_weights[index], mask))

    def _modulation(self, name: str, vec: Tensor) -> Tensor:
        if self._modulations is None or self._vec is not vec:
            self._vec = vec
            self._modulations = self._modulations_of(vec)
        return self._modulations(name)

    def _modulations_of(self, vec: Tensor) -> ModulationOf:
        if self._table is None or not self._table.takes(vec.shape[0]):
            return Modulations(self._tensors, self._hidden, vec, self._branches)
        return self._table.modulations(vec, vec.shape[0], None, self._branches)


_STREAMS = ("img", "txt")

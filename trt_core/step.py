"""One step of the transformer: what surrounds the blocks, the blocks in their order, and what a call adds to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .compilation import Blocks
from .execution import BlockWeights, Pe
from .extras import Extras
from .flux import stem
from .flux.architecture import FluxArchitecture
from .flux.branches import Branches
from .flux.modulation_table import ModulationOf, ModulationTable
from .flux.open_sum import Stream, closed
from .flux.rope import rope_cos_sin


class StepInputs(NamedTuple):
    """What differs from step to step; shapes and units as `MutableTRTModule.__call__` takes them."""

    img: Tensor
    txt: Tensor
    timesteps: Tensor
    y: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def cloned(self) -> StepInputs:
        return StepInputs(*(None if tensor is None else tensor.clone() for tensor in self))


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A function of `StepInputs` and of the bound weights. Apart from what `extras` bring, it never waits for the GPU:
    Python decides nothing on the values of a tensor, so what it launches can be captured and launched again."""

    arch: FluxArchitecture
    blocks: Blocks
    tensors: Mapping[str, Tensor]
    double_weights: Sequence[BlockWeights]
    single_weights: Sequence[BlockWeights]
    dtype: torch.dtype
    scale_first: bool
    extras: Extras
    branches: Branches | None = None
    table: ModulationTable | None = None
    """Where modulations of steps to come are kept; None: each step computes its own."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """[B, n_img, out_channels]"""
        weights, txt_tokens = self.tensors, inputs.txt.shape[1]
        vec, modulation = self._conditioning(inputs)
        ids = torch.cat((inputs.txt_ids, inputs.img_ids))
        pe = Pe(*rope_cos_sin(ids, self.arch.axes_dim, self.arch.theta), txt_tokens)
        img = stem.linear(weights, "img_in", inputs.img.to(self.dtype))
        txt = stem.linear(weights, "txt_in", inputs.txt.to(self.dtype))
        img, txt = self._double_blocks(img, txt, vec, modulation, pe)
        x = self._single_blocks(torch.cat((txt, img), dim=1), vec, modulation, pe)
        return stem.final_layer(weights, x[:, txt_tokens:], vec, self.scale_first)

    def _conditioning(self, inputs: StepInputs) -> tuple[Tensor, ModulationOf]:
        """vec [B, hidden], and what the blocks make of it."""
        weights, batch, given = self.tensors, inputs.timesteps.shape[0], (inputs.timesteps, inputs.guidance, inputs.y)
        if self.table is None or not self.table.takes(batch):
            vec = stem.conditioning(weights, self.arch, *given)
            return vec, stem.Modulations(weights, self.arch.hidden, vec, self.branches)
        times, guidance, y = self.table.rows(*given)
        vec = stem.conditioning(weights, self.arch, times, guidance, y)
        return vec[:batch], self.table.modulations(vec, batch, times, self.branches)

    def _double_blocks(
        self, img: Stream, txt: Stream, vec: Tensor, modulation: ModulationOf, pe: Pe
    ) -> tuple[Tensor, Tensor]:
        extras = self.extras
        for index, weights in enumerate(self.double_weights):
            override = extras.double_overrides.get(index)
            if override is not None:
                img, txt = override(closed(img), closed(txt), vec, pe)
            else:
                name = f"double_blocks.{index}"
                img_mod, txt_mod = modulation(f"{name}.img_mod"), modulation(f"{name}.txt_mod")
                img, txt = self.blocks.double[index](img, txt, img_mod, txt_mod, pe, weights, extras.mask)
            residual = _at(extras.double_residuals, index)
            if residual is not None:
                img = closed(img) + residual.to(self.dtype)
        return closed(img), closed(txt)

    def _single_blocks(self, x: Stream, vec: Tensor, modulation: ModulationOf, pe: Pe) -> Tensor:
        extras = self.extras
        for index, weights in enumerate(self.single_weights):
            override = extras.single_overrides.get(index)
            if override is not None:
                x = override(closed(x), vec, pe, pe.txt_tokens)
            else:
                mod = modulation(f"single_blocks.{index}.modulation")
                x = self.blocks.single[index](x, mod, pe, weights, extras.mask)
            residual = _at(extras.single_residuals, index)
            if residual is not None:
                x = closed(x)
                x[:, pe.txt_tokens :].add_(residual.to(x.dtype))
        return closed(x)


def _at(residuals: Sequence[Tensor | None], index: int) -> Tensor | None:
    return residuals[index] if index < len(residuals) else None

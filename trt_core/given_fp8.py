"""Weights that come in FP8, from a checkpoint: bound as they are, neither quantized again nor widened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_storage import HostSlabs
from .config import BaseWeights
from .errors import UnsupportedModel
from .flux import fp8
from .fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity
from .lora.changes import merged
from .low_rank_merge import Merges
from .merge_table import Fp8Place
from .quantized_weights import QuantizedWeights, scale_name
from .weights import Patches


@dataclass(frozen=True, slots=True, eq=False)
class GivenFp8:
    """An E4M3 matrix [N, K] and its scale: fp32, one element or one per row [N, 1]."""

    weight: Tensor
    scale: Tensor


class GivenFp8Weights(QuantizedWeights):
    """FP8 matrices with the scales that they came with, and everything else as it is.

    The base of a LoRA is what the matrix stands for, weight * scale in fp32; the sum gets a fresh scale. What no LoRA
    touches keeps the given bits, and what one has touched gets them back.
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor | GivenFp8]], recipe: Fp8Recipe, mode: BaseWeights,
        device: torch.device, slabs: HostSlabs | None = None,
    ) -> None:  # fmt: skip
        """All are bound on `device`; a tensor that is there already is bound itself."""
        self._recipe, given = recipe, set()
        tensors: dict[str, Tensor] = {}
        for name, weight in weights:
            if not isinstance(weight, GivenFp8):
                tensors[name] = weight.to(device)
                self._dtype = weight.dtype
                continue
            given.add(name)
            tensors[name] = weight.weight.to(device).contiguous()
            tensors[scale_name(name)] = weight.scale.to(device, torch.float32).reshape(
                (-1, 1) if self._per_row else (1,)
            )
            tensors |= self._input_scale(name, device)
        self._matrices = frozenset(given)
        _check_layers(recipe, given)
        super().__init__(tensors, mode, slabs)

    def base(self, name: str) -> Tensor:
        if name not in self._matrices or name in self._merged:
            return super().base(name)
        return fp8.dequantize(*self._bound(name), torch.float32)

    def _keep(self, names: Sequence[str]) -> None:
        super()._keep([*names, *(scale_name(name) for name in names if name in self._matrices)])

    def _kept(self, name: str) -> Tensor:
        if name not in self._matrices:
            return super()._kept(name)
        weight, scale = self._bits(name)
        return fp8.dequantize(weight, scale.to(weight.device), torch.float32)

    def _bits(self, name: str) -> tuple[Tensor, Tensor]:
        return self._bases[name], self._bases[scale_name(name)]

    def _give_back(self, name: str) -> None:
        super()._give_back(name)
        if name in self._matrices:
            super()._give_back(scale_name(name))

    def _write(self, name: str, patches: Patches, merges: Merges) -> None:
        if name not in self._matrices:
            super()._write(name, patches, merges)
        elif patches:
            weight, scale = (bits.to(self.device, non_blocking=True) for bits in self._bits(name))
            base = fp8.dequantize(weight, scale, torch.float32)
            if not (self._per_row and merges.add_fp8(Fp8Place(*self._bound(name)), base, patches, lent=True)):
                self._quantize(merged(base, patches), self._bound(name))
        else:
            self._put_base(name)

    def _put_base(self, name: str) -> None:
        if name not in self._matrices:
            super()._put_base(name)
            return
        for bound, bits in zip(self._bound(name), self._bits(name), strict=True):
            bound.copy_(bits)


def given_recipe(input_scales: Mapping[str, float | None], granularity: Granularity) -> Fp8Recipe:
    """The recipe of layers that come in FP8. `input_scales`: layer -> the scale of its input, None where it has none.

    Activations are static where every layer but modulations has a scale, else dynamic.
    """
    linears = frozenset(input_scales)
    dynamic = Fp8Recipe(Fp8Config(granularity), linears)
    scales = {name: input_scales[name] for name in sorted(dynamic.activation_linears)}
    if not scales or any(not scale for scale in scales.values()):
        return dynamic
    config = Fp8Config(granularity, Activations.STATIC, headroom=1.0)
    return Fp8Recipe(config, linears, {name: scale * fp8.FP8_MAX for name, scale in scales.items() if scale})


def _check_layers(recipe: Fp8Recipe, given: set[str]) -> None:
    wrong = {f"{name}.weight" for name in recipe.linears} ^ given
    if wrong:
        raise UnsupportedModel(
            f"{min(wrong)} is FP8 in the recipe or in the weights, but not in both.",
            expected="The recipe names the layers that come in FP8.",
        )

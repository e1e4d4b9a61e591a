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
from .flux.precision import INPUT_SCALE, SCALE
from .fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity
from .lora.changes import Patch, merged
from .weights import BoundWeights


@dataclass(frozen=True, slots=True, eq=False)
class GivenFp8:
    """An E4M3 matrix [N, K] and its scale: fp32, one element or one per row [N, 1]."""

    weight: Tensor
    scale: Tensor


class GivenFp8Weights(BoundWeights):
    """FP8 matrices with the scales that they came with, and everything else as it is.

    The base of a LoRA is what the matrix stands for, weight * scale in fp32; the sum gets a fresh scale. What no LoRA
    touches keeps the given bits, and what one has touched gets them back.
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor | GivenFp8]], recipe: Fp8Recipe, mode: BaseWeights,
        device: torch.device, slabs: HostSlabs | None = None,
    ) -> None:  # fmt: skip
        """All are bound on `device`; a tensor that is there already is bound itself."""
        self._per_row = recipe.config.granularity is Granularity.ROW
        self._given: set[str] = set()
        tensors: dict[str, Tensor] = {}
        for name, weight in weights:
            if not isinstance(weight, GivenFp8):
                tensors[name] = weight.to(device)
                self._dtype = weight.dtype
                continue
            layer = name.removesuffix(".weight")
            self._given.add(name)
            tensors[name] = weight.weight.to(device).contiguous()
            tensors[_scale(name)] = weight.scale.to(device, torch.float32).reshape((-1, 1) if self._per_row else (1,))
            if layer in recipe.input_amax:
                tensors[f"{layer}.{INPUT_SCALE}"] = torch.full((1,), recipe.input_scale(layer), device=device)
        _check_layers(recipe, self._given)
        super().__init__(tensors, mode, slabs)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def outlines(self) -> dict[str, Tensor]:
        """What stands for the weights where only shape and dtype count: no FP8 matrix is widened for it."""
        names = [name for name in self.tensors if not name.endswith((f".{SCALE}", f".{INPUT_SCALE}"))]
        return {name: self._outline(name) if name in self._given else self.tensors[name] for name in names}

    def base(self, name: str) -> Tensor:
        if name not in self._given or name in self._applied:
            return super().base(name)
        return fp8.dequantize(self.tensors[name], self.tensors[_scale(name)], torch.float32)

    def readable(self, name: str) -> Tensor | None:
        if name not in self._given:
            return super().readable(name)
        return fp8.dequantize(self.tensors[name], self.tensors[_scale(name)], self._dtype)

    def _outline(self, name: str) -> Tensor:
        return torch.empty(self.tensors[name].shape, dtype=self._dtype, device="meta")

    def _keep(self, names: Sequence[str]) -> None:
        super()._keep([*names, *(_scale(name) for name in names if name in self._given)])

    def _kept(self, name: str) -> Tensor:
        if name not in self._given:
            return super()._kept(name)
        weight, scale = self._bits(name)
        return fp8.dequantize(weight, scale.to(weight.device), torch.float32)

    def _bits(self, name: str) -> tuple[Tensor, Tensor]:
        return self._bases[name], self._bases[_scale(name)]

    def _give_back(self, name: str) -> None:
        super()._give_back(name)
        if name in self._given:
            super()._give_back(_scale(name))

    def _write(self, name: str, patches: Sequence[tuple[Patch, float]]) -> None:
        if name not in self._given:
            super()._write(name, patches)
        elif patches:
            weight, scale = (bits.to(self.device, non_blocking=True) for bits in self._bits(name))
            self._quantize(merged(fp8.dequantize(weight, scale, torch.float32), patches), self._bound(name))
        else:
            self._put_base(name)

    def _put_base(self, name: str) -> None:
        if name not in self._given:
            super()._put_base(name)
            return
        for bound, bits in zip(self._bound(name), self._bits(name), strict=True):
            bound.copy_(bits)

    def _put(self, name: str, value: Tensor) -> None:
        if name not in self._given:
            super()._put(name, value)
            return
        out = (
            torch.empty_like(self._bound(name)[0], device="cpu"),
            torch.empty_like(self._bound(name)[1], device="cpu"),
        )
        self._quantize(value, out)
        for bound, new in zip(self._bound(name), out, strict=True):
            bound.copy_(new)

    def _bound(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[name], self.tensors[_scale(name)]

    def _quantize(self, value: Tensor, out: tuple[Tensor, Tensor]) -> None:
        fp8.merge_quantize(value, None, 1.0, out, per_row=self._per_row)


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


def _scale(name: str) -> str:
    return f"{name.removesuffix('weight')}{SCALE}"

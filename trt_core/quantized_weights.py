"""What bound weights have in common of which some are FP8, wherever their FP8 numbers come from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .flux import fp8
from .flux.precision import INPUT_SCALE, SCALE
from .fp8_recipe import Fp8Recipe, Granularity
from .weights import BoundWeights


class QuantizedWeights(BoundWeights):
    """FP8 matrices, each beside its scale, and everything else as it is. Where their bases are, subclasses know."""

    _recipe: Fp8Recipe
    _dtype: torch.dtype
    """What blocks compute in."""
    _matrices: Collection[str]
    """Names of the FP8 matrices."""

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def base_names(self) -> list[str]:
        """BFL names of the weights as they were given, without the scales."""
        return [name for name in self.tensors if not name.endswith((f".{SCALE}", f".{INPUT_SCALE}"))]

    def readable(self, name: str) -> Tensor | None:
        if name not in self._matrices:
            return super().readable(name)
        return fp8.dequantize(*self._bound(name), self._dtype)

    def outlines(self) -> dict[str, Tensor]:
        """What stands for the weights where only shape and dtype count: nothing is widened or read for it."""
        return {name: self._outline(name) if name in self._matrices else self.tensors[name] for name in self.base_names}

    def _outline(self, name: str) -> Tensor:
        return torch.empty(self.tensors[name].shape, dtype=self._dtype, device="meta")

    @property
    def _per_row(self) -> bool:
        return self._recipe.config.granularity is Granularity.ROW

    def _bound(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[name], self.tensors[scale_name(name)]

    def _input_scale(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The bound scale of a matrix's input, where it is static."""
        layer = name.removesuffix(".weight")
        if layer not in self._recipe.input_amax:
            return {}
        return {f"{layer}.{INPUT_SCALE}": torch.full((1,), self._recipe.input_scale(layer), device=device)}

    def _quantize(self, value: Tensor, out: tuple[Tensor, Tensor]) -> None:
        fp8.merge_quantize(value, None, 1.0, out, per_row=self._per_row)

    def _put(self, name: str, value: Tensor) -> None:
        if name not in self._matrices:
            super()._put(name, value)
            return
        bound = self._bound(name)
        weight, scale = (torch.empty_like(tensor, device="cpu") for tensor in bound)
        self._quantize(value, (weight, scale))
        bound[0].copy_(weight)
        bound[1].copy_(scale)


def scale_name(name: str) -> str:
    """The name of an FP8 matrix's scale."""
    return f"{name.removesuffix('weight')}{SCALE}"

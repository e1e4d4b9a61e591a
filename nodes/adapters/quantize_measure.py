"""What FP8 saves and what it costs in precision, measured on the model's own weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...trt_core.flux import fp8, storage
from ...trt_core.flux.weights import weight_shapes
from ...trt_core.fp8_recipe import Activations, Fp8Config, Fp8Recipe, Granularity, is_modulation, kinds_of, left_in_bf16
from ...trt_core.host import Progress, stop_if_cancelled
from . import weights
from .quantize_calibration import Seen

_STAGE = "Measuring FP8"
_WORKING_BYTES = 2**30
"""One layer in fp32, quantized twice."""
_known: weakref.WeakKeyDictionary[Any, tuple[Any, Measured]] = weakref.WeakKeyDictionary()
"""The last measurement of each BaseModel: a LoRA node before ours makes us run again, on the same weights."""


@dataclass(slots=True)
class Error:
    """Squares of differences and of values, and the worst layer's ratio."""

    difference: float = 0.0
    value: float = 0.0
    worst: float = 0.0
    worst_name: str = ""

    def add(self, name: str, seen: Tensor, exact: Tensor) -> None:
        difference = float((seen.float() - exact.float()).square().sum(dtype=torch.float64))
        value = float(exact.float().square().sum(dtype=torch.float64))
        self.difference, self.value = self.difference + difference, self.value + value
        ratio = (difference / value) ** 0.5 if value else 0.0
        if ratio > self.worst:
            self.worst, self.worst_name = ratio, name

    @property
    def ratio(self) -> float:
        return (self.difference / self.value) ** 0.5 if self.value else 0.0

    def words(self) -> str:
        return f"{self.ratio:.2%} (largest {self.worst:.2%} in {self.worst_name})"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of the whole transformer before and after, layers, and errors relative to full precision."""

    before_bytes: int
    after_bytes: int
    recipe: Fp8Recipe
    plain: tuple[str, ...]
    weights: Error = field(default_factory=Error)
    own_format: Error = field(default_factory=Error)
    """Of the weights with one scale per layer, as ComfyUI's own format has it."""
    outputs: Error = field(default_factory=Error)
    """Of single layers on calibrated inputs, before biases are corrected; empty without calibration."""

    def lines(self) -> list[str]:
        config = self.recipe.config
        scales = "row" if config.granularity is Granularity.ROW else "layer"
        lines = [
            f"{len(self.recipe.linears)} layers in FP8, a scale per {scales}, {config.activations.value} activations",
            f"{_size(self.before_bytes)} before, {_size(self.after_bytes)} after",
            f"error of the weights: {self.weights.words()}",
        ]
        if self.recipe.input_mean:
            lines.append("TRT Compile Transformer takes the mean error of rounded weights out of biases")
        if self.outputs.value:
            lines.append(f"error of layers' outputs: {self.outputs.words()}")
        if self.plain:
            lines.append(f"not in FP8: {kinds_of(self.plain)}")
        return lines

    @property
    def own_words(self) -> str:
        return f"error of the weights {self.own_format.ratio:.2%}"


def measured(patcher: Any, recipe: Fp8Recipe, seen: Seen | None, progress: Progress) -> Measured:
    """Quantizes every layer of the recipe once, without keeping it. LoRAs on the patcher do not count."""
    known = _known.get(patcher.model)
    if seen is None and known is not None and known[0] == recipe:
        return known[1]
    flux = weights.flux_of(patcher)
    arch, keys = weights.architecture(flux), weights.all_weights(flux)
    found = Measured(*_sizes(patcher, keys, recipe), recipe, left_in_bf16(arch, recipe))
    comfy.model_management.free_memory(_WORKING_BYTES, patcher.load_device)
    names = [name for name in weight_shapes(arch) if name.removesuffix(".weight") in recipe.linears]
    for done, name in enumerate(names):
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, done, len(names))
        weight = weights.read_base(patcher, keys[name], patcher.load_device, weights.compute_dtype(patcher))
        _measure(name.removesuffix(".weight"), weight, seen, found)
    progress.update(_STAGE, len(names), len(names))
    if seen is None:
        _known[patcher.model] = (recipe, found)
    return found


def _measure(layer: str, weight: Tensor, seen: Seen | None, found: Measured) -> None:
    config = found.recipe.config
    single = fp8.merge_quantize(weight, None, 1.0, per_row=False)
    asked = _asked(layer, weight, single, config)
    found.own_format.add(layer, fp8.dequantize(*single, torch.float32), weight)
    found.weights.add(layer, storage.dequantize(*asked, torch.float32), weight)
    if seen is not None and layer in seen.samples:
        inputs = seen.samples[layer].to(weight.device, weight.dtype)
        static = config.activations is Activations.STATIC
        scale = torch.full((1,), found.recipe.input_scale(layer), device=weight.device) if static else None
        outputs = fp8.scaled_linear(*fp8.quantize(inputs, scale), *asked, None, torch.float32)
        found.outputs.add(layer, outputs, inputs.float() @ weight.float().t())


def _asked(layer: str, weight: Tensor, single: tuple[Tensor, Tensor], config: Fp8Config) -> tuple[Tensor, Tensor]:
    """What TRT Compile Transformer binds of this layer."""
    if is_modulation(layer):
        return storage.quantize(weight)
    return single if config.granularity is Granularity.TENSOR else fp8.merge_quantize(weight, None, 1.0)


def _sizes(patcher: Any, keys: dict[str, str], recipe: Fp8Recipe) -> tuple[int, int]:
    before = after = 0
    for name, key in keys.items():
        elements, plain = weights.raw_base(patcher, key).numel(), weights.compute_dtype(patcher).itemsize
        before += elements * plain
        after += elements * (1 if name.removesuffix(".weight") in recipe.linears else plain)
    return before, after


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 10**8 else f"{size_bytes / 1e6:.2f} MB"

"""Bound weights of which some are FP8: their bases stay in full precision, and every merge quantizes from them anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_storage import GPU_RESERVE_BYTES, BaseSource, spare_gpu_bytes
from .bias_correction import BiasCorrection
from .config import BaseWeights
from .flux import fp8, storage
from .flux.architecture import FluxArchitecture
from .flux.weights import weight_shapes
from .fp8_recipe import Fp8Recipe, is_modulation
from .host_slabs import HostSlabs, piece_bytes
from .lora.changes import Additive, Patch, merged
from .low_rank_merge import Merges
from .merge_table import Fp8Place
from .quantized_weights import QuantizedWeights, layer_of, scale_name
from .row_merge import disjoint
from .weights import Patches

Placed = Callable[[str, Tensor], None]
"""(name, base): where the base of a weight is from now on."""


@dataclass(frozen=True, slots=True)
class BasePlace:
    """Where bases go, `GPU` (the device of the bound weights) or `HOST`, and how many bytes they are together.

    `exact_modulations`: modulations are not stored in eight bits, because their bases are read in place at no price in
    memory. Their rounding is the same at every step, so it adds up: in full size 20 Euler steps end 1.70 times as far
    from fp32 as with white noise of the same size, without it 1.58 times (H100).
    """

    where: BaseWeights
    bytes: int
    exact_modulations: bool = False


class Fp8Weights(QuantizedWeights):
    """FP8 matrices with their scales, modulations as int8 (`storage`) or exact, and everything else as it is.

    Merged = round_fp8(base + delta) with a scale of its own for every row (or matrix): a change of half a percent
    survives, where adding it to an FP8 matrix would lose four fifths of it.
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], recipe: Fp8Recipe, place: BasePlace, device: torch.device,
        placed: Placed | None = None, source: BaseSource | None = None,
    ) -> None:  # fmt: skip
        """`weights` one by one, on any device, all are bound on `device`; a tensor that is where `place` wants the
        bases, on the GPU or in pinned host memory, stays the base itself. `placed` is told each base at once.

        With a `source` no bases are kept where host memory is not spare: they are read from there at each refit."""
        self._recipe, self._exact_modulations = recipe, place.exact_modulations
        self._originals: dict[str, Tensor | None] = {}
        """None: read from the source."""
        self._matrices = self._originals
        self._correction = BiasCorrection(recipe.input_mean, device)
        self._source, kept = source, source is None or not _is_better(source, place, device)
        # Their own: bases of an earlier binding may still be in use, as the parameters of a diffusers model.
        self._slabs, self._to_place_bytes = HostSlabs(), place.bytes
        tensors: dict[str, Tensor] = {}
        for name, tensor in weights:
            if self._quantizes(name):
                self._dtype = tensor.dtype
                tensors |= self._new(name, tensor, device)
                base = self._placed(tensor, place.where, device) if kept else tensor
                self._originals[name] = base if kept else None
                value, out = tensor.to(device), (tensors[name], tensors[scale_name(name)])
                self._quantize(value, out)
                self._correction.note_base(layer_of(name), value, *out)
            else:
                tensors[name] = base = tensor.to(device)
            if placed is not None:
                placed(name, base)
        super().__init__(tensors, place.where, HostSlabs())
        self._written(self.tensors)

    def base(self, name: str) -> Tensor:
        return self._original(name) if name in self._originals else super().base(name)

    def _outline(self, name: str) -> Tensor:
        base = self._originals[name]
        return super()._outline(name) if base is None else base

    def free_base_gpu(self, wanted_bytes: float) -> int:
        freed = super().free_base_gpu(wanted_bytes)
        for name, base in self._originals.items() if self._source is not None else ():
            if freed >= wanted_bytes:
                break
            if base is not None and base.is_cuda:
                freed += base.nbytes
                self._originals[name] = None
        return freed

    @property
    def base_gpu_bytes(self) -> int:
        return super().base_gpu_bytes + sum(t.nbytes for t in self._originals.values() if t is not None and t.is_cuda)

    @property
    def base_host_bytes(self) -> int:
        in_host = (t for t in self._originals.values() if t is not None and not t.is_cuda)
        return super().base_host_bytes + sum(t.nbytes for t in in_host)

    @torch.no_grad()
    def quantize_again(self, names: Sequence[str]) -> None:
        """Follows bases and biases that somebody else changed in place; a refit does so for those that LoRAs touch."""
        merges = Merges(self.device)
        for name in (name for name in names if name in self._originals):
            self._correction.forget_base(layer_of(name))
            if name not in self._merged:
                self._write(name, (), merges)
        merges.finish()
        self._written(names)

    def _written(self, names: Iterable[str]) -> None:
        self._correction.apply(dict.fromkeys(name.rpartition(".")[0] for name in names), self.tensors)

    def _quantizes(self, name: str) -> bool:
        exact = self._exact_modulations and is_modulation(layer_of(name))
        return self._recipe.quantizes(name) and not exact

    def _new(self, name: str, tensor: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The bound tensors of one matrix, not yet written."""
        modulation = is_modulation(layer_of(name))
        scales = storage.groups(tensor.shape[1]) if modulation else 1
        scale_shape = (tensor.shape[0], scales) if self._per_row or modulation else (1,)
        return {
            name: torch.empty(tensor.shape, dtype=storage.INT8 if modulation else fp8.FP8, device=device),
            scale_name(name): torch.empty(scale_shape, dtype=torch.float32, device=device),
            **self._input_scale(name, device),
            **self._correction.new_bias(layer_of(name), tensor),
        }

    def _placed(self, tensor: Tensor, place: BaseWeights, device: torch.device) -> Tensor:
        if place is BaseWeights.HOST and not tensor.is_pinned():
            piece = self._slabs.take(tensor, max(self._to_place_bytes, piece_bytes(tensor)))
            self._to_place_bytes -= piece_bytes(tensor)
            return piece.copy_(tensor)
        return tensor.to(device) if place is BaseWeights.GPU else tensor

    def _keep(self, names: Sequence[str]) -> None:
        super()._keep([name for name in names if name not in self._originals])

    def _kept(self, name: str) -> Tensor:
        return self._original(name) if name in self._originals else super()._kept(name)

    def _original(self, name: str) -> Tensor:
        base = self._originals[name]
        if base is not None:
            return base
        if self._source is None:
            raise KeyError(name)
        try:
            return self._source.read(name, self.device)
        except torch.OutOfMemoryError:
            return self._source.read(name, torch.device("cpu"))  # a refit that ran out of memory is rolled back

    def _write(self, name: str, patches: Patches, merges: Merges) -> None:
        if name not in self._originals:
            super()._write(name, patches, merges)
            return
        kept = self._originals[name]
        lent = kept is None or kept.device != self.device
        base = self._original(name).to(self.device, non_blocking=True)
        if self.tensors[name].dtype is storage.INT8:
            self._quantize(merged(base, patches) if patches else base, self._bound(name))
            return
        place = Fp8Place(*self._bound(name), *self._correction.of(layer_of(name)))
        if patches and self._per_row and merges.add_fp8(place, base, patches, lent):
            return
        self._quantize_merged(name, base, patches)
        if patches and place.mean is not None:
            self._correction.note(layer_of(name), merged(base, patches), *self._bound(name))
        elif not patches and not self._correction.restore(layer_of(name)):
            self._correction.note_base(layer_of(name), base, *self._bound(name))

    def _quantize_merged(self, name: str, base: Tensor, patches: Patches) -> None:
        if not disjoint(patches):
            self._quantize(merged(base, patches), self._bound(name))
        elif self._per_row:
            for start, stop, patch in _row_ranges(base.shape[0], patches):
                self._quantize_rows(name, base, start, stop, patch)
        else:
            self._quantize(merged(base, patches) if patches else base, self._bound(name))

    def _put(self, name: str, value: Tensor) -> None:
        super()._put(name, value)
        if name in self._originals:
            self._correction.note(layer_of(name), value, *(tensor.to(value.device) for tensor in self._bound(name)))

    def _put_base(self, name: str) -> None:
        super()._put_base(name)
        self._correction.restore(layer_of(name))

    def _quantize_rows(self, name: str, base: Tensor, start: int, stop: int, patch: tuple[Patch, float] | None) -> None:
        weight, scale = self._bound(name)
        delta, factor = _delta(patch, base[start:stop])
        fp8.merge_quantize(base[start:stop], delta, factor, (weight[start:stop], scale[start:stop]))


def base_place(
    mode: BaseWeights, arch: FluxArchitecture, recipe: Fp8Recipe, device: torch.device, given_there: bool
) -> BasePlace:
    """Where bases of FP8 weights go: as asked for, or on the GPU where both copies fit.

    `given_there`: the full-size weights are on `device` already.
    """
    counts = {name: math.prod(weight_shapes(arch)[f"{name}.weight"]) for name in recipe.linears}
    elements, modulations = sum(counts.values()), sum(n for name, n in counts.items() if is_modulation(name))
    if device.type != "cuda":
        # The CPU stands for both kinds of GPU, those with and without room for bases.
        return BasePlace(BaseWeights.GPU, 2 * elements, exact_modulations=mode is BaseWeights.GPU)
    where = mode
    if mode is BaseWeights.AUTO:
        needed_bytes = elements - modulations + (0 if given_there else 2 * elements)
        fits = spare_gpu_bytes(device) >= needed_bytes + GPU_RESERVE_BYTES
        where = BaseWeights.GPU if fits else BaseWeights.HOST
    return BasePlace(where, 2 * elements, exact_modulations=where is BaseWeights.GPU)


def _is_better(source: BaseSource, place: BasePlace, device: torch.device) -> bool:
    """Whether bases are read from the source: they would be in host memory, which has no room for them or is no
    faster."""
    return device.type != "cuda" or (place.where is BaseWeights.HOST and source.spare_host_bytes() < place.bytes)


def _row_ranges(
    rows: int, patches: Sequence[tuple[Patch, float]]
) -> Iterator[tuple[int, int, tuple[Patch, float] | None]]:
    """All rows in order, cut where a patch begins or ends; rows are quantized one by one, so each can go alone."""
    covered = 0
    for patch, strength in sorted(patches, key=lambda item: item[0].rows or (0, 0)):
        start, stop = patch.rows or (0, rows)
        if covered < start:
            yield covered, start, None
        yield start, stop, (patch, strength)
        covered = stop
    if covered < rows:
        yield covered, rows, None


def _delta(patch: tuple[Patch, float] | None, base: Tensor) -> tuple[Tensor | None, float]:
    """What to add to these rows, fp32, and its factor."""
    if patch is None or patch[1] == 0 or not isinstance(change := patch[0].change, Additive):
        return None, 1.0
    return change.delta(base.device).reshape(base.shape), patch[1] * change.scale

"""Modulations of all blocks, computed once per schedule and kept on the GPU for its steps.

They depend on timestep, guidance and pooled text alone, and reading their matrices, 27 % of the parameters, is nearly
all that a step pays for them: 2.8 ms of FLUX.1-dev's 123 in bf16 on an H100. The same read serves 32 rows as well as
one. So where the timesteps to come are known, the first step computes those of the next steps with its own, and the
others find them. What is found has the bits that computing it would have (`triton_modulation.ROWS`), and a row is found
by all bits of its vec, so nothing is approximated; an unknown vec is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused, storage
from .architecture import FluxArchitecture
from .branches import Branches
from .precision import SCALE

if TYPE_CHECKING:
    from .triton_modulation import Layers

SLOTS = 64
"""Rows that are kept: 134 MB in FLUX.1-dev. 20 steps of two pictures with texts of their own are 40."""
MOST_EXPECTED = 1024
_ALIGNMENT_BYTES = 16
_FLOATS = (torch.bfloat16, torch.float16)

Weights = Mapping[str, Tensor]
ModulationOf = Callable[[str], Tensor]
"""A layer's name ("double_blocks.0.img_mod") to its shifts, scales and gates, [n, B, hidden]."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One modulation matrix: its rows are the places from `place` on of all outputs."""

    name: str
    rows: int
    place: int


def layer_names(arch: FluxArchitecture) -> list[str]:
    """The modulations of a model in the order of its blocks."""
    double = [f"double_blocks.{i}.{stream}_mod" for i in range(arch.double_depth) for stream in ("img", "txt")]
    return double + [f"single_blocks.{i}.modulation" for i in range(arch.single_depth)]


def why_no_table(weights: Weights, arch: FluxArchitecture, dtype: torch.dtype) -> str | None:
    """Why these modulations are computed layer by layer at each step, or None."""
    matrices = [weights[f"{name}.lin.weight"] for name in layer_names(arch)]
    if not matrices:
        return "the model has no blocks"
    if any(not matrix.is_cuda for matrix in matrices):
        return "the model is not on a GPU"
    if dtype not in _FLOATS:
        return f"it computes in {dtype}"
    if fused.weight_kernels(matrices[0]) is None:
        return "there is no Triton, or rows are too long"
    return None if all(_is_aligned(matrix) for matrix in matrices) else "a weight lies at an odd address"


def _is_aligned(matrix: Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % _ALIGNMENT_BYTES == 0 and matrix.data_ptr() % _ALIGNMENT_BYTES == 0


class ModulationTable:
    """The table of one binding's modulations. Everything is on the GPU and in its order: nothing here waits for it.

    Weights are read by address and may change in place: `forget` after that. One step at a time, on one stream.
    """

    def __init__(self, weights: Weights, arch: FluxArchitecture, dtype: torch.dtype) -> None:
        self._weights, self._hidden, self._layers = weights, arch.hidden, list(_layers(weights, arch))
        self._places = sum(layer.rows for layer in self._layers)
        self._device = weights[f"{self._layers[0].name}.lin.weight"].device
        self._keys = torch.full((SLOTS, arch.hidden), torch.nan, dtype=dtype, device=self._device)
        self._table = torch.empty((SLOTS, self._places), dtype=dtype, device=self._device)
        self._head = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._expected = torch.full((MOST_EXPECTED,), torch.nan, device=self._device)
        kinds: dict[tuple[torch.dtype, int], list[_Layer]] = {}
        for layer in self._layers:
            kinds.setdefault(self._kind(layer), []).append(layer)
        self._kinds = [(kind, layers, _blocks(layers, self._device)) for kind, layers in kinds.items()]
        self._launches: list[Layers] = []
        self._branches: Branches | None = None

    @property
    def bytes(self) -> int:
        """What it holds on the GPU."""
        return sum(x.nbytes for x in (self._keys, self._table, self._head, self._expected))

    def forget(self) -> None:
        """Nothing is known any more, because weights may have changed."""
        self._keys.fill_(torch.nan)

    def expect(self, timesteps: Tensor | None) -> None:
        """These timesteps are likely to come, in this order and with exactly these bits; None: nobody knows."""
        self._expected.fill_(torch.nan)
        if timesteps is not None:
            known = timesteps[:MOST_EXPECTED]
            self._expected[: known.shape[0]].copy_(known)

    def prepare(self, batch: int) -> None:
        """Compiles what the first LoRA beside these matrices needs; without it, that one would wait for it."""
        first, zeros = self._layers[0], self._keys.new_zeros((batch, self._hidden))
        shapes = {f"{first.name}.lin": (first.rows, self._hidden, 16)}
        self.modulations(zeros, batch, None, Branches.empty(shapes, zeros.dtype, self._device))
        self.forget()

    def takes(self, batch: int) -> bool:
        return batch <= _kernels().ROWS

    def rows(self, timesteps: Tensor, guidance: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """All three with ROWS rows: the step's own [B, ...], then those expected next, timesteps NaN where none is."""
        rows, batch = _kernels().ROWS, timesteps.shape[0]
        picture = torch.arange(rows, device=timesteps.device) % batch
        times = _kernels().following(timesteps.contiguous(), self._expected)
        return times, None if guidance is None else guidance[picture], y[picture]

    def modulations(self, vec: Tensor, batch: int, times: Tensor | None, branches: Branches | None) -> ModulationOf:
        """Those of the first `batch` rows of vec [ROWS, hidden] with the `times` that `rows` gave; of vec [B, hidden]
        with None."""
        kernels = _kernels()
        self._follow(branches)
        vec = F.pad(vec, (0, 0, 0, kernels.ROWS - vec.shape[0])).contiguous()
        activated = F.silu(vec)
        found = kernels.find(vec, batch, times, self._keys, self._head)
        out = vec.new_empty((self._places // self._hidden, batch, self._hidden))
        projected = None if branches is None else storage.project(activated, branches.down)
        for layers in self._launches:
            kernels.modulate(activated, projected, layers, found, self._table, out)
        kernels.remember(vec, found, self._keys)
        parts = {x.name: (x.place // self._hidden, (x.place + x.rows) // self._hidden) for x in self._layers}
        return lambda name: out[slice(*parts[name])]

    def _follow(self, branches: Branches | None) -> None:
        """Addresses for these branches. What they hold may change in place, as weights may."""
        if self._launches and branches is self._branches:
            return
        self._launches = [
            _kernels().Layers(self._fields(layers, branches), blocks, *kind, branches is not None)
            for kind, layers, blocks in self._kinds
        ]
        self._branches = branches

    def _kind(self, layer: _Layer) -> tuple[torch.dtype, int]:
        scale = self._scale(layer)
        if scale is None:
            return self._weight(layer).dtype, 0
        return self._weight(layer).dtype, 2 if scale.ndim == 2 and scale.shape[1] > 1 else 1

    def _weight(self, layer: _Layer) -> Tensor:
        return self._weights[f"{layer.name}.lin.weight"]

    def _scale(self, layer: _Layer) -> Tensor | None:
        return self._weights.get(f"{layer.name}.lin.{SCALE}")

    def _fields(self, layers: Sequence[_Layer], branches: Branches | None) -> Tensor:
        fields = [self._field(layer, branches) for layer in layers]
        return torch.tensor(fields, dtype=torch.int64).to(self._device)

    def _field(self, layer: _Layer, branches: Branches | None) -> list[int]:
        """In the order of `triton_modulation.Layers`."""
        weight, scale, bias = self._weight(layer), self._scale(layer), self._weights[f"{layer.name}.lin.bias"]
        branch = None if branches is None else branches.layers.get(f"{layer.name}.lin")
        of_scale = (0, 0) if scale is None else (scale.data_ptr(), 0 if scale.numel() == 1 else scale.stride(0))
        beside = (0, 0, 0, 0)
        if branch is not None:
            beside = (branch.up.data_ptr(), branch.up.stride(0), branch.stop - branch.start, branch.start)
        return [weight.data_ptr(), weight.stride(0), *of_scale, bias.data_ptr(), *beside, layer.rows]


def _blocks(layers: Sequence[_Layer], device: torch.device) -> Tensor:
    """One row for each program, in the order of `triton_modulation.Layers`."""
    parts = []
    for index, layer in enumerate(layers):
        first = torch.arange(0, layer.rows, _kernels().BLOCK_ROWS, dtype=torch.int32)
        parts.append(torch.stack((torch.full_like(first, index), first, first + layer.place), 1))
    return torch.cat(parts).to(device)


def _layers(weights: Weights, arch: FluxArchitecture) -> list[_Layer]:
    found, place = [], 0
    for name in layer_names(arch):
        rows = weights[f"{name}.lin.weight"].shape[0]
        found.append(_Layer(name, rows, place))
        place += rows
    return found


def _kernels() -> ModuleType:
    from . import triton_modulation

    return triton_modulation

"""Merges LoRAs that are low-rank products by Triton kernels, where there are an NVIDIA GPU and a Triton that works."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .flux import fp8
from .host import Progress, stop_if_cancelled
from .lora.changes import Patch
from .low_rank import DTYPES, Section, Term, low_rank_sections
from .merge_table import Fp8Place, Merge, alike

_LOG = logging.getLogger("trt_core.refit")

_STAGE = "Preparing LoRA merges"
_SMALL = (64, 256)
"""Without edges, as FLUX's own sizes are: others are compiled apart."""
MAX_TERMS = 8
"""LoRAs on the same rows. Kernels are compiled for each number of them, a second each, and kept on the disk."""
_MOST_HELD_BYTES = 2**28
"""Of bases and factors that gathered merges keep in GPU memory: with bases in host memory, a few layers at a time."""
_MOST_WAITING = 64
"""Merges of one launch: the GPU begins with them while Python reads what else there is to merge."""


class Merges:
    """Merges of one refit on one device, gathered so that few launches do them all; `finish` does what is left.

    What is taken is written in the order of the device's stream, before or in `finish`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[Merge] = []
        self._held_bytes = 0

    def add(self, bound: Tensor, base: Tensor, patches: Sequence[tuple[Patch, float]], lent: bool) -> bool:
        """Takes base + patches to `bound`, summed in fp32 and rounded once. False, and nothing taken, where it cannot.

        bound and base [N, K] on one device; factors may lie in host memory. Rows without a patch get the base's bits.
        `lent`: the base is in GPU memory for this merge alone.
        """
        fits = bound.dtype is base.dtype and bound.stride(-1) == 1
        sections = self._sections(base, patches) if fits else None
        for start, stop, terms in sections or ():
            if terms:
                self._take(Merge(start, stop, base, bound, alike(terms)), lent)
            else:
                bound[start:stop].copy_(base[start:stop])
        return sections is not None

    def add_fp8(self, place: Fp8Place, base: Tensor, patches: Sequence[tuple[Patch, float]], lent: bool) -> bool:
        """The sum of `add` as E4M3 with a fresh fp32 scale per row. False as there."""
        sections = self._sections(base, patches)
        for start, stop, terms in sections or ():
            if terms or place.mean is not None:
                self._take(Merge(start, stop, base, place, alike(terms)), lent)
            else:
                fp8.merge_quantize(base[start:stop], None, 1.0, (place.weight[start:stop], place.scale[start:stop]))
        return sections is not None

    def finish(self) -> None:
        """Launches what was taken."""
        if self._waiting and (kernels := _kernels(self._device)) is not None:
            kernels.merge_all(self._waiting)
        self._waiting, self._held_bytes = [], 0

    def _take(self, merge: Merge, lent: bool) -> None:
        self._waiting.append(merge)
        self._held_bytes += sum(term.up.nbytes + term.down.nbytes for term in merge.terms)
        self._held_bytes += merge.base.nbytes if lent else 0
        if self._held_bytes > _MOST_HELD_BYTES or len(self._waiting) >= _MOST_WAITING:
            self.finish()

    def _sections(self, base: Tensor, patches: Sequence[tuple[Patch, float]]) -> list[Section] | None:
        """What kernels can do on this weight; None where PyTorch must."""
        if not base.is_cuda or base.dtype not in DTYPES or base.stride(-1) != 1 or _kernels(base.device) is None:
            return None
        sections = low_rank_sections(base.shape, patches, base.device)
        few = sections is not None and all(len(section.terms) <= MAX_TERMS for section in sections)
        return sections if few else None


def prepare(device: torch.device, dtype: torch.dtype, with_fp8: bool, progress: Progress, mean: bool = False) -> None:
    """Compiles what the usual LoRA needs, so that the first one does not wait 1.4 s for it (measured on an H100).

    One LoRA on a layer, factors of 16 bits, ranks up to 16 and up to 32, on weights of `dtype`; `with_fp8`: on FP8
    weights as well, `mean`: whose biases are corrected. Other kinds are compiled when they come, once per machine.
    Raises `BuildCancelled`.
    """
    if device.type != "cuda" or dtype not in DTYPES or (kernels := _kernels(device)) is None:
        return
    base = torch.zeros(_SMALL, dtype=dtype, device=device)
    place = _small_place(base, mean)
    kinds = list(itertools.product((torch.bfloat16, torch.float16), (16, 32)))
    for done, (factors, rank) in enumerate(kinds):
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, done, len(kinds))
        up, down = (base.new_zeros(shape, dtype=factors) for shape in ((_SMALL[0], rank), (rank, _SMALL[1])))
        terms = (Term(up, down, 1.0),)
        kernels.merge_all([Merge(0, _SMALL[0], base, base, terms)])
        if with_fp8:
            kernels.merge_all([Merge(0, _SMALL[0], base, place, terms)])


def _small_place(base: Tensor, mean: bool) -> Fp8Place:
    weight, scale = torch.empty_like(base, dtype=fp8.FP8), base.new_empty((_SMALL[0], 1), dtype=torch.float32)
    if not mean:
        return Fp8Place(weight, scale)
    return Fp8Place(weight, scale, scale.new_zeros(_SMALL[1]), scale.new_zeros(_SMALL[0]))


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """`triton_merge` where it works on this GPU, which is tried once; None elsewhere, and the log says why."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import triton_merge
    except ImportError as error:
        _LOG.warning("LoRAs are merged by PyTorch, which takes longer than Triton: it cannot be imported (%s).", error)
        return None
    reason = triton_merge.why_not(device)
    if reason is not None:
        _LOG.warning("LoRAs are merged by PyTorch, which takes longer than Triton: %s", reason)
    return triton_merge if reason is None else None

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

_LOG = logging.getLogger("trt_core.refit")

_STAGE = "Preparing LoRA merges"
_SMALL = (64, 256)
"""Multiples of 16, as FLUX's own sizes are: Triton compiles other sizes apart."""
MAX_TERMS = 8
"""LoRAs on the same rows. Kernels are compiled for each number of them, a second each, and kept on the disk."""


def merge(bound: Tensor, base: Tensor, patches: Sequence[tuple[Patch, float]]) -> bool:
    """Writes base + patches to `bound`, summed in fp32 and rounded once. False, and nothing written, where it cannot.

    bound and base [N, K] on one device; factors may lie in host memory. Rows without a patch get the base's bits.
    """
    sections = _sections(base, patches) if bound.dtype in DTYPES and bound.stride(-1) == 1 else None
    kernels = None if sections is None else _kernels(base.device)
    if sections is None or kernels is None:
        return False
    for start, stop, terms in sections:
        if terms:
            kernels.merge_low_rank(base[start:stop], terms, bound[start:stop])
        else:
            bound[start:stop].copy_(base[start:stop])
    return True


def merge_fp8(out: tuple[Tensor, Tensor], base: Tensor, patches: Sequence[tuple[Patch, float]]) -> bool:
    """The sum of `merge` as E4M3 [N, K] with a fresh fp32 scale per row [N, 1], written to `out`. False as there."""
    sections = _sections(base, patches)
    kernels = None if sections is None else _kernels(base.device)
    if sections is None or kernels is None:
        return False
    for start, stop, terms in sections:
        rows, weight, scale = base[start:stop], out[0][start:stop], out[1][start:stop]
        if terms:
            kernels.merge_low_rank_fp8(rows, terms, weight, scale)
        else:
            fp8.merge_quantize(rows, None, 1.0, (weight, scale))
    return True


def prepare(device: torch.device, dtype: torch.dtype, with_fp8: bool, progress: Progress) -> None:
    """Compiles what the usual LoRA needs, so that the first one does not wait 1.4 s for it (measured on an H100).

    One LoRA on a layer, factors of 16 bits, ranks up to 16 and up to 32, on weights of `dtype`; `with_fp8`: on FP8
    weights as well. Other kinds are compiled when they come, once per machine. Raises `BuildCancelled`.
    """
    if device.type != "cuda" or dtype not in DTYPES or (kernels := _kernels(device)) is None:
        return
    base = torch.zeros(_SMALL, dtype=dtype, device=device)
    weight, scale = torch.empty_like(base, dtype=fp8.FP8), torch.empty((_SMALL[0], 1), device=device)
    kinds = list(itertools.product((torch.bfloat16, torch.float16), (16, 32)))
    for done, (factors, rank) in enumerate(kinds):
        stop_if_cancelled(progress, _STAGE)
        progress.update(_STAGE, done, len(kinds))
        up, down = (base.new_zeros(shape, dtype=factors) for shape in ((_SMALL[0], rank), (rank, _SMALL[1])))
        kernels.merge_low_rank(base, [Term(up, down, 1.0)], base)
        if with_fp8:
            kernels.merge_low_rank_fp8(base, [Term(up, down, 1.0)], weight, scale)


def _sections(base: Tensor, patches: Sequence[tuple[Patch, float]]) -> list[Section] | None:
    """What kernels can do on this weight; None where PyTorch must."""
    if not base.is_cuda or base.dtype not in DTYPES or base.stride(-1) != 1:
        return None
    sections = low_rank_sections(base.shape, patches, base.device)
    few = sections is not None and all(len(section.terms) <= MAX_TERMS for section in sections)
    return sections if few else None


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

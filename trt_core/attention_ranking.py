"""Which attention kernels are fastest on this device for the profile's optimum."""

from __future__ import annotations

import torch

from .backends.compiler import SegmentCompiler
from .config import Attention
from .errors import UnsupportedGPU
from .flux import cudnn_attention, flash3_attention
from .flux.attention import attention_function, runnable_kernels, runs
from .flux.catalogue import BlockKind
from .flux.fp8 import FP8
from .measure import median_milliseconds
from .packages import (
    CUDNN_FRONTEND,
    CUDNN_FRONTEND_REQUIREMENT,
    FP8_ATTENTION_CAPABILITY,
    install_line,
)
from .plan import WHOLE_SEGMENT, AttentionChoice, Measurement

_WORTH_IT = 0.9
"""FP8 attention is taken below this part of the other kernels' time: v's scale costs one more pass over v."""


def rank_attention(compiler: SegmentCompiler, forced: Attention) -> tuple[AttentionChoice, list[Measurement]]:
    """The fastest kernel between segments, FP8's inside blocks that may have it, and what was measured.

    A forced kernel is the only candidate. Raises `UnsupportedGPU` where it does not run here.
    """
    device, shape = compiler.device, _shape(compiler)
    q = torch.randn(shape, device=device, dtype=compiler.dtype)
    times = {}
    for kernel in _kernels(compiler, forced):
        function = attention_function(kernel)
        times[kernel] = median_milliseconds(lambda f=function: f(q, q, q), device, 5, 1)
    best = min(times, key=lambda kernel: times[kernel])
    measured = [Measurement("attention", kernel.value, ms) for kernel, ms in times.items()]
    kinds = _fp8_kinds(compiler) if forced is Attention.AUTO else []
    found = _fp8(compiler, times[best]) if kinds else None
    inside = dict.fromkeys(kinds, Attention.FP8) if found is not None and found.left_out is None else {}
    return AttentionChoice(best, times[best], inside), [*measured, *([found] if found else [])]


def why_not_fp8_attention(device: torch.device, head_dim: int) -> str | None:
    """Why attention cannot be in E4M3 on this device, or None."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_ATTENTION_CAPABILITY:
        oldest = ".".join(map(str, FP8_ATTENTION_CAPABILITY))
        return f"it needs compute capability {oldest}, and this GPU has {capability[0]}.{capability[1]}"
    if not cudnn_attention.installed():
        return f"{CUDNN_FRONTEND} is not installed: {install_line(CUDNN_FRONTEND_REQUIREMENT)}"
    return cudnn_attention.why_not(device, head_dim)


def _fp8_kinds(compiler: SegmentCompiler) -> list[BlockKind]:
    return [kind for kind in BlockKind if compiler.precision(WHOLE_SEGMENT[kind]).fp8_attention]


def _fp8(compiler: SegmentCompiler, other_ms: float) -> Measurement:
    """FP8's kernel: its time, and why it is left out where it is."""
    arch, device = compiler.arch, compiler.device
    if reason := why_not_fp8_attention(device, arch.head_dim):
        return Measurement("attention", Attention.FP8.value, left_out=reason)
    q = torch.randn(_shape(compiler), device=device, dtype=compiler.dtype).to(FP8)
    factor = torch.ones(1, device=device)
    ms = median_milliseconds(lambda: cudnn_attention.attend(q, q, q, factor), device, 5, 1)
    slow = None if ms <= _WORTH_IT * other_ms else f"it takes {ms:.2f} ms, the fastest of the others {other_ms:.2f} ms"
    return Measurement("attention", Attention.FP8.value, ms, left_out=slow)


def _shape(compiler: SegmentCompiler) -> tuple[int, int, int, int]:
    profile, arch = compiler.profile, compiler.arch
    return profile.batch.opt, profile.img_tokens.opt + profile.txt_tokens.opt, arch.heads, arch.head_dim


def _kernels(compiler: SegmentCompiler, forced: Attention) -> list[Attention]:
    arch, device, dtype = compiler.arch, compiler.device, compiler.dtype
    if forced is not Attention.AUTO:
        _require(compiler, forced)
        return [forced]
    kernels = runnable_kernels(dtype, device, arch.heads, arch.head_dim)
    # MATH is never the fastest on a GPU, and its L x L logits would take gigabytes: only where nothing else runs.
    return [kernel for kernel in kernels if kernel is not Attention.MATH] or kernels


def _require(compiler: SegmentCompiler, forced: Attention) -> None:
    arch, device, dtype = compiler.arch, compiler.device, compiler.dtype
    if forced is Attention.FP8:
        reason = why_not_fp8_attention(device, arch.head_dim) or _why_not_fp8_model(compiler)
    else:
        reason = flash3_attention.why_not(dtype, device, arch.head_dim) if forced is Attention.FLASH3 else None
        if reason is None and not runs(forced, dtype, device, arch.heads, arch.head_dim):
            reason = f"it does not run here for heads of {arch.head_dim} in {dtype}"
    if reason:
        raise UnsupportedGPU(
            f'attention="{forced.value}" cannot be used: {reason}.', fix='Use attention="auto".', widget="attention"
        )


def _why_not_fp8_model(compiler: SegmentCompiler) -> str | None:
    if any(compiler.precision(WHOLE_SEGMENT[kind]).fp8 for kind in BlockKind):
        return None
    return "the model is not FP8 (quantize_fp8_, or the node FP8 Quantize)"

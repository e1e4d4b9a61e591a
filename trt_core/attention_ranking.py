"""Which attention kernel is fastest on this device for the profile's optimum."""

from __future__ import annotations

import torch

from .backends.compiler import SegmentCompiler
from .config import Attention
from .errors import UnsupportedGPU
from .flux.attention import attention_function, runnable_kernels, runs
from .measure import median_milliseconds
from .plan import Measurement


def rank_attention(compiler: SegmentCompiler, forced: Attention) -> tuple[Attention, float, list[Measurement]]:
    """The fastest kernel, its milliseconds, and what was measured; a forced kernel is the only candidate.

    Raises `UnsupportedGPU` where the forced kernel does not run here.
    """
    profile, arch, device = compiler.profile, compiler.arch, compiler.device
    tokens = profile.img_tokens.opt + profile.txt_tokens.opt
    shape = (profile.batch.opt, tokens, arch.heads, arch.head_dim)
    q = torch.randn(shape, device=device, dtype=compiler.dtype)
    times = {}
    for kernel in _kernels(compiler, forced):
        function = attention_function(kernel)
        times[kernel] = median_milliseconds(lambda f=function: f(q, q, q), device, 5, 1)
    best = min(times, key=lambda kernel: times[kernel])
    return best, times[best], [Measurement("attention", kernel.value, ms) for kernel, ms in times.items()]


def _kernels(compiler: SegmentCompiler, forced: Attention) -> list[Attention]:
    arch, device, dtype = compiler.arch, compiler.device, compiler.dtype
    if forced is not Attention.AUTO:
        if not runs(forced, dtype, device, arch.heads, arch.head_dim):
            raise UnsupportedGPU(
                f'attention="{forced.value}" does not run here for heads of {arch.head_dim} in {dtype}.',
                fix='Use attention="auto".',
                widget="attention",
            )
        return [forced]
    kernels = runnable_kernels(dtype, device, arch.heads, arch.head_dim)
    # MATH is never the fastest on a GPU, and its L x L logits would take gigabytes: only where nothing else runs.
    return [kernel for kernel in kernels if kernel is not Attention.MATH] or kernels

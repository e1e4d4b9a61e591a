"""NVFP4: E2M1 values of 4 bits, an E4M3 scale for every 16 of them along the last axis, one fp32 scale per tensor.

Arithmetic and layout are those of NVIDIA's ModelOpt and TensorRT. It runs on any device in plain PyTorch; matrix
products in NVFP4 need a GPU of compute capability 10.0, and their speed is unmeasured here.

A value is `E2M1 * E4M3 scale * fp32 scale`. E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidOption, UnsupportedGPU
from .flux.architecture import FluxArchitecture
from .flux.weights import weight_shapes
from .fp8_recipe import E4M3_MAX, Fp8Config, plan_recipe
from .gpu import GpuInfo, why_not_nvfp4

BLOCK = 16
"""How many values share one scale."""
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitude of codes 0 to 7; codes 8 to 15 are their negatives."""
E2M1_MAX = 6.0
_ROUNDS_UP_ABOVE = (0.25, 1.25, 2.5, 5.0)
"""Midpoints whose lower neighbour has an even code, to which a tie goes."""
_ROUNDS_UP_FROM = (0.75, 1.75, 3.5)
"""Midpoints whose upper neighbour has an even code."""
_SMALLEST_SCALE = 2.0**-9
"""E4M3's smallest number above zero: a block's scale must not become zero while the block is not."""


@dataclass(frozen=True, slots=True, eq=False)
class Nvfp4Tensor:
    """A tensor [..., n] in NVFP4, half a byte per value and half a bit for scales.

    `packed` [..., n / 2] uint8, the earlier value of a pair in the low four bits; `scales` [..., n / 16] float8_e4m3fn;
    `global_scale` fp32, 0-dim.
    """

    packed: Tensor
    scales: Tensor
    global_scale: Tensor

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales, self.global_scale))


def require_nvfp4(gpu: GpuInfo | None) -> None:
    """Raises `UnsupportedGPU` with the reason where NVFP4 matrix products cannot run."""
    reason = why_not_nvfp4(gpu)
    if reason is not None:
        raise UnsupportedGPU(f"NVFP4 cannot be used: {reason}.", fix="Use FP8 (RTX 40 series or newer), or bf16.")


def nvfp4_linears(arch: FluxArchitecture, exclude: tuple[str, ...] = ()) -> frozenset[str]:
    """The linears for NVFP4: those of the blocks that FP8 takes, less modulations and `exclude` patterns.

    A modulation's error would reach every token through shift, scale and gate, and its one row gains no time; it stays
    FP8. Raises `InvalidOption` for a width that is no multiple of 16 and for patterns that match nothing.
    """
    linears = plan_recipe(arch, Fp8Config(exclude=exclude)).activation_linears
    shapes = weight_shapes(arch)
    for name in sorted(linears):
        _require_blocks(shapes[f"{name}.weight"], name)
    return linears


def quantize_nvfp4(values: Tensor) -> Nvfp4Tensor:
    """`values` [..., n] in NVFP4, rounded to nearest, ties to even; n is a multiple of 16.

    The tensor's scale maps its amax to 6 * 448, a block's scale its own amax to 6, rounded to E4M3. Raises
    `InvalidOption` for another n, NaN or infinity.
    """
    _require_blocks(tuple(values.shape), "the tensor")
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    global_scale = amax.max() / (E2M1_MAX * E4M3_MAX)
    if not torch.isfinite(global_scale):
        raise InvalidOption("The tensor holds NaN or infinity.", expected="NVFP4 needs finite numbers.")
    scales = torch.where(amax > 0, amax / (E2M1_MAX * global_scale), 1.0)
    scales = scales.clamp(_SMALLEST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scales.float() * global_scale).unsqueeze(-1)
    codes = _e2m1_codes(torch.where(step > 0, blocks / step, 0.0)).flatten(-2)
    return Nvfp4Tensor(codes[..., 0::2] | codes[..., 1::2] << 4, scales, global_scale)


def dequantize_nvfp4(tensor: Nvfp4Tensor) -> Tensor:
    """The values [..., n] of an NVFP4 tensor in fp32."""
    codes = torch.stack((tensor.packed & 0xF, tensor.packed >> 4), -1).flatten(-2)
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    blocks = table[codes.int()].unflatten(-1, (-1, BLOCK))
    return (blocks * (tensor.scales.float() * tensor.global_scale).unsqueeze(-1)).flatten(-2)


def _e2m1_codes(values: Tensor) -> Tensor:
    """4-bit codes (uint8) of the nearest E2M1 numbers; beyond 6 it saturates."""
    magnitude = values.abs()
    above = sum((magnitude > bound).to(torch.uint8) for bound in _ROUNDS_UP_ABOVE)
    reached = sum((magnitude >= bound).to(torch.uint8) for bound in _ROUNDS_UP_FROM)
    return above + reached + ((values < 0).to(torch.uint8) << 3)


def _require_blocks(shape: tuple[int, ...], name: str) -> None:
    if not shape or shape[-1] % BLOCK or 0 in shape:
        raise InvalidOption(
            f"{name} has shape {tuple(shape)}.", expected=f"NVFP4 needs rows of a multiple of {BLOCK} values."
        )

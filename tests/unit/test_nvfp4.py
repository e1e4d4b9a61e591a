"""NVFP4's arithmetic: against the grid by hand, against error bounds, and against ModelOpt's own packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_flux import tiny_transformer
from trt_core.errors import InvalidOption, UnsupportedGPU
from trt_core.flux.architecture import FluxArchitecture
from trt_core.gpu import GpuInfo
from trt_core.nvfp4 import E2M1_VALUES, Nvfp4Tensor, dequantize_nvfp4, nvfp4_linears, quantize_nvfp4, require_nvfp4

B200 = GpuInfo("NVIDIA B200", (10, 0), 192 << 30, "590.1")
H200 = GpuInfo("NVIDIA H200", (9, 0), 141 << 30, "590.1")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(values: Tensor) -> Tensor:
    return dequantize_nvfp4(quantize_nvfp4(values))


def unscaled(values: list[float]) -> list[float]:
    """What each value becomes in a block whose scales are all one: amax 6 in the block, 2688 in the tensor."""
    block = torch.tensor([6.0, *values, *[0.0] * (15 - len(values))])
    full = torch.tensor([2688.0] + [0.0] * 15)
    return round_trip(torch.stack((block, full)))[0, 1 : 1 + len(values)].tolist()


def test_the_grid_is_exact() -> None:
    grid = [*E2M1_VALUES, *(-value for value in E2M1_VALUES if value)]
    assert unscaled(grid) == grid


def test_ties_go_to_the_even_code() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    assert unscaled(list(ties)) == list(ties.values())
    assert unscaled([-tie for tie in ties]) == [-value for value in ties.values()]


def test_everything_else_goes_to_the_nearest() -> None:
    values = (torch.rand(3000, generator=torch.Generator().manual_seed(3)) * 6).tolist()
    grid = torch.tensor(E2M1_VALUES)
    for start in range(0, 3000, 15):
        some = values[start : start + 15]
        nearest = grid[(torch.tensor(some)[:, None] - grid).abs().argmin(1)].tolist()
        assert unscaled(some) == nearest


def test_layout_and_size() -> None:
    values = torch.tensor([[6.0, -0.5] + [1.0] * 14 + [2688.0] + [0.0] * 15])
    packed = quantize_nvfp4(values)
    assert packed.packed.shape == (1, 16)
    assert packed.scales.shape == (1, 2)
    assert packed.packed[0, 0].item() == 7 | (1 + 8) << 4  # 6.0 in the low four bits, -0.5 above it
    assert packed.scales.float().tolist() == [[1.0, 448.0]]
    assert packed.global_scale.item() == 1.0
    assert packed.size_bytes == 16 + 2 + 4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_error_is_bounded_by_the_grid_and_the_scale(scale: float) -> None:
    values = normal(64, 512) * scale
    amax = values.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    error = (round_trip(values) - values).unflatten(-1, (-1, 16)).abs()
    # Half of the widest step (4 to 6) is amax/6; a block's scale is within 1/16 (E4M3), and saturation costs as much.
    assert bool((error <= amax * (1 / 6) * (1 + 1 / 16)).all())
    relative = (error.square().sum() / values.square().sum()).sqrt().item()
    assert 0.08 < relative < 0.11


def test_outliers_cost_only_their_own_block() -> None:
    values = normal(4, 64)
    loud = values.clone()
    loud[0, 0] = 1000.0
    quiet_blocks = round_trip(loud)[1:]
    relative = ((quiet_blocks - values[1:]).norm() / values[1:].norm()).item()
    assert relative < 0.12
    assert ((round_trip(loud)[0, :16] - loud[0, :16]).norm() / values[0, :16].norm()).item() > 0.5


def test_a_quiet_block_beside_a_loud_one_is_not_lost() -> None:
    quiet = 2.0**-9
    values = torch.tensor([2688.0] + [0.0] * 15 + [quiet] * 16)
    assert round_trip(values)[16:].tolist() == [quiet] * 16


def test_zeros_stay_zeros() -> None:
    assert torch.equal(round_trip(torch.zeros(2, 32)), torch.zeros(2, 32))
    half = torch.cat((torch.zeros(1, 16), normal(1, 16)), 1)
    assert torch.equal(round_trip(half)[:, :16], torch.zeros(1, 16))


def test_rounding_again_changes_nothing() -> None:
    once = round_trip(normal(8, 64))
    assert torch.equal(round_trip(once), once)


@pytest.mark.parametrize("values", [torch.zeros(3, 15), torch.zeros(0, 16), torch.tensor(1.0)])
def test_shapes_without_whole_blocks_are_refused(values: Tensor) -> None:
    with pytest.raises(InvalidOption, match="multiple of 16"):
        quantize_nvfp4(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    values = normal(2, 32)
    values[1, 5] = bad
    with pytest.raises(InvalidOption, match="NaN or infinity"):
        quantize_nvfp4(values)


def test_linears_are_those_of_the_blocks_without_modulations() -> None:
    arch = FluxArchitecture.from_diffusers_config(dict(tiny_transformer().config))
    linears = nvfp4_linears(arch)
    assert len(linears) == 2 * 8 + 2 * 2
    assert not any("mod" in name for name in linears)
    assert linears - nvfp4_linears(arch, ("*.linear2",)) == {"single_blocks.0.linear2", "single_blocks.1.linear2"}


def test_a_gpu_that_cannot_is_told_why() -> None:
    require_nvfp4(B200)
    with pytest.raises(UnsupportedGPU, match=r"H200 has compute capability 9.0; NVFP4 needs 10.0"):
        require_nvfp4(H200)
    with pytest.raises(UnsupportedGPU, match="no NVIDIA GPU"):
        require_nvfp4(None)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
def test_bit_for_bit_as_modelopt_packs(scale: float) -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    values = normal(48, 128, seed=7) * scale
    values[3, 16:32] = 0
    theirs, scales, global_scale = NVFP4QTensor.quantize(values.clone(), 16)
    ours: Nvfp4Tensor = quantize_nvfp4(values)
    assert torch.equal(ours.global_scale, global_scale)
    assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(ours.packed, theirs._quantized_data)

"""A tiny model's modulations, and what a table of them must do on any device: also in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_core.flux import fp8, storage
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.branches import Branches
from trt_core.flux.modulation_table import ModulationTable, layer_names
from trt_core.flux.stem import Modulations


def architecture(hidden: int) -> FluxArchitecture:
    return FluxArchitecture(
        in_channels=4, out_channels=4, hidden=hidden, heads=1, mlp_hidden=hidden, double_depth=1, single_depth=2,
        context_dim=8, vec_dim=8, guidance=True, axes_dim=(hidden - 16, 8, 8),
    )  # fmt: skip


def stored(kind: str, weight: Tensor) -> dict[str, Tensor]:
    """What is bound of one matrix: "plain", "int8", or E4M3 scaled per "row" or per "tensor"."""
    if kind == "plain":
        return {"weight": weight}
    quantized = (
        storage.quantize(weight) if kind == "int8" else fp8.merge_quantize(weight, None, 1.0, per_row=kind == "row")
    )
    return dict(zip(("weight", "weight_scale"), quantized, strict=True))


def weights_of(arch: FluxArchitecture, kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """ "mixed": the second layer plain, the others int8."""
    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, Tensor] = {}
    for index, name in enumerate(layer_names(arch)):
        rows = arch.hidden * (3 if name.startswith("single") else 6)
        weight = torch.randn(rows, arch.hidden, generator=generator, device=device) * arch.hidden**-0.5
        of_layer = "plain" if kind == "mixed" and index == 1 else "int8" if kind == "mixed" else kind
        found |= {f"{name}.lin.{part}": value for part, value in stored(of_layer, weight.to(dtype)).items()}
        found[f"{name}.lin.bias"] = torch.randn(rows, generator=generator, device=device).to(dtype)
    return found


def branches_of(
    arch: FluxArchitecture, ranks: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Branches | None:
    """LoRAs of these ranks on the first layers, one each."""
    if not ranks:
        return None
    rows = {name: arch.hidden * (3 if name.startswith("single") else 6) for name in layer_names(arch)}
    shapes = {f"{n}.lin": (rows[n], arch.hidden, rank) for n, rank in zip(rows, ranks, strict=False)}
    found = Branches.empty(shapes, dtype, device)
    found.down.normal_(generator=torch.Generator(device).manual_seed(1)).mul_(arch.hidden**-0.5)
    for index, branch in enumerate(found.layers.values()):
        branch.up.normal_(generator=torch.Generator(device).manual_seed(index))
    return found


def check(
    device: torch.device, dtype: torch.dtype, hidden: int, kind: str, batch: int, ranks: Sequence[int]
) -> None:  # fmt: skip
    """Raises `AssertionError` where a table says something else than layer by layer, or computes what it knows."""
    arch = architecture(hidden)
    weights, branches = weights_of(arch, kind, dtype, device), branches_of(arch, ranks, dtype, device)
    table, expected = ModulationTable(weights, arch, dtype), torch.linspace(1, 0.05, 20, device=device)
    table.expect(expected)

    def vec_of(times: Tensor) -> Tensor:
        """Every timestep and every picture has its own."""
        columns = torch.arange(hidden, device=device)
        pictures = torch.arange(times.shape[0], device=device) % batch
        return ((times.float()[:, None] * 50 + pictures[:, None]) * (columns % 7 + 1)).sin().to(dtype)

    def rows(step: int) -> tuple[Tensor, Tensor]:
        given = torch.full((batch,), float(expected[step]), device=device)
        times, guidance, y = table.rows(given, None, torch.zeros(batch, 8, device=device))
        assert guidance is None
        assert y.shape == (32, 8)
        return times, vec_of(times)

    def seen(step: int, table: ModulationTable) -> list[Tensor]:
        times, vec = rows(step)
        one = table.modulations(vec, batch, times, branches)
        return [one(name) for name in layer_names(arch)]

    for step in (0, 1, 4):
        times, vec = rows(step)
        following = expected[step : step + -(-32 // batch)].repeat_interleave(batch)[:32]
        assert torch.equal(times[: following.shape[0]], following)
        assert bool(times[following.shape[0] :].isnan().all())
        plain = Modulations(weights, hidden, vec[:batch], branches)
        for name, part in zip(layer_names(arch), seen(step, table), strict=True):
            other = plain(name).float()
            assert part.shape == other.shape
            assert part.is_contiguous()
            worst = float((part.float() - other).abs().max() / other.abs().max())
            assert worst < 2 * torch.finfo(dtype).eps, (step, name, worst)
    _check_that_it_is_known(table, weights, arch, dtype, seen)


def _check_that_it_is_known(table, weights, arch, dtype, seen) -> None:  # type: ignore[no-untyped-def]
    """Bits of a row that was computed before its step are those of a table that computes it now; then the weights
    change: what is known stays as it was until it is forgotten."""
    ahead, fresh = seen(2, table), seen(2, ModulationTable(weights, arch, dtype))
    for one, two in zip(ahead, fresh, strict=True):
        # Triton's interpreter multiplies with NumPy, whose sums depend on a row's place.
        assert torch.equal(one, two) if one.is_cuda else torch.allclose(one, two, rtol=1e-3, atol=1e-3)
    bias = weights[f"{layer_names(arch)[0]}.lin.bias"]
    bias.add_(1)
    assert torch.equal(seen(2, table)[0], ahead[0]), "a known row was computed"
    table.forget()
    assert not torch.equal(seen(2, table)[0], ahead[0]), "a forgotten row was known"
    bias.sub_(1)

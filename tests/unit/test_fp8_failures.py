"""A refit of FP8 weights that fails leaves those from before, bit for bit, and the next one works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.unit.bound_weights import copied, differing, low_rank, one, stack, versions
from tests.unit.diffusers_pair import lora
from tests.unit.fp8_bound import (
    GRANULARITIES,
    LAST,
    QKV,
    A,
    B,
    C,
    add,
    bound,
    bound_tensors,
    fp8_model,
    is_merged,
    output,
    same,
)
from tests.unit.fp8_simulation import BLOCK_LINEARS, fused_layers
from trt_core.backends.check import relative_l2
from trt_core.errors import OutOfMemory
from trt_core.lora.changes import Additive, LowRank, Patch
from trt_core.weights import WeightPatches

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Additive):
    error: type[BaseException]
    scale: float = 1.0

    def delta(self, device: torch.device | str) -> Tensor:
        raise self.error("provoked")


REASONS = [(torch.OutOfMemoryError, OutOfMemory), (KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, RuntimeError)]


def failing_after(wanted: Mapping[str, WeightPatches], error: type[BaseException]) -> dict[str, WeightPatches]:
    return {**wanted, **one(LAST, Failing(error))}


@GRANULARITIES
@pytest.mark.parametrize("applied", [((A, 0.8),), ((A, 0.8), (B, -0.5)), ((C, 1.0),), ()], ids=["a", "a+b", "c", ""])
@pytest.mark.parametrize(("provoked", "raised"), REASONS)
def test_a_failure_in_the_middle_rolls_back(
    provoked: type[BaseException], raised: type[BaseException], applied: tuple, per_row: bool
) -> None:
    weights = bound(per_row)
    weights.refit(stack(*applied))
    before, written = copied(weights), versions(weights)
    with pytest.raises(raised):
        weights.refit(failing_after(stack((B, 1.0)), provoked))
    assert sum(v != written[n] for n, v in versions(weights).items()) >= 5, "it was to fail in the middle"
    assert differing(weights, before) == []
    assert weights.touched == stack(*applied).keys()
    following = stack((B, 0.3))
    weights.refit(following)
    clean = bound(per_row)
    clean.refit(following)
    assert differing(weights, copied(clean)) == []


def test_a_failure_within_one_weight_leaves_no_row_behind() -> None:
    """q is merged already when v's change fails: q's rows and their scales go back, too."""
    weights, change = bound(), low_rank((64, 64), 4, torch.Generator().manual_seed(5))
    before = copied(weights)
    patches = ((Patch(QKV, (0, 64), change), 1.0), (Patch(QKV, (128, 192), Failing(RuntimeError)), 1.0))
    with pytest.raises(RuntimeError, match="provoked"):
        weights.refit({QKV: WeightPatches("half", patches)})
    assert differing(weights, before) == []


# -- through diffusers' calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("provoked", "raised"), REASONS)
@pytest.mark.parametrize("under", [None, "a"])
def test_a_refit_that_fails_in_the_middle_rolls_back(
    under: str | None, provoked: type[BaseException], raised: type[BaseException], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = fp8_model(tmp_path)
    add(model, "a", lora("to_q", "norm.linear"))
    add(model, "b", lora(*BLOCK_LINEARS), seed=12)
    model.set_adapters("a")
    if under is None:
        model.disable_adapters()
    before = output(model)
    tensors = bound_tensors(model)
    model.enable_adapters()
    model.set_adapters("b")
    computed, original = [], LowRank.delta

    def fails_late(self: LowRank, device: torch.device | str) -> Tensor:
        computed.append(1)
        if len(computed) == 12:
            raise provoked("provoked")
        return original(self, device)

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "delta", fails_late)
        with pytest.raises(raised):
            output(model)
    assert same(bound_tensors(model), tensors)
    assert all(torch.equal(p, q) for p, q in zip(_bases(model), _bases(fp8_model(tmp_path)), strict=True))
    assert relative_l2(output(model), before) > 1e-3
    assert is_merged(model, {"b": 1.0}, per_row=True)
    model.set_adapters("a")
    if under is None:
        model.disable_adapters()
    assert torch.equal(output(model), before)


def _bases(model: FluxTransformer2DModel) -> list[Tensor]:
    return [layer.weight for layers in fused_layers(model).values() for layer in layers]

"""A real-shaped FLUX in FP8 has the simulation's error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.fake_quant import FakeAttention
from tests.unit.fp8_simulation import (
    Scheme,
    compiled_fp8,
    fused_layers,
    is_modulation,
    largest_inputs,
    simulation,
    three_ways,
)
from tests.unit.tiny_flux import exact_inputs, run_diffusers
from trt_core import plan_search
from trt_core.attention_ranking import why_not_fp8_attention
from trt_core.backends.check import relative_l2
from trt_core.flux.catalogue import BlockKind

from .conftest import inputs_of, output_of
from .fp8_models import BACKENDS, real_shaped

pytestmark = pytest.mark.usefixtures("needs_fp8_gpu")
RATIO_BOUND = 1.2
COSINE_BOUND = 0.995
needs_fp8_attention = pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_fp8_attention(torch.device("cuda", 0), 128) is not None,
    reason="needs nvidia-cudnn-frontend and compute capability 9.0",
)


def static(model: Any, **options: Any) -> Scheme:
    calls = [exact_inputs(inputs_of(model, seed=seed)) for seed in (1, 2, 3)]
    return Scheme(input_amax=largest_inputs(copy.deepcopy(model).float(), calls), **options)


@BACKENDS
@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("kind", ["row", "tensor", "row static", "tensor static"])
def test_error_is_the_simulations(kind: str, adversarial: bool, backend: str, cache_folder: str) -> None:
    plain = real_shaped(adversarial)
    per_row = kind.startswith("row")
    scheme = static(plain, per_row=per_row) if kind.endswith("static") else Scheme(per_row)
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend=backend, attention="cudnn")
    for sizes in ({}, {"height": 24, "width": 30}, {"batch": 2}):
        found = three_ways(ours, plain, scheme, inputs_of(plain, **sizes))
        simulated = relative_l2(found.simulated, found.exact)
        assert simulated > 0.004
        assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * simulated
        cosine = torch.nn.functional.cosine_similarity(found.ours.flatten(), found.exact.flatten(), dim=0)
        assert float(cosine) >= COSINE_BOUND
    assert ours.trt_report().builds == 1


@BACKENDS
def test_excluded_layers_stay_in_bf16(backend: str, cache_folder: str) -> None:
    plain = real_shaped()
    scheme = Scheme(
        patterns=("single_blocks.0.linear2", "*.txt_mlp.?"),
        excluded=frozenset({"single_blocks.0.linear2", "double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2"}),
    )
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend=backend, attention="cudnn")
    found = three_ways(ours, plain, scheme, inputs_of(plain))
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)
    tensors = ours._trt_state.module.weights.tensors
    exact = scheme.excluded | {n for n in fused_layers(plain) if is_modulation(n)}
    assert {n for n in fused_layers(plain) if tensors[f"{n}.weight"].dtype is torch.bfloat16} == exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@BACKENDS
def test_other_dtypes(backend: str, dtype: torch.dtype, cache_folder: str) -> None:
    plain = real_shaped().to(dtype)
    ours = compiled_fp8(copy.deepcopy(plain), Scheme(), cache_folder, backend=backend)
    found = three_ways(ours, plain, Scheme(), inputs_of(plain))
    assert relative_l2(found.ours, found.exact) <= RATIO_BOUND * relative_l2(found.simulated, found.exact)


@needs_fp8_attention
@pytest.mark.parametrize("kind", ["row", "row static"])
def test_attention_in_fp8_has_the_simulations_error(kind: str, cache_folder: str) -> None:
    """The simulation rounds q, k, v, probabilities and attention's result as well."""
    plain = real_shaped()
    scheme = static(plain) if kind.endswith("static") else Scheme()
    ours = compiled_fp8(copy.deepcopy(plain), scheme, cache_folder, backend="inductor", attention="fp8")
    for sizes in ({}, {"height": 24, "width": 30}, {"batch": 2}):
        arguments = inputs_of(plain, **sizes)
        exact = exact_inputs(arguments)
        truth = run_diffusers(copy.deepcopy(plain).float(), exact)
        with FakeAttention():
            simulated = relative_l2(run_diffusers(simulation(plain, scheme), exact), truth)
        seen = run_diffusers(ours, arguments).float()
        assert relative_l2(seen, truth) <= RATIO_BOUND * simulated
        assert float(torch.nn.functional.cosine_similarity(seen.flatten(), truth.flatten(), dim=0)) >= COSINE_BOUND
    assert "fp8 attention" in str(ours.trt_report().segments)
    assert ours.trt_report().builds == 1


@needs_fp8_attention
def test_sharp_norms_keep_attention_in_bf16(cache_folder: str) -> None:
    """q/k gains of 3: auto does not take FP8 attention, however fast it is."""
    ours = compiled_fp8(real_shaped(adversarial=True), Scheme(), cache_folder, backend="inductor")
    output_of(ours, inputs_of(real_shaped(), height=64, width=64))
    assert "fp8 attention" not in str(ours.trt_report().segments)


@BACKENDS
def test_products_in_bf16_have_no_error_of_their_own(
    backend: str, cache_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Where they measure faster; here because the ranking says so. Inputs are not rounded then."""
    plain, arguments = real_shaped(), inputs_of(real_shaped())
    errors = []
    for wide in (frozenset(BlockKind), frozenset()):
        monkeypatch.setattr(plan_search, "rank_products", lambda compiler, wide=wide: (wide, []))
        folder = tmp_path / str(len(wide))
        ours = compiled_fp8(copy.deepcopy(plain), Scheme(), folder, backend=backend, attention="cudnn")
        found = three_ways(ours, plain, Scheme(), arguments)
        errors.append(relative_l2(found.ours, found.exact))
        assert ("products not in fp8" in str(ours.trt_report().segments)) is bool(wide)
    assert errors[0] < 0.9 * errors[1]

"""Inductor for real, on the CPU: equal to diffusers, one compilation for all token counts, refused where it is bad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo import pgo

from tests.unit.bound_weights import low_rank, one
from tests.unit.kept_code import graphs
from tests.unit.tiny_flux import (
    FP32_BOUND,
    bfl_weights,
    call_inputs,
    loaded,
    run,
    run_diffusers,
    shapes_of,
    tiny_transformer,
)
from trt_core.backends.base import Request
from trt_core.backends.check import relative_l2
from trt_core.backends.inductor import InductorSegment, why_not_inductor
from trt_core.config import Backend, Profile
from trt_core.errors import BuildFailed, MissingDependency
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.attention import attend
from trt_core.flux.catalogue import SegmentName, segment
from trt_core.flux.precision import Precision

CPU = torch.device("cpu")
SMALL = {"double": 1, "single": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def module_and_model(tmp_path_factory: pytest.TempPathFactory):
    model = tiny_transformer(**SMALL, adversarial=True)
    return loaded(bfl_weights(model), tmp_path_factory.mktemp("cache"), Backend.INDUCTOR), model


def test_equals_diffusers_and_is_compiled_once(module_and_model) -> None:
    module, model = module_and_model
    inputs = call_inputs(model)
    assert relative_l2(run(module, inputs), run_diffusers(model, inputs)) <= FP32_BOUND
    compiled = graphs()
    for sizes in ({"height": 9, "width": 7, "text": 11}, {"height": 2, "width": 3, "text": 2}):
        inputs = call_inputs(model, **sizes)
        assert relative_l2(run(module, inputs), run_diffusers(model, inputs)) <= FP32_BOUND
    assert graphs() == compiled, "a new resolution compiled again"
    report = module.report()
    assert report.segments["double_block"].startswith("inductor (whole inductor")
    assert {m.what for m in report.measurements if m.error_ratio is not None} == {"double_block", "single_block"}
    assert module.builds == 1


def test_refit_needs_no_compilation_and_is_seen(module_and_model) -> None:
    module, model = module_and_model
    inputs = call_inputs(model)
    before, compiled = run(module, inputs), graphs()
    name = "double_blocks.0.img_attn.proj.weight"
    change = low_rank((32, 32), 4, torch.Generator().manual_seed(3), size=0.2)
    module.refit(one(name, change))
    merged = tiny_transformer(**SMALL, adversarial=True)
    with torch.no_grad():
        merged.transformer_blocks[0].attn.to_out[0].weight += change.delta(CPU) * change.scale
    reference = run_diffusers(merged, inputs)
    assert relative_l2(run(module, inputs), reference) <= FP32_BOUND
    assert relative_l2(before, reference) > 0.001
    module.refit({})
    assert torch.equal(run(module, inputs), before)
    assert graphs() == compiled


def test_another_batch_is_one_more_compilation_and_other_batches_none() -> None:
    arch = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(**SMALL))))
    described = segment(SegmentName.SINGLE_OUT, arch)
    asked = Request(described, torch.float32, CPU, Profile.around(1, 40, 7), described.function)
    compiled = InductorSegment(asked)
    counts = []
    for batch, img in ((1, 40), (1, 24), (2, 40), (3, 16)):
        inputs = described.random_inputs(batch, img, 7, torch.float32, CPU)
        before = graphs()
        assert relative_l2(compiled(*inputs)[0], described.function(*inputs)[0]) < 1e-6
        counts.append(graphs() - before)
    assert counts == [1, 0, 1, 0]


def test_a_segment_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    """No rounding is exactly 0 times eager's, so this bound refuses a good segment as it would a bad one."""
    model = tiny_transformer(**SMALL, adversarial=True)
    module = loaded(bfl_weights(model), tmp_path, Backend.INDUCTOR, error_ratio_bound=0.0)
    with pytest.raises(BuildFailed, match=r"inductor's double_block has .* times eager PyTorch's error"):
        run(module, call_inputs(model))
    assert module.builds == 0
    assert not list(tmp_path.rglob("plan.json")), "a bad plan was stored"


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not_inductor(CPU) == "no C compiler was found, which torch.compile needs"
    model = tiny_transformer(**SMALL)
    module = loaded(bfl_weights(model), tmp_path, Backend.INDUCTOR)
    with pytest.raises(
        MissingDependency, match=r'backend="inductor" cannot be used here: no C compiler.*backend="auto"'
    ):
        run(module, call_inputs(model))


def test_what_dynamo_remembers_of_one_segment_does_not_change_another() -> None:
    """FP8's blocks of both kinds come from one line of source: their weights keep constant sizes all the same."""
    before = set(pgo.get_code_state())
    arch = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(**SMALL))))
    fp8 = Precision(frozenset({"img_mlp.0", "linear2"}))
    for name in (SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK):
        described = segment(name, arch, attend, fp8)
        asked = Request(described, torch.float32, CPU, Profile.around(1, 24, 8), described.function, fp8)
        InductorSegment(asked)(*described.random_inputs(1, 24, 8, torch.float32, CPU))
    new = {code: state for code, state in pgo.get_code_state().items() if code not in before}
    # By name: PyTorch 2.13 tells closures of one line apart by itself, 2.11 does not.
    assert len({code.name for code in new}) >= 2
    states = list(new.values())
    sizes = [entry.size for state in states for entry in state.automatic_dynamic.values()]
    assert any(isinstance(size, tuple) and len(size) == 2 for size in sizes), "no weight was seen"
    assert not any(isinstance(size, tuple) and pgo.auto_dynamic in size for size in sizes)

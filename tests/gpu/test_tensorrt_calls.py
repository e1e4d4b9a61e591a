"""What a call may bring to TensorRT's engines: sizes, residuals, changed blocks; and builders that die or are stopped.

Every first call has the same sizes, so that the tier builds the four engines once.
"""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import trt_core
from tests.unit.tiny_flux import exact_inputs
from trt_core.backends.check import relative_l2
from trt_core.config import Profile
from trt_core.errors import BuildCancelled, BuildFailed, ShapeOutsideProfile
from trt_core.flux.attention import runnable_kernels
from trt_core.host import Silent

from .conftest import inputs_of, output_of, real_shaped_model

pytestmark = pytest.mark.usefixtures("needs_tensorrt")
DEVICE = "cuda"
BACKEND = "tensorrt"
RATIO = 1.5
LEFT_OVER_BYTES = 256 * 2**20
"""What this process may load meanwhile; a builder that stays would hold a CUDA context of 500 MB."""


class Models:
    """One model compiled by TensorRT, eager in bf16, and eager in fp32."""

    def __init__(self, cache_folder: str, **options: Any) -> None:
        self.ours = real_shaped_model()
        self.eager, self.exact = copy.deepcopy(self.ours), copy.deepcopy(self.ours).float()
        trt_core.compile_transformer(
            self.ours, backend=BACKEND, cache_folder=cache_folder, progress=options.pop("progress", Silent()), **options
        )

    def ratio(self, more: dict[str, Any] | None = None, **sizes: int) -> float:
        """Our error against fp32, in multiples of eager bf16's."""
        arguments = {**inputs_of(self.ours, **sizes), **(more or {})}
        reference = output_of(self.exact, exact_inputs(arguments))
        seen, eager = output_of(self.ours, arguments), output_of(self.eager, arguments)
        return relative_l2(seen, reference) / relative_l2(eager, reference)

    @property
    def report(self) -> Any:
        return self.ours.trt_report()


def test_sizes_inside_the_profile_need_no_build(cache_folder: str) -> None:
    models = Models(cache_folder)
    sizes = [
        {}, {"height": 32, "width": 32}, {"height": 16, "width": 16, "text": 1}, {"batch": 2, "text": 77},
        {"batch": 4, "height": 17, "width": 19, "text": 512}, {},
    ]  # fmt: skip
    for some in sizes:
        assert models.ratio(**some) < RATIO, some
    assert models.report.builds == 1
    assert models.report.eager_blocks == {}


def test_equal_inputs_give_equal_bits(cache_folder: str) -> None:
    """Whatever was called in between: contexts share one scratch buffer."""
    models = Models(cache_folder)
    first = output_of(models.ours, inputs_of(models.ours))
    output_of(models.ours, inputs_of(models.ours, height=40, width=40, batch=2))
    assert torch.equal(output_of(models.ours, inputs_of(models.ours)), first)


def test_a_size_outside_a_fixed_profile_is_refused_and_nothing_is_lost(cache_folder: str) -> None:
    models = Models(cache_folder, profile=Profile.around(1, 384, 32), rebuild_outside_profile=False)
    assert models.ratio() < RATIO
    for sizes in ({"height": 4, "width": 4}, {"batch": 5}):
        with pytest.raises(ShapeOutsideProfile, match="outside the profile"):
            output_of(models.ours, inputs_of(models.ours, **sizes))
    assert models.ratio() < RATIO


def test_a_size_outside_the_profile_is_built_once(cache_folder: str) -> None:
    models = Models(cache_folder)
    models.ratio()
    assert models.ratio(height=8, width=8) < RATIO
    assert models.report.builds == 2
    assert models.ratio() < RATIO
    assert models.report.builds == 2, "the wider profile holds both"


def test_residuals(cache_folder: str) -> None:
    models = Models(cache_folder)
    random = torch.Generator().manual_seed(3)
    samples = [torch.randn(1, 384, 256, generator=random).to(DEVICE, torch.bfloat16) for _ in range(2)]
    more = {"controlnet_block_samples": samples[:1], "controlnet_single_block_samples": samples}
    assert models.ratio(more) < RATIO
    plain = output_of(models.ours, inputs_of(models.ours))
    with_residuals = output_of(models.ours, {**inputs_of(models.ours), **more})
    assert relative_l2(with_residuals, plain) > 0.01


def test_a_hooked_block_runs_as_its_hook_wants_beside_compiled_ones(cache_folder: str) -> None:
    models = Models(cache_folder)
    for model in (models.ours, models.eager, models.exact):
        model.single_transformer_blocks[0].register_forward_hook(lambda *call: tuple(0.5 * part for part in call[2]))
    assert models.ratio() < RATIO
    assert models.ratio(batch=2) < RATIO
    assert models.report.eager_blocks == {"single_blocks.0": "it has forward hooks"}
    words = models.report.segments["single_out"]
    assert words.startswith(BACKEND), "the other single block is still compiled"


def test_a_call_for_the_whole_eager_model_and_back(cache_folder: str) -> None:
    models = Models(cache_folder)
    before = output_of(models.ours, inputs_of(models.ours))
    arguments = {**inputs_of(models.ours), "joint_attention_kwargs": {"unknown": 1}}
    assert relative_l2(output_of(models.ours, arguments), output_of(models.eager, arguments)) < 1e-2
    assert models.report.eager_blocks == {"the whole model": "joint_attention_kwargs has unknown"}
    assert torch.equal(output_of(models.ours, inputs_of(models.ours)), before)
    assert models.report.builds == 1


def test_a_damaged_plan_is_found_again_without_building(cache_folder: str) -> None:
    Models(cache_folder).ratio()
    engines = {path: path.stat().st_mtime_ns for path in Path(cache_folder).rglob("engine.trt")}
    plans = list(Path(cache_folder).rglob("plan.json"))
    assert plans
    for plan in plans:
        plan.write_bytes(plan.read_bytes()[:-7])
    assert Models(cache_folder).ratio() < RATIO
    assert {path: path.stat().st_mtime_ns for path in Path(cache_folder).rglob("engine.trt")} == engines


# -- builders that are stopped ---------------------------------------------------------------------------------------


def python_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "python" in child.name()]


class CancelsAfter(Silent):
    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def cancelled(self) -> bool:
        return time.monotonic() > self.until


def _comes_back(free_before: int, seconds: float = 10.0) -> bool:
    """Whether the GPU has as much free memory as before; a killed process's context goes within seconds."""
    until = time.monotonic() + seconds
    while torch.cuda.mem_get_info()[0] < free_before - LEFT_OVER_BYTES:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_cancel_gives_the_gpu_back(tmp_path: Path) -> None:
    model = real_shaped_model()
    arguments = inputs_of(model)
    output_of(model, arguments)  # cuBLAS and the attention kernels load what they need before the measurement
    runnable_kernels(torch.bfloat16, torch.device(DEVICE), 2, 128)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before, allocated_before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    children_before, progress = set(python_children()), CancelsAfter(0.5)
    trt_core.compile_transformer(model, backend=BACKEND, cache_folder=str(tmp_path), progress=progress)
    with pytest.raises(BuildCancelled):
        output_of(model, arguments)
    assert time.monotonic() - progress.until < 2.0
    assert set(python_children()) <= children_before
    trt_core.restore_transformer(model)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= allocated_before + 2**20
    assert _comes_back(free_before)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("engine.trt", "plan.json")]
    assert output_of(model, arguments).isfinite().all()


class KillsBuilders(Silent):
    """Progress under which the builder processes die, as the system's out-of-memory killer ends them."""

    def __init__(self, innocent: list[psutil.Process]) -> None:
        self.innocent, self.killed = set(innocent), 0

    def update(self, stage: str, done: int, total: int) -> None:
        if stage == "TensorRT builds" and not self.killed:
            for child in set(python_children()) - self.innocent:
                child.kill()
                self.killed += 1


def test_builders_that_are_killed_are_a_failed_build(tmp_path: Path) -> None:
    progress = KillsBuilders(python_children())
    models = Models(str(tmp_path), progress=progress)
    with pytest.raises(BuildFailed, match="builder process"):
        output_of(models.ours, inputs_of(models.ours))
    assert progress.killed
    assert models.report.builds == 0
    trt_core.restore_transformer(models.ours)
    seen, expected = (output_of(model, inputs_of(model)) for model in (models.ours, models.eager))
    assert relative_l2(seen, expected) < 1e-2

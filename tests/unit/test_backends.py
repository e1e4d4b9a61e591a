"""Backends without a GPU: the check that refuses wrong segments, cache keys, export, builder processes, cancelling."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.processes import alive
from tests.unit.tiny_flux import bfl_weights, shapes_of, tiny_transformer
from trt_core.backends.base import Request
from trt_core.backends.check import check, error_ratio, relative_l2
from trt_core.backends.compiler import SegmentCompiler
from trt_core.backends.eager import EagerSegment
from trt_core.backends.mttm import stock_module
from trt_core.backends.tensorrt import _in_argument_order, export
from trt_core.backends.tensorrt_api import load_tensorrt
from trt_core.backends.tensorrt_builders import Builders
from trt_core.backends.tensorrt_worker import describe, parse
from trt_core.background import run_cancellable
from trt_core.config import Attention, Backend, Profile, ShapeRange
from trt_core.engine_cache import EngineCache
from trt_core.errors import BuildCancelled, BuildFailed, MissingDependency
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import BlockKind, SegmentName
from trt_core.flux.precision import Precision
from trt_core.host import Progress, Silent

ARCH = FluxArchitecture.from_shapes(shapes_of(bfl_weights(tiny_transformer(head_dim=16))))
PROFILE = Profile(ShapeRange(8, 40, 64), ShapeRange(1, 7, 16), ShapeRange(1, 2, 4))
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without TensorRT says")


def compiler(
    folder: Path, arch: FluxArchitecture = ARCH, dtype: torch.dtype = torch.bfloat16, profile: Profile = PROFILE,
    progress: Progress | None = None,
) -> SegmentCompiler:  # fmt: skip
    return SegmentCompiler(arch, dtype, CPU, profile, EngineCache(folder), 1.5, progress or Silent())


def request(name: SegmentName, dtype: torch.dtype = torch.bfloat16) -> Request:
    return compiler(Path("unused"), dtype=dtype).request(name)


class Wrong:
    """A compiled segment whose result was changed on the way."""

    backend = Backend.EAGER
    plan_bytes = 0

    def __init__(self, asked: Request, change: Callable[[list[Tensor]], None] = lambda inputs: None,
                 after: Callable[[Tensor], Tensor] = lambda out: out) -> None:  # fmt: skip
        self._function, self._change, self._after = asked.segment.function, change, after

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = list(tensors)
        self._change(inputs)
        outputs = self._function(*inputs)
        return (*outputs[:-1], self._after(outputs[-1]))

    def close(self) -> None:
        return None


def _index(name: SegmentName, argument: str) -> int:
    segment = request(name).segment
    return [*(a.name for a in segment.activations), *(w.name for w in segment.weights)].index(argument)


def _change(name: SegmentName, argument: str, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def apply(inputs: list[Tensor]) -> None:
        index = _index(name, argument)
        inputs[index] = change(inputs[index])

    return apply


QKV, OUT, SINGLE, SINGLE_OUT = (
    SegmentName.DOUBLE_QKV, SegmentName.DOUBLE_OUT, SegmentName.SINGLE_BLOCK, SegmentName.SINGLE_OUT,
)  # fmt: skip
SLIPS: dict[str, tuple[SegmentName, str, Callable[[Tensor], Tensor]]] = {
    "bias dropped": (OUT, "img_attn.proj.bias", torch.zeros_like),
    "projection transposed": (OUT, "txt_attn.proj.weight", torch.t),
    "norm rolled": (QKV, "img_attn.norm.query_norm.scale", lambda t: t.roll(1)),
    "modulation rolled": (QKV, "txt_mod", lambda t: t.roll(1, 0)),
    "sin for cos": (SINGLE, "cos", lambda t: t.roll(1, -1)),
    "one row of a weight stale": (
        SINGLE_OUT,
        "linear2.weight",
        lambda t: t.clone().index_fill_(0, torch.tensor([3]), 0),
    ),
}


@pytest.mark.parametrize("name", SegmentName)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_eager_passes_its_own_check(name: SegmentName, dtype: torch.dtype) -> None:
    asked = request(name, dtype)
    assert check(EagerSegment(asked), asked, 1.5) <= 1.0


@pytest.mark.parametrize(("name", "argument", "change"), SLIPS.values(), ids=SLIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_wrong_segment_is_refused(
    name: SegmentName, argument: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    asked = request(name, dtype)
    wrong = Wrong(asked, _change(name, argument, change))
    with pytest.raises(BuildFailed, match=f"{name.value} has .* times eager PyTorch's error.*another backend"):
        check(wrong, asked, 1.5)


@pytest.mark.parametrize(
    "after", [lambda out: out * float("nan"), lambda out: out * 0, lambda out: out + 0.02 * out.std()],
    ids=["NaN", "zeros", "two percent off"],
)  # fmt: skip
def test_a_wrong_output_is_refused(after: Callable[[Tensor], Tensor]) -> None:
    asked = request(SegmentName.DOUBLE_BLOCK)
    with pytest.raises(BuildFailed):
        check(Wrong(asked, after=after), asked, 1.5)


def test_the_ratio_measures_the_error() -> None:
    asked = request(SegmentName.SINGLE_OUT)
    noise = [error_ratio(Wrong(asked, after=lambda out, s=s: out * (1 + s)), asked) for s in (0.01, 0.1)]
    assert noise[1] == pytest.approx(10 * noise[0], rel=0.3)


def test_relative_l2() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_l2(torch.tensor([3.0, 5.0]), reference) == pytest.approx(0.2)
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0


# -- keys and requests -----------------------------------------------------------------------------------------------


def test_a_key_holds_what_changes_an_engine_and_nothing_else(tmp_path: Path) -> None:
    same = [
        ARCH, replace(ARCH, double_depth=19), replace(ARCH, single_depth=38), replace(ARCH, in_channels=384),
        replace(ARCH, guidance=False), replace(ARCH, context_dim=99),
    ]  # fmt: skip
    keys = [compiler(tmp_path, arch)._key(QKV).digest for arch in same]
    other = [
        compiler(tmp_path, replace(ARCH, mlp_hidden=64))._key(QKV),
        compiler(tmp_path, replace(ARCH, hidden=64, heads=4))._key(QKV),
        compiler(tmp_path, dtype=torch.float16)._key(QKV),
        compiler(tmp_path, profile=PROFILE.widened(1, 80, 7))._key(QKV),
        compiler(tmp_path)._key(OUT),
    ]
    fp8 = Precision(frozenset({"img_attn.qkv"}))
    for precision in (fp8, replace(fp8, fp8_attention=True)):
        made = compiler(tmp_path)
        made.precisions = {BlockKind.DOUBLE: precision}
        other.append(made._key(QKV))
    assert other.pop().digest == other[-1].digest, "attention in FP8 is no matter of TensorRT's engines"
    assert other.pop().digest != keys[0]
    assert len(set(keys)) == 1
    assert len({keys[0], *(key.digest for key in other)}) == 6


def test_a_request_survives_the_way_to_the_builder() -> None:
    asked = request(SegmentName.SINGLE_BLOCK)
    arrived = parse(describe(asked, ARCH), CPU)
    assert (arrived.dtype, arrived.profile) == (asked.dtype, asked.profile)
    assert arrived.segment.weights == asked.segment.weights
    inputs = asked.segment.random_inputs(1, 9, 3, torch.bfloat16, CPU)
    assert torch.equal(arrived.segment.function(*inputs)[0], asked.segment.function(*inputs)[0])


@pytest.mark.parametrize("name", SegmentName)
def test_export_keeps_batch_and_tokens_open(name: SegmentName) -> None:
    asked = request(name, torch.float32)
    exported = export(asked).module()
    for batch, img, txt in ((1, 30, 4), (3, 17, 5), (2, 64, 1)):
        inputs = asked.segment.random_inputs(batch, img, txt, torch.float32, CPU)
        outputs = zip(exported(*inputs), asked.segment.function(*inputs), strict=True)
        assert max(relative_l2(seen, expected) for seen, expected in outputs) < 1e-6


def test_engine_inputs_are_sorted_by_number() -> None:
    assert _in_argument_order(["tensors_10", "tensors_2", "tensors_0"]) == ["tensors_0", "tensors_2", "tensors_10"]


# -- without TensorRT ------------------------------------------------------------------------------------------------


def test_a_miss_is_none(tmp_path: Path) -> None:
    assert compiler(tmp_path).from_cache(QKV) is None


@no_gpu
def test_tensorrt_says_how_to_install_it() -> None:
    with pytest.raises(MissingDependency) as caught:
        load_tensorrt()
    assert caught.value.fix


@no_gpu
def test_the_stock_module_says_what_it_lacks() -> None:
    with pytest.raises(MissingDependency, match='backend="mttm" cannot be used here'):
        stock_module(nn.Linear(2, 2))


def test_a_builder_that_dies_is_a_failed_build(tmp_path: Path) -> None:
    with Builders(ARCH, CPU, 1, tmp_path / "timing.bin") as builders:
        builders._workers[0].kill()
        ticket = builders.submit(request(QKV))
        assert next(t for t in builders.finished([ticket]) if t >= 0) == ticket
        with pytest.raises(BuildFailed, match="builder process"):
            builders.result(ticket)


@no_gpu
def test_what_a_builder_cannot_do_is_a_failed_build_with_its_last_words(tmp_path: Path) -> None:
    """For real: this machine has no torch_tensorrt, or no GPU to build for."""
    with Builders(ARCH, CPU, 1, tmp_path / "timing.bin") as builders:
        ticket = builders.submit(request(QKV))
        assert next(t for t in builders.finished([ticket]) if t >= 0) == ticket
        with pytest.raises(BuildFailed, match=r"double_qkv|builder process") as caught:
            builders.result(ticket)
        assert len(str(caught.value)) > 60, "the reason is missing"
        pids = [worker.pid for worker in builders._workers]
        folder = Path(builders._folder.name)
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()


def test_leaving_kills_builders_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    with Builders(ARCH, CPU, 2, tmp_path / "timing.bin") as builders:
        tickets = [builders.submit(request(name)) for name in (QKV, OUT)]
        pids = [worker.pid for worker in builders._workers]
        assert all(alive(pid) for pid in pids)
        assert next(builders.finished(tickets)) == -1, "a poll that brings nothing lets the caller cancel"
    assert not any(alive(pid) for pid in pids)
    assert time.perf_counter() - started < 2


# -- cancelling long work --------------------------------------------------------------------------------------------


class CancelledAfter(Silent):
    """Progress whose user cancels after some questions."""

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def cancelled(self) -> bool:
        self.questions -= 1
        return self.questions < 0


def test_work_beside_the_caller_returns_raises_and_has_no_gradients() -> None:
    assert run_cancellable(lambda: (1, torch.is_grad_enabled()), Silent(), "count") == (1, False)

    def fail() -> Any:
        raise BuildFailed("broken")

    with pytest.raises(BuildFailed, match="broken"):
        run_cancellable(fail, Silent(), "count")


def nap(seconds: float, log: list[str]) -> None:
    """Python that goes on for a while, and says whether it came to its end."""
    ends = time.perf_counter() + seconds
    try:
        while time.perf_counter() < ends:
            time.sleep(0.01)
        log.append("ended")
    finally:
        log.append("left")


def test_a_cancel_stops_the_work_and_leaves_no_thread() -> None:
    """PyTorch's tracing changes `nn.Module` for all threads: it must not go on beside what runs next."""
    started, log = time.perf_counter(), []
    with pytest.raises(BuildCancelled, match="Cancelled during: nap"):
        run_cancellable(lambda: nap(5, log), CancelledAfter(2), "nap")
    assert time.perf_counter() - started < 2
    assert log == ["left"]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("trt_core")] == []


def test_ctrl_c_stops_the_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Interrupted(Silent):
        def cancelled(self) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(lambda: nap(5, log), Interrupted(), "nap")
    assert "ended" not in log
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("trt_core")] == []


def test_a_cancelled_compilation_can_be_done_again(tmp_path: Path) -> None:
    """Stopped anywhere, the compiler leaves modules as they were and compiles the next time."""
    call = torch.nn.Module.__call__
    for questions in (1, 3, 10, 30):
        made = compiler(tmp_path, progress=CancelledAfter(questions))
        with contextlib.suppress(BuildCancelled):
            made.compile(QKV, Backend.INDUCTOR, Attention.AUTO)
        assert torch.nn.Module.__call__ is call
        assert torch.nn.Linear(3, 2)(torch.zeros(1, 3)).shape == (1, 2)
    assert compiler(tmp_path).compile(QKV, Backend.INDUCTOR, Attention.AUTO) is not None


def test_eager_is_compiled_without_a_check(tmp_path: Path) -> None:
    made = compiler(tmp_path)
    assert isinstance(made.compile(QKV, Backend.EAGER, Attention.AUTO), EagerSegment)
    assert made.error_ratios == {}

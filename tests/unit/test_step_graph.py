"""When a step becomes a CUDA graph, which graph a call gets, and when graphs go: all but the capture itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import trt_core.mutable_module
from tests.unit.bound_weights import low_rank, one
from tests.unit.tiny_flux import bfl_weights, call_inputs, loaded, run, tiny_transformer
from trt_core import step_graph
from trt_core.config import Attention, Backend, CompileConfig, Layout
from trt_core.errors import OutOfMemory
from trt_core.extras import Extras
from trt_core.flux import cudnn_attention
from trt_core.flux.catalogue import BlockKind
from trt_core.plan import BlockChoice
from trt_core.step import StepInputs
from trt_core.step_graph import EAGER_CALLS, MOST_GRAPHS, USED, StepGraphs, key_of, why_not_graph

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OWNER = ("a binding", 1)
QKV = "double_blocks.1.img_attn.qkv.weight"


def inputs(img_tokens: int = 4, txt_tokens: int = 3, batch: int = 1, guidance: bool = True, **changes: Any) -> Any:
    made = StepInputs(
        torch.ones(batch, img_tokens, 8), torch.ones(batch, txt_tokens, 6), torch.ones(batch), torch.ones(batch, 5),
        torch.ones(img_tokens, 3), torch.ones(txt_tokens, 3), torch.ones(batch) if guidance else None,
    )  # fmt: skip
    return made._replace(**changes)


def choice(backend: Backend = Backend.EAGER, attention: Attention = Attention.AUTO) -> BlockChoice:
    return BlockChoice(BlockKind.DOUBLE, Layout.SPLIT, (backend, backend), attention)


class Memory:
    """In place of `GraphMemory`: graphs that compute the step and say that they did."""

    made: list[Memory]
    failure: BaseException | None

    def __init__(self, device: torch.device) -> None:
        self.bytes, self.captures, self.calls = 0, 0, []
        self.made.append(self)

    def capture(self, step: Callable[[StepInputs], Tensor], inputs: StepInputs, kept: object) -> Any:
        if self.failure is not None:
            raise self.failure
        self.captures += 1
        return lambda given: -step(given)

    def wait(self) -> None:
        self.calls.append("wait")

    def close(self) -> None:
        self.calls.append("close")


class Graphs:
    """`StepGraphs` with a step that returns the sum of the image: positive without a graph, negative from one."""

    def __init__(self) -> None:
        self.memory: Any = type("OneTestsMemory", (Memory,), {"made": [], "failure": None})
        self.graphs = StepGraphs(self.memory)
        self.step: Any = lambda given: given.img.sum()

    def __call__(self, given: StepInputs, owner: tuple[object, ...] = OWNER, why_not: str | None = None) -> bool:
        """Whether it came from a graph."""
        value = float(self.graphs.run(self.step, given, owner, [choice()], why_not))
        assert abs(value) == float(given.img.sum())
        assert (value < 0) == (self.graphs.words == USED)
        return value < 0

    def until_captured(self, given: StepInputs) -> None:
        assert [self(given) for _ in range(EAGER_CALLS + 1)] == [False] * EAGER_CALLS + [True]

    @property
    def captures(self) -> int:
        return sum(memory.captures for memory in self.memory.made)


@pytest.fixture(autouse=True)
def _no_capture_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "_FAILED", [])


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        inputs(img_tokens=5),
        inputs(txt_tokens=4),
        inputs(batch=2),
        inputs(guidance=False),
        inputs(y=torch.ones(1, 5, dtype=torch.bfloat16)),
        inputs(img_ids=torch.ones(4, 3, dtype=torch.int64)),
        inputs(img=torch.ones(1, 8, 4).transpose(1, 2)),
        inputs(timesteps=torch.ones(1, device="meta")),
    ],
    ids=["image", "text", "batch", "guidance", "dtype", "ids", "strides", "device"],
)
def test_whatever_changes_the_launches_is_in_the_key(other: StepInputs) -> None:
    assert key_of(other) != key_of(inputs())


def test_values_are_not_in_the_key() -> None:
    assert key_of(inputs(img=torch.zeros(1, 4, 8), guidance=None)._replace(guidance=torch.zeros(1))) == key_of(inputs())


def test_inference_mode_is_in_the_key() -> None:
    """Its tensors cannot be written outside of it."""
    with torch.inference_mode():
        inside = key_of(inputs())
    assert inside != key_of(inputs())


# -- whether a step can be a graph -------------------------------------------------------------------------------------


def reason(
    extras: Extras | None = None, device: torch.device = GPU, given: StepInputs | None = None,
    choices: tuple[BlockChoice, ...] = (choice(),), wanted: bool = True, watched: bool = False,
) -> str | None:  # fmt: skip
    with torch.no_grad():
        found = given or StepInputs(*(OnGpu() for _ in StepInputs._fields))
        return why_not_graph(found, extras or Extras(), device, choices, wanted=wanted, watched=watched)


class OnGpu:
    """Stands for a tensor on the GPU, which this test has none of."""

    device = GPU


def override(*arguments: Any) -> Any:
    raise AssertionError("not called")


def test_a_plain_step_on_a_gpu_can_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert reason() is None
    assert reason(Extras([], [None, None])) is None, "this adds nothing"
    assert reason(choices=(choice(Backend.INDUCTOR, Attention.FP8), choice(Backend.INDUCTOR))) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"wanted": False}, "cuda_graph=False"),
        ({"device": CPU}, "not on a GPU"),
        ({"extras": Extras([None, torch.ones(1)])}, "residuals"),
        ({"extras": Extras([], [torch.ones(1)])}, "residuals"),
        ({"extras": Extras(double_overrides={0: override})}, "blocks of somebody else"),
        ({"extras": Extras(single_overrides={0: override})}, "blocks of somebody else"),
        ({"extras": Extras(mask=torch.ones(1))}, "a mask"),
        ({"watched": True}, "static FP8"),
        ({"choices": (choice(), choice(Backend.TENSORRT))}, "TensorRT"),
        ({"given": inputs()}, "another device"),
    ],
)
def test_what_keeps_a_step_from_being_one(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert said in str(reason(**options))


def test_what_somebody_does_around_the_call_keeps_it_from_being_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FlopCounterMode(display=False):
        assert "traced" in str(reason())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert "autocast" in str(reason())
    assert reason() is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "another capture" in str(reason())
    with torch.enable_grad():
        found: Any = StepInputs(*(OnGpu() for _ in StepInputs._fields))
        assert "gradients" in str(why_not_graph(found, Extras(), GPU, (), wanted=True, watched=False))


# -- which graph a call gets -------------------------------------------------------------------------------------------


def test_a_size_is_captured_at_its_third_call(graphs: Graphs) -> None:
    assert not graphs(inputs(img_tokens=9)), "used once"
    graphs.until_captured(inputs())
    graphs.until_captured(inputs(batch=2))
    assert graphs(inputs(img=torch.full((1, 4, 8), 7.0))), "other values"
    assert graphs.captures == 2
    assert len(graphs.memory.made) == 1, "all graphs share one pool"


def test_a_step_that_cannot_be_one_does_not_count_and_takes_no_graph_away(graphs: Graphs) -> None:
    for _ in range(EAGER_CALLS + 1):
        assert not graphs(inputs(), why_not="residuals")
    assert graphs.graphs.words == "no cuda graph: residuals"
    graphs.until_captured(inputs())
    assert not graphs(inputs(), why_not="residuals")
    assert graphs(inputs())
    assert graphs.captures == 1


@pytest.mark.parametrize("other", [("another binding", 1), ("a binding", 2)], ids=["bound", "built"])
def test_what_is_bound_or_compiled_anew_takes_all_graphs_away(other: tuple[object, ...], graphs: Graphs) -> None:
    graphs.until_captured(inputs())
    graphs.until_captured(inputs(batch=2))
    assert not graphs(inputs(), other)
    assert graphs.memory.made[0].calls == ["wait", "close"]
    assert [graphs(inputs(), other) for _ in range(EAGER_CALLS)] == [False, True]


def test_the_size_not_used_for_longest_goes_first(graphs: Graphs) -> None:
    sizes = [inputs(img_tokens=4 + n) for n in range(MOST_GRAPHS + 1)]
    for given in sizes[:-1]:
        graphs.until_captured(given)
    assert graphs(sizes[0])
    graphs.until_captured(sizes[-1])
    before = graphs.captures
    assert all(graphs(given) for given in (sizes[0], *sizes[2:]))
    assert graphs.captures == before
    assert graphs(sizes[1]), "captured again at once: it has run often enough"
    assert graphs.captures == before + 1


def test_dropping_says_whether_there_was_anything(graphs: Graphs) -> None:
    assert not graphs.graphs.drop()
    graphs.until_captured(inputs())
    assert graphs.graphs.drop()
    assert not graphs.graphs.drop()
    graphs.until_captured(inputs())


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("no room"), RuntimeError("not permitted\nmore")], ids=repr)
def test_after_a_capture_that_fails_there_are_none_in_this_process(
    failure: RuntimeError, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    graphs.until_captured(inputs(batch=2))
    graphs.memory.failure = failure
    assert not any(graphs(inputs()) for _ in range(EAGER_CALLS + 4))
    first_line = str(failure).splitlines()[0]
    assert graphs.graphs.words == f"no cuda graph: a capture failed: {first_line}"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"steps run without CUDA graphs from now on: a capture failed: {first_line}"
    ]
    graphs.memory.failure = None
    assert graphs.memory.made[0].calls[-2:] == ["wait", "close"], "graphs from before are gone, too"
    assert not any(graphs(inputs(batch=2)) for _ in range(EAGER_CALLS + 2))
    assert not any(graphs(inputs(), ("another binding", 1)) for _ in range(EAGER_CALLS + 2))
    assert graphs.captures == 1


def test_other_errors_of_a_capture_are_not_hidden(graphs: Graphs) -> None:
    graphs.memory.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        graphs.until_captured(inputs())


def test_graphs_go_when_a_step_needs_their_memory(graphs: Graphs) -> None:
    graphs.until_captured(inputs())
    left = [torch.OutOfMemoryError("first")]

    def short_of_memory(given: StepInputs) -> Tensor:
        if left:
            raise left.pop()
        return given.img.sum()

    graphs.step = short_of_memory
    assert not graphs(inputs(batch=2))
    assert graphs.memory.made[0].calls == ["wait", "close"]
    left.append(torch.OutOfMemoryError("nothing to give"))
    with pytest.raises(torch.OutOfMemoryError, match="nothing to give"):
        graphs(inputs(batch=2))


def test_a_graph_keeps_what_cudnns_attention_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudnn_attention` forgets sizes not called for long, and a replay is no call of it."""
    asked: list[dict[str, Any]] = []
    signature, kept = inspect.signature(cudnn_attention.graph_of), []
    monkeypatch.setattr(
        cudnn_attention, "graph_of", lambda *given: asked.append(signature.bind(*given).arguments) or "it"
    )
    graphs = Graphs()
    monkeypatch.setattr(graphs.memory, "capture", lambda memory, step, given, used: kept.append(used) or step)
    step: Any = SimpleNamespace(arch=SimpleNamespace(heads=3, head_dim=16))
    for attention in (Attention.CUDNN, Attention.FP8):
        found = inputs(img_tokens=4, txt_tokens=3, batch=2)
        graphs.graphs._capture(attention, step, found, [choice(), choice(Backend.INDUCTOR, attention)])
    assert kept == [None, "it"]
    assert [list(call.values())[1:] for call in asked] == [[2, 7, 3, 16]]
    assert list(asked[0]) == ["device_index", "batch", "tokens", "heads", "dim"]


# -- the module --------------------------------------------------------------------------------------------------------

MODEL = tiny_transformer()


@pytest.fixture
def eligible(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module on the CPU takes its steps for eligible, and its graphs are the fake's."""
    made: Any = type("OneTestsMemory", (Memory,), {"made": [], "failure": None})
    monkeypatch.setattr(trt_core.mutable_module, "why_not_graph", lambda *_, wanted, **__: None if wanted else "off")
    monkeypatch.setattr(trt_core.mutable_module, "StepGraphs", lambda: StepGraphs(made))
    return made


def captured(cache: Path) -> Any:
    module = loaded(bfl_weights(MODEL), cache)
    for _ in range(EAGER_CALLS + 1):
        run(module, call_inputs(MODEL))
    assert module.report().step == USED
    return module


def test_a_refit_keeps_the_graph(eligible: Any, tmp_path: Path) -> None:
    module = captured(tmp_path)
    before = run(module, call_inputs(MODEL))
    for seed in (1, 2):
        module.refit(one(QKV, low_rank((192, 64), 4, torch.Generator().manual_seed(seed))))
        assert not torch.equal(run(module, call_inputs(MODEL)), before)
        assert module.report().step == USED
    module.refit({})
    assert torch.equal(run(module, call_inputs(MODEL)), before)
    assert [memory.captures for memory in eligible.made] == [1]


@pytest.mark.parametrize("what", ["load", "unload", "close", "discard", "reconfigure"])
def test_graphs_go_with_what_they_are_of(what: str, eligible: Any, tmp_path: Path) -> None:
    module = captured(tmp_path)
    arguments = {"load": (bfl_weights(MODEL),), "reconfigure": (replace(module.config, attention=Attention.MATH),)}
    getattr(module, what)(*arguments.get(what, ()))
    assert eligible.made[0].calls == ["wait", "close"]
    if what in ("load", "reconfigure"):
        run(module, call_inputs(MODEL))
        assert module.report().step != USED


def test_a_refit_without_memory_takes_the_graphs(
    eligible: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = captured(tmp_path)
    patches = one(QKV, low_rank((192, 64), 4, torch.Generator().manual_seed(1)))
    real, left = module.weights.refit, [OutOfMemory("first"), OutOfMemory("second")]

    def refit(new: Any, *meanwhile: Any) -> Any:
        if len(left) > 1:
            raise left.pop(0)
        return real(new, *meanwhile)

    monkeypatch.setattr(module.weights, "refit", refit)
    assert module.refit(patches) is not None
    assert eligible.made[0].calls == ["wait", "close"]
    left.append(OutOfMemory("there is nothing to give"))
    with pytest.raises(OutOfMemory, match="second"):
        module.refit({})


def test_the_option_switches_it_off(eligible: Any, tmp_path: Path) -> None:
    module = loaded(bfl_weights(MODEL), tmp_path, cuda_graph=False)
    for _ in range(EAGER_CALLS + 2):
        run(module, call_inputs(MODEL))
    assert module.report().step == "no cuda graph: off"
    assert CompileConfig().cuda_graph


def test_a_module_on_the_cpu_says_why(tmp_path: Path) -> None:
    module = loaded(bfl_weights(MODEL), tmp_path)
    assert module.report().step == ""
    run(module, call_inputs(MODEL))
    assert module.report().step == "no cuda graph: the model is not on a GPU"

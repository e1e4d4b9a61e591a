"""PyTorch's compiler is imported beside other work: when, what for, and what may run meanwhile."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_backends import compiler
from tests.unit.test_plan_search import search
from trt_core import plan_search
from trt_core.backends import compiler as compiler_module
from trt_core.backends import inductor, torch_compiler
from trt_core.backends.check import Expected
from trt_core.config import Attention, Backend
from trt_core.flux.catalogue import SegmentName

WAIT_SECONDS = 30

BESIDE_THE_IMPORT = """
import sys, torch
from pathlib import Path
from trt_core import low_rank_merge
from trt_core.backends.check import Expected
from trt_core.backends.compiler import SegmentCompiler
from trt_core.config import Attention, CompileConfig, Profile
from trt_core.engine_cache import EngineCache
from trt_core.flux.architecture import FluxArchitecture
from trt_core.flux.catalogue import BlockKind, SegmentName
from trt_core.flux.precision import Precision
from trt_core.host import Silent
from trt_core.plan_search import PlanSearch

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
arch = FluxArchitecture(64, 2, 1, 1, 64, 64, 40, 24, 256, True, (4, 14, 14))
fp8 = Precision(frozenset({"img_mlp.0", "linear2"}))
for precisions in ({}, dict.fromkeys(BlockKind, fp8)):
    asked = SegmentCompiler(arch, torch.bfloat16, device, Profile.around(1, 40, 7), EngineCache(Path(sys.argv[1])), 1.5,
                            Silent(), precisions)
    for name in (SegmentName.DOUBLE_BLOCK, SegmentName.SINGLE_BLOCK):
        Expected.of(asked.request(name, Attention.AUTO))
    PlanSearch(asked, CompileConfig(), None).store.remembered()
low_rank_merge.prepare(device, torch.bfloat16, True, Silent())
print(*(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "torch._functorch.aot"))))
"""


def test_what_runs_beside_the_import_imports_nothing_of_the_compiler(tmp_path: Path) -> None:
    """Two threads in modules that import each other in circles: one would see some that are not complete."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", BESIDE_THE_IMPORT, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.fixture
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compiler, "_threads", [])


class Importing:
    """Stands in for importlib: imports wait until `go`, and are noted."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.names, self.error = threading.Event(), [], error
        self.util = types.SimpleNamespace(find_spec=lambda name: None)

    def import_module(self, name: str) -> None:
        assert self.go.wait(WAIT_SECONDS)
        self.names.append(name)
        if self.error is not None:
            raise self.error


@pytest.mark.usefixtures("nothing_imported")
def test_it_is_imported_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    importing, waited = Importing(), threading.Event()
    monkeypatch.setattr(torch_compiler, "importlib", importing)
    torch_compiler.wait_until_imported()  # nothing was begun
    torch_compiler.import_ahead()
    torch_compiler.import_ahead()
    waiting = threading.Thread(target=lambda: (torch_compiler.wait_until_imported(), waited.set()))
    waiting.start()
    assert not waited.wait(0.1), "the import has not ended"
    assert not importing.names
    importing.go.set()
    assert waited.wait(WAIT_SECONDS)
    assert tuple(importing.names) == torch_compiler.MODULES


@pytest.mark.usefixtures("nothing_imported")
def test_an_import_that_fails_is_left_to_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = Importing(ImportError("broken"))
    importing.go.set()
    monkeypatch.setattr(torch_compiler, "importlib", importing)
    torch_compiler.import_ahead()
    torch_compiler.wait_until_imported()
    assert tuple(importing.names) == torch_compiler.MODULES


def test_the_modules_are_those_of_this_pytorch() -> None:
    for name in torch_compiler.MODULES:
        importlib.import_module(name)


@pytest.mark.parametrize("where", ["triton.runtime.cache", "triton.compiler.compiler"])
def test_triton_is_hashed_where_it_keeps_its_hash(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    hashed: list[str] = []
    modules = {name: types.ModuleType(name) for name in ("triton.runtime.cache", "triton.compiler.compiler")}
    modules[where].triton_key = lambda: hashed.append(where)  # type: ignore[attr-defined]
    found = types.SimpleNamespace(find_spec=lambda name: name)
    stand_in = types.SimpleNamespace(util=found, import_module=modules.__getitem__)
    monkeypatch.setattr(torch_compiler, "importlib", stand_in)
    torch_compiler._hash_triton()
    assert hashed == [where]


def test_a_segment_is_made_when_it_is_imported_and_after_what_it_is_checked_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Noted(Expected):
        @classmethod
        def of(cls, request: Any) -> Expected:
            order.append("expected")
            return Expected.of(request)

    monkeypatch.setattr(compiler_module, "Expected", Noted)
    monkeypatch.setattr(inductor, "wait_until_imported", lambda: order.append("imported"))
    monkeypatch.setattr(inductor, "load_kernels", lambda: order.append("kernels"))
    compiler(tmp_path).compile(SegmentName.SINGLE_OUT, Backend.INDUCTOR, Attention.AUTO).close()
    assert order == ["expected", "imported", "kernels"]


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(torch_compiler, "import_ahead", lambda: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("backend", "imports"), [(Backend.INDUCTOR, True), (Backend.EAGER, False), (Backend.AUTO, False)]
)
def test_without_a_plan_it_is_imported_where_inductor_may_be_chosen(
    tmp_path: Path, begun: list[int], backend: Backend, imports: bool
) -> None:
    """On the CPU `auto` is eager."""
    search(tmp_path, backend).import_ahead()
    assert bool(begun) is imports


def test_auto_on_a_gpu_imports_it_unless_inductor_cannot_be_used(
    tmp_path: Path, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = search(tmp_path)
    monkeypatch.setattr(type(found.store), "remembered", lambda self: None)
    found.compiler.device = types.SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(plan_search, "why_not_inductor", lambda device: "no Triton")
    found.import_ahead()
    assert not begun
    monkeypatch.setattr(plan_search, "why_not_inductor", lambda device: None)
    found.import_ahead()
    assert begun


@pytest.mark.parametrize(("backend", "imports"), [(Backend.INDUCTOR, True), (Backend.TENSORRT, False)])
def test_a_plan_says_whether_it_is_needed(
    tmp_path: Path, begun: list[int], monkeypatch: pytest.MonkeyPatch, backend: Backend, imports: bool
) -> None:
    """A call that only loads TensorRT's engines must not wait for an import, nor have its memory."""
    found = search(tmp_path)
    needed = [(SegmentName.DOUBLE_BLOCK, backend, Attention.AUTO)]
    plan = types.SimpleNamespace(needed=lambda: needed)
    monkeypatch.setattr(type(found.store), "remembered", lambda self: plan)
    monkeypatch.setattr(plan_search, "why_not_inductor", lambda device: None)
    found.import_ahead()
    assert bool(begun) is imports


def test_nothing_is_timed_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rank = plan_search.rank_attention
    monkeypatch.setattr(torch_compiler, "wait_until_imported", lambda: order.append("imported"))
    monkeypatch.setattr(plan_search, "rank_attention", lambda *args: (order.append("timed"), rank(*args))[1])
    search(tmp_path, Backend.EAGER).run()
    assert order == ["imported", "timed"]

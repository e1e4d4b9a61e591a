"""Code that is kept: what it saves a new process, what is not kept, and what is not read."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.unit.kept_code import KEY, NAME, graphs, inputs, with_code_in
from tests.unit.tiny_flux import bfl_weights, call_inputs, loaded, run, tiny_transformer
from trt_core.backends import inductor_code
from trt_core.backends.inductor import InductorSegment
from trt_core.code_signature import signed
from trt_core.config import Backend
from trt_core.engine_cache import EngineCache
from trt_core.engine_manifest import CODE_KIND
from trt_core.errors import BuildFailed

RATIO = 0.75
SMALL = {"double": 1, "single": 1, "head_dim": 16}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def compiled_and_kept(folder: Path, *batches: int) -> InductorSegment:
    made = with_code_in(folder)
    assert made.read() is None
    made(*inputs(batches[0]))
    made.keep(RATIO)
    for batch in batches[1:]:
        made(*inputs(batch))
    return made


class Kept(NamedTuple):
    """A cache with the code for one picture and for several, and what it computes for them."""

    folder: Path
    outputs: dict[int, list[Tensor]]
    plan_bytes: int

    def copied(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder / "cache"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("cache")
    with torch.no_grad():
        made = compiled_and_kept(folder, 1, 2)
        return Kept(folder, {batch: list(made(*inputs(batch))) for batch in (1, 2, 3)}, made.plan_bytes)


def files(folder: Path) -> list[str]:
    entry = EngineCache(folder).get(KEY)
    return sorted(entry.manifest.payloads) if entry else []


def test_the_same_bits_without_tracing(kept: Kept) -> None:
    assert files(kept.folder) == ["code_000.bin", "code_001.bin"]
    before, again = graphs(), with_code_in(kept.folder)
    assert again.read() == RATIO
    for batch in (2, 1, 3):
        for seen, expected in zip(again(*inputs(batch)), kept.outputs[batch], strict=True):
            assert torch.equal(seen, expected)
    assert graphs() == before
    stored = sum(path.stat().st_size for path in kept.folder.rglob("code_*"))
    assert again.plan_bytes == kept.plan_bytes == stored > 0


def test_in_a_new_process(kept: Kept, tmp_path: Path) -> None:
    """Also where Inductor's own cache, which is a temporary folder, is gone."""
    command = [sys.executable, "-m", "tests.unit.kept_code", str(kept.folder)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    sums = [float(out.double().sum()) for batch in (1, 2) for out in kept.outputs[batch]]
    assert json.loads(done.stdout) == {"ratio": RATIO, "sums": sums, "graphs": 0}


def test_what_was_not_checked_is_not_kept(tmp_path: Path) -> None:
    made = with_code_in(tmp_path)
    made(*inputs())
    assert files(tmp_path) == []
    made.keep(RATIO)
    assert files(tmp_path) == ["code_000.bin"]


def test_what_is_added_later_is_checked_as_well(tmp_path: Path) -> None:
    """No error is as small as this bound, so that good code stands for bad."""
    made = with_code_in(tmp_path, bound=1e-9)
    made(*inputs())
    made.keep(RATIO)
    for _ in range(2):
        with pytest.raises(BuildFailed, match=r"single_block for batch 2 has .* times eager PyTorch's error.*eager"):
            made(*inputs(2))
    assert files(tmp_path) == ["code_000.bin"]


@pytest.mark.parametrize(
    ("data", "signed_for", "why"),
    [
        (b"no pickle", None, "not written by this user's own processes"),
        (b"no pickle", "code_001.bin", "not written by this user's own processes"),
        (b"no pickle", "code_000.bin", "invalid load key"),
        (b"", "code_000.bin", "Ran out of input"),
    ],
    ids=["foreign", "of another place", "no pickle", "empty"],
)
def test_what_cannot_be_read_is_left_alone(
    kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, signed_for: str | None, why: str
) -> None:
    folder = kept.copied(tmp_path)
    marked = data if signed_for is None else signed(data, f"{KEY.digest}/{signed_for}")
    EngineCache(folder).update(KEY, "code_000.bin", marked)
    assert with_code_in(folder).read() is None
    assert f"The cached code of {NAME.value} is compiled again: " in caplog.text
    assert why in caplog.text


def test_another_users_code_is_compiled_again_and_never_opened(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept.copied(tmp_path)
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "somebody else"))
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "load_compiled_function", lambda file: pytest.fail("opened"))
        again = compiled_and_kept(folder, 1)
    assert torch.equal(again(*inputs())[0], kept.outputs[1][0])
    assert files(folder) == ["code_000.bin"], "what the other user had is replaced"
    assert with_code_in(folder).read() == RATIO


def test_inductors_options_are_part_of_the_key() -> None:
    fields = {"segment": NAME.value}
    assert inductor_code.code_key(fields) == KEY
    with torch._inductor.config.patch(coordinate_descent_tuning=True):
        assert inductor_code.code_key(fields).digest != KEY.digest
    with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
        other = inductor_code.code_key(fields)
    with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert inductor_code.code_key(fields) == other, "a function's address is no option"


def test_where_nothing_can_be_kept_it_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "file"))
    expected = compiled_and_kept(tmp_path / "cache", 1)
    assert f"The code of {NAME.value} works but is not kept: This user's key" in caplog.text
    assert torch.isfinite(expected(*inputs())[0]).all()
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0a0+git", "nightly"])
def test_versions_that_were_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """They compile as `torch.compile` does: once for one picture, once for several, in each process."""
    monkeypatch.setattr(torch, "__version__", version)
    assert inductor_code.why_not_ahead() == f"PyTorch {version} was not tried"
    caplog.set_level(logging.INFO, logger="trt_core.build")
    expected, before = compiled_and_kept(tmp_path, 1), graphs()
    assert f"{NAME.value} is compiled in each process: PyTorch {version} was not tried" in caplog.text
    assert files(tmp_path) == []
    for batch, new in ((1, 0), (2, 1), (3, 1)):
        assert torch.isfinite(expected(*inputs(batch))[0]).all()
        assert graphs() == before + new


def test_without_pytorchs_caches(tmp_path: Path) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        assert inductor_code.why_not_ahead() == "PyTorch's caches are switched off"
        compiled_and_kept(tmp_path, 1)
    assert files(tmp_path) == []


def test_a_module_finds_its_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error that was measured when they were stored is still the bound's to judge."""
    caplog.set_level(logging.INFO, logger="trt_core.build")
    model = tiny_transformer(**SMALL, adversarial=True)
    weights, arguments = bfl_weights(model), call_inputs(model)
    first = loaded(weights, tmp_path, Backend.INDUCTOR)
    expected, before = run(first, arguments), graphs()
    again = loaded(weights, tmp_path, Backend.INDUCTOR)
    assert torch.equal(run(again, arguments), expected)
    assert graphs() == before
    ratios = [{m.what: m.error_ratio for m in module.report().measurements} for module in (first, again)]
    assert ratios[0] == ratios[1]
    assert again.report().plan_bytes == first.report().plan_bytes > 0
    said = [text for text in caplog.messages if text.startswith("Inductor's double_block")]
    assert ["compiled" in text for text in said] == [True, False]
    assert "double_block read from the cache: " in said[1]
    assert re.fullmatch(r".*: \d+\.\d\d s, \d+\.\d MB, \d\.\d\d times eager PyTorch's error", said[1])
    kinds = [entry.manifest.kind for entry in EngineCache(tmp_path).entries()]
    assert kinds.count(CODE_KIND) == 2
    with pytest.raises(BuildFailed, match=r"inductor's double_block has .* times eager PyTorch's error"):
        run(loaded(weights, tmp_path, Backend.INDUCTOR, error_ratio_bound=1e-9), arguments)


def test_what_cannot_be_kept_says_why() -> None:
    """Guards on an object that no file can hold; and a function that was not made ready for it."""
    factor = SimpleNamespace(value=2.0, lock=threading.Lock())
    with torch._dynamo.config.patch(enable_aot_compile=True):
        scaled = torch.compile(lambda x: x * factor.value, fullgraph=True)
    with pytest.raises(inductor_code.NotAheadError, match=r"cannot keep its guards \(.*pickle"):
        inductor_code.compile_ahead(scaled, [torch.ones(2)])
    assert torch.equal(scaled(torch.ones(2)), torch.full((2,), 2.0)), "it compiles all the same"
    with pytest.raises(inductor_code.NotAheadError, match="does not offer it"):
        inductor_code.compile_ahead(torch.nn.functional.relu, [torch.ones(2)])

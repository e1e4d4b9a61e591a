"""Inductor's code of one segment in the engine cache: a new process neither traces nor lowers the segment again.

Measured on H200s, FLUX.1-dev, a first call with everything cached: 4.2 s in bf16 and 5.2 s in FP8 from Inductor's own
cache, which still has to be asked by tracing; 2.7 to 2.9 and 2.3 to 4.1 s with kept code. And Inductor's own is in the
system's temporary folder, which many systems empty when they start.

The format is PyTorch's (`torch.compiler.load_compiled_function`), which calls it experimental: it is used with the
versions that were tried. It is a pickle, the only one in this project: what is loaded carries the mark of this user's
own processes (`code_signature`), and bundles leave it out.
"""

from __future__ import annotations

import importlib
import io
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..code_signature import checked, signed
from ..engine_cache import EngineCache, EngineKey
from ..engine_entry import Entry
from ..engine_manifest import CODE_KIND, sha256
from ..errors import CacheError, first_line

_LOG = logging.getLogger("trt_core.build")
_OLDEST, _NEWEST = (2, 11), (2, 13)
"""PyTorch 2.11 (GPU) and 2.13 (CPU) were tried."""
_RATIO = "error_ratio"
_UNREADABLE = (
    pickle.PickleError, ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What pickle and PyTorch's format raise for what they cannot read or write."""


class NotAheadError(Exception):
    """A graph that PyTorch compiles but cannot write to a file."""


class Code(Protocol):
    """A segment compiled for what its guards ask of the inputs: dtypes, strides, sizes that do not vary, batch 1."""

    fn: Callable[..., tuple[Tensor, ...]]

    def guard_check(self, *tensors: Tensor) -> bool: ...


@dataclass(frozen=True, slots=True)
class CompiledAtCalls:
    """A function that `torch.compile` compiles, and compiles again, when calls need it: takes any inputs."""

    compiled: Callable[..., tuple[Tensor, ...]]
    dynamic: Sequence[tuple[int, int]]
    failing_by_name: Callable[[], AbstractContextManager[None]]
    seen: set[tuple[int, ...]] = field(default_factory=set)

    def guard_check(self, *_: Tensor) -> bool:
        return True

    def fn(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(tensors[0].shape)
        if shape in self.seen:
            return self.compiled(*tensors)
        mark_dynamic(tensors, self.dynamic)
        with self.failing_by_name():
            out = self.compiled(*tensors)
        self.seen.add(shape)
        return out


def mark_dynamic(tensors: Sequence[Tensor], dynamic: Sequence[tuple[int, int]]) -> None:
    """Marks sizes, as (index of the tensor, dimension), that vary from call to call, unless they are 1."""
    for index, dim in dynamic:
        if tensors[index].shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensors[index], dim)


def why_not_ahead() -> str | None:
    """The reason why this PyTorch does not compile ahead of calls, so that code could be kept, or None."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = tuple(int(number) for number in found.groups()) if found else (0, 0)
    if not _OLDEST <= version <= _NEWEST:
        return f"PyTorch {torch.__version__} was not tried"
    config = importlib.import_module("torch._inductor.config")
    return "PyTorch's caches are switched off" if config.force_disable_caches else None


def compile_ahead(compiled: Any, tensors: Sequence[Tensor]) -> Code:
    """The code for inputs like `tensors`; `compiled`: what `torch.compile` returned. Raises `NotAheadError`."""
    if not hasattr(compiled, "aot_compile"):
        raise NotAheadError(f"PyTorch {torch.__version__} does not offer it")
    bypass = importlib.import_module("torch._functorch._aot_autograd.autograd_cache").BypassAOTAutogradCache
    try:
        return cast(Code, compiled.aot_compile((tuple(tensors), {})))
    except bypass as error:
        raise NotAheadError(f"PyTorch cannot keep its graph ({first_line(error)})") from error
    except (torch._dynamo.exc.PackageError, pickle.PickleError, TypeError) as error:  # TypeError: pickle's own, too
        raise NotAheadError(f"PyTorch cannot keep its guards ({first_line(error)})") from error


@dataclass(slots=True)
class KeptCode:
    """The codes of one segment, in the order in which they were compiled."""

    cache: EngineCache
    key: EngineKey
    segment: str
    error_ratio_bound: float
    """For codes that are added later."""
    error_ratio: float | None = None
    """Of the stored code, as it was checked when it was stored; None: nothing is stored."""
    size_bytes: int = 0

    def read(self) -> Iterator[Code]:
        """Each stored code, loaded when it is asked for; ends early, with a warning, at one that cannot be read."""
        entry = self.cache.get(self.key)
        if entry is None or not isinstance(entry.info.get(_RATIO), float):
            return iter(())
        self.error_ratio, self.size_bytes = entry.info[_RATIO], entry.size_bytes
        return self._loaded(entry)

    def _loaded(self, entry: Entry) -> Iterator[Code]:
        for name in sorted(entry.manifest.payloads):
            try:
                data = checked(entry.read(name), self._purpose(name))
                code = cast(Code, torch.compiler.load_compiled_function(io.BytesIO(data)))
            except (CacheError, *_UNREADABLE) as error:
                _LOG.warning("The cached code of %s is compiled again: %s", self.segment, first_line(error))
                return
            yield code

    def store(self, codes: Sequence[Code], error_ratio: float) -> None:
        """Puts `codes`, which were checked, in place of what was stored."""
        self.error_ratio = error_ratio
        with self._kept_or_said():
            files = {name: self._bytes_of(code, name) for code, name in zip(codes, _file_names(), strict=False)}
            info = {"segment": self.segment, _RATIO: error_ratio}
            self.size_bytes = self.cache.put(self.key, files, info).size_bytes

    def add(self, code: Code) -> None:
        """One more code beside those that are stored, for inputs that these do not take."""
        with self._kept_or_said():
            entry = self.cache.get(self.key)
            if entry is not None:
                name = next(name for name in _file_names() if name not in entry)
                self.size_bytes = self.cache.update(self.key, name, self._bytes_of(code, name)).size_bytes

    def _bytes_of(self, code: Code, name: str) -> bytes:
        return signed(type(code).serialize(code).serialized_data, self._purpose(name))  # type: ignore[attr-defined]

    def _purpose(self, name: str) -> str:
        return f"{self.key.digest}/{name}"

    @contextmanager
    def _kept_or_said(self) -> Iterator[None]:
        try:
            yield
        except (CacheError, *_UNREADABLE) as error:
            _LOG.warning("The code of %s works but is not kept: %s", self.segment, first_line(error))


def code_key(fields: dict[str, Any]) -> EngineKey:
    """The key of a segment's code; `fields` say what the segment is.

    The code holds Python's own, too, and calls operators of ours by names that begin with this package's: as a library
    and as a ComfyUI pack it has different ones.
    """
    versions = {"python": sys.version, "torch_git": str(torch.version.git_version), "package": __package__}
    return EngineKey(CODE_KIND, {**fields, **versions, "inductor_options": _options()})


def _options() -> str:
    """A digest of Inductor's options that are plain values. A function among them has another text in each process."""
    config = importlib.import_module("torch._inductor.config").get_config_copy()
    plain = sorted((name, repr(value)) for name, value in config.items() if _is_plain(value))
    return sha256(repr(plain).encode())[:16]


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _file_names() -> Iterator[str]:
    """In the order in which `sorted` has them."""
    return (f"code_{index:03d}.bin" for index in range(1000))

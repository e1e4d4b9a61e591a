"""Compiles one segment at a time: from the engine cache where it is there, checked against PyTorch before use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..background import Stopwatch, run_cancellable
from ..config import Attention, Backend, Profile
from ..engine_cache import EngineCache, EngineKey
from ..errors import BuildFailed, CacheError
from ..flux.architecture import FluxArchitecture
from ..flux.attention import attend, attention_function, beside_attention
from ..flux.catalogue import SPLIT_SEGMENTS, BlockKind, SegmentName, segment, source_version
from ..flux.precision import PLAIN, Precision
from ..host import Progress
from . import tensorrt_api
from .base import CompiledSegment, Request
from .check import bounded, check
from .eager import EagerSegment
from .inductor import InductorSegment
from .inductor_code import KeptCode, code_key
from .products import products_milliseconds
from .tensorrt import Scratch, TensorRTSegment
from .tensorrt_worker import describe

_LOG = logging.getLogger("trt_core.build")
_PLAN_FILE, _RUNTIME_CACHE_FILE = "engine.trt", "runtime_cache.bin"


@functools.cache
def tensorrt_runtime() -> Any:
    """TensorRT's runtime, one for the process as TensorRT wants it."""
    trt = tensorrt_api.load_tensorrt()
    return trt.Runtime(tensorrt_api.new_logger(trt))


@dataclass(slots=True)
class SegmentCompiler:
    """Compiles segments of one architecture, dtype, device and profile, and keeps TensorRT's plans in the cache."""

    arch: FluxArchitecture
    dtype: torch.dtype
    device: torch.device
    profile: Profile
    cache: EngineCache
    error_ratio_bound: float
    progress: Progress
    precisions: Mapping[BlockKind, Precision] = field(default_factory=dict)
    """Of each kind of block; one that is missing is the model's dtype."""
    samples: Mapping[BlockKind, tuple[Sequence[Tensor], Sequence[Tensor]]] = field(default_factory=dict)
    """Weights of one block of each kind, before and after attention, to measure with; else random ones are made."""
    wide: frozenset[BlockKind] = frozenset()
    """Kinds of blocks whose FP8 products Inductor and eager PyTorch do in the model's dtype."""
    scratch: Scratch = field(init=False)
    error_ratios: dict[tuple[SegmentName, Backend], float] = field(default_factory=dict)
    build_seconds: dict[tuple[SegmentName, Backend], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.device)

    def request(self, name: SegmentName, attention: Attention | None = None) -> Request:
        """`attention` None: PyTorch's general attention, which TensorRT turns into its own."""
        function = attend if attention is None else attention_function(attention)
        precision = self.precision(name)
        reference = segment(name, self.arch, attend, precision).function
        wide = attention is not None and name.kind in self.wide and bool(precision.fp8)
        beside = None if attention is None else beside_attention(attention)
        found = segment(name, self.arch, function, replace(precision, wide=wide), beside)
        return Request(found, self.dtype, self.device, self.profile, reference, precision, self._sample(name))

    def precision(self, name: SegmentName) -> Precision:
        return self.precisions.get(name.kind, PLAIN)

    def inputs(self, name: SegmentName, attention: Attention | None) -> list[Tensor]:
        """Inputs of the segment at the profile's optimum, for measuring."""
        opt, request = self.profile, self.request(name, attention)
        return request.segment.random_inputs(
            opt.batch.opt, opt.img_tokens.opt, opt.txt_tokens.opt, self.dtype, self.device, weights=request.weights
        )

    def _sample(self, name: SegmentName) -> Sequence[Tensor]:
        sample, halves = self.samples.get(name.kind), SPLIT_SEGMENTS[name.kind]
        if sample is None:
            return ()
        return sample[halves.index(name)] if name in halves else (*sample[0], *sample[1])

    def timing_cache(self) -> Path:
        """A file for TensorRT's tactic timings, one per GPU: Torch-TensorRT's default is one for all GPUs."""
        return self.cache.folder / f"timing_{torch.cuda.get_device_name(self.device).replace(' ', '_')}.bin"

    def compile(self, name: SegmentName, backend: Backend, attention: Attention) -> CompiledSegment:
        """An Inductor or eager segment, checked. TensorRT plans are built by `Builders` and come in by `from_plan`."""
        if backend is Backend.EAGER:
            return EagerSegment(self.request(name, attention))
        watch = Stopwatch()
        request = self.request(name, attention)
        key = self._code_key(request, attention)
        compiled = InductorSegment(request, KeptCode(self.cache, key, name.value, self.error_ratio_bound))
        read = compiled.read()
        ratio = self._checked(compiled, request) if read is None else self._bounded(read, name)
        self._note(name, backend, ratio, watch.seconds())
        how = "compiled" if read is None else "read from the cache"
        about = (name.value, how, watch.seconds(), compiled.plan_bytes / 1e6, ratio)
        _LOG.info("Inductor's %s %s: %.2f s, %.1f MB, %.2f times eager PyTorch's error", *about)
        return compiled

    def _checked(self, compiled: InductorSegment, request: Request) -> float:
        """The segment's error ratio, after which its code is kept."""
        stage = f"Inductor compiles {request.segment.name.value}"
        ratio = run_cancellable(lambda: check(compiled, request, self.error_ratio_bound), self.progress, stage)
        compiled.keep(ratio)
        return ratio

    def _bounded(self, ratio: float, name: SegmentName) -> float:
        """The error ratio of code from the cache, as it was before it was stored: same bytes, same numbers."""
        return bounded(ratio, self.error_ratio_bound, f"{Backend.INDUCTOR.value}'s {name.value}")

    def products_milliseconds(self, name: SegmentName) -> float:
        """What the segment's matrix products alone take at the profile's optimum; 0 where that is not known.

        That is where FP8 weights are widened first, because that is faster here than multiplying in FP8.
        """
        if name.kind in self.wide:
            return 0.0
        return products_milliseconds(self.request(name), self.inputs(name, None))

    def from_cache(self, name: SegmentName) -> TensorRTSegment | None:
        """The TensorRT segment whose engine is cached, checked; None on a miss or where the engine is bad."""
        entry = self.cache.get(self._key(name))
        if entry is None:
            return None
        watch = Stopwatch()
        try:
            runtime_cache = entry.read(_RUNTIME_CACHE_FILE) if _RUNTIME_CACHE_FILE in entry else None
            return self._load(name, entry.read(_PLAN_FILE), runtime_cache, watch)
        except (BuildFailed, CacheError) as error:
            _LOG.warning("The cached engine of %s is built again: %s", name.value, error)
            return None

    def from_plan(self, name: SegmentName, plan: bytes) -> TensorRTSegment:
        """The TensorRT segment of a new plan: checked first, then stored. Raises `BuildFailed` for a bad one."""
        compiled = self._load(name, plan, None, Stopwatch())
        files = {_PLAN_FILE: plan}
        if runtime_cache := compiled.runtime_cache():
            files[_RUNTIME_CACHE_FILE] = runtime_cache
        info = {
            "segment": name.value,
            "img_tokens": f"{self.profile.img_tokens.min}-{self.profile.img_tokens.max}",
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        try:
            self.cache.put(self._key(name), files, info)
        except CacheError as error:
            _LOG.warning("The engine of %s works but is not kept: %s", name.value, error)
        return compiled

    def _load(self, name: SegmentName, plan: bytes, runtime_cache: bytes | None, watch: Stopwatch) -> TensorRTSegment:
        request = self.request(name)
        compiled = TensorRTSegment(request, plan, tensorrt_runtime(), self.scratch, runtime_cache)
        ratio = check(compiled, request, self.error_ratio_bound)
        self._note(name, Backend.TENSORRT, ratio, watch.seconds())
        return compiled

    def _code_key(self, request: Request, attention: Attention) -> EngineKey:
        fields = self._fields(request)
        fields.pop("profile")  # guards say what code takes
        precision = replace(request.precision, wide=request.segment.name.kind in self.wide)
        fields |= {"attention": attention.value, "precision": precision.to_dict(), "device": self.device.type}
        return code_key(fields)

    def _key(self, name: SegmentName) -> EngineKey:
        return EngineKey("segment", {**self._fields(self.request(name)), "weights": "inputs"})

    def _fields(self, request: Request) -> dict[str, Any]:
        fields = {**describe(request, self.arch), "source": source_version()}
        # Depths and the numbers around the blocks do not change an engine: schnell, dev and Fill share theirs.
        for irrelevant in ("double_depth", "single_depth", "in_channels", "out_channels", "context_dim", "vec_dim",
                           "guidance", "theta", "axes_dim"):  # fmt: skip
            fields["architecture"].pop(irrelevant)
        return fields

    def _note(self, name: SegmentName, backend: Backend, ratio: float, seconds: float) -> None:
        self.error_ratios[name, backend] = ratio
        self.build_seconds[name, backend] = self.build_seconds.get((name, backend), 0.0) + seconds

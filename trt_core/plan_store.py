"""Where plans are remembered: in the engine cache, under everything that a choice depends on."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .backends.compiler import SegmentCompiler
from .candidates import why_not
from .config import CompileConfig, Layout
from .engine_cache import EngineKey
from .errors import CacheError, TRTError
from .flux import cudnn_attention, flash3_attention
from .flux.catalogue import BlockKind, source_version
from .kernel_ranking import candidates_digest
from .plan import WHOLE_SEGMENT, Plan

_LOG = logging.getLogger("trt_core.plan")
_PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class PlanStore:
    """The remembered plan of one question: this model's segments, these choices, this machine."""

    compiler: SegmentCompiler
    config: CompileConfig
    layout: Layout | None

    def remembered(self) -> Plan | None:
        entry = self.compiler.cache.get(self.key())
        if entry is None:
            return None
        try:
            return Plan.from_json(entry.read(_PLAN_FILE))
        except (ValueError, KeyError, TypeError, CacheError, TRTError) as error:
            _LOG.warning("The cached plan is not used: %s", error)
            return None

    def remember(self, plan: Plan) -> None:
        info = {"double": plan.double.words(), "single": plan.single.words()}
        try:
            self.compiler.cache.put(self.key(), {_PLAN_FILE: plan.to_json()}, info)
        except CacheError as error:
            _LOG.warning("The plan works but is not kept: %s", error)

    def lock(self) -> AbstractContextManager[Any]:
        """Held while the plan is searched, so that two processes search once."""
        return self.compiler.cache.lock(self.key(), self.compiler.progress.cancelled)

    def key(self) -> EngineKey:
        arch, compiler = self.compiler.arch, self.compiler
        profile = compiler.profile
        ranges = {
            axis: [getattr(profile, axis).min, getattr(profile, axis).max]
            for axis in ("img_tokens", "txt_tokens", "batch")
        }
        fields = {
            "hidden": arch.hidden, "heads": arch.heads, "mlp_hidden": arch.mlp_hidden, "ranges": ranges,
            "opt": None if self.config.profile is None else profile.img_tokens.opt,
            "dtype": str(compiler.dtype), "source": source_version(), "backend": self.config.backend.value,
            "attention": self.config.attention.value, "layout": self.layout.value if self.layout else None,
            # A compiler that was installed since makes a new choice possible.
            "precision": [compiler.precision(WHOLE_SEGMENT[kind]).to_dict() for kind in BlockKind],
            "left_out": sorted(backend.value for backend, reason in why_not(compiler).items() if reason),
            "kernels": candidates_digest(),
            "fp8_attention": cudnn_attention.installed(), "flash3": flash3_attention.installed(),
        }  # fmt: skip
        return EngineKey("plan", fields)

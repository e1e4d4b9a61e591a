"""What a node says about a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from ...trt_core.range_check import range_words
from ...trt_core.report import Report
from ...trt_core.weights import RefitReport
from .host import show

REFIT_NODES = "trt_core.refit_nodes"
"""Attachment of a patcher: ids of TRT LoRA Refit nodes that want to show what a refit took."""


class RunText:
    """Collects what happened in one run."""

    def __init__(self) -> None:
        self.eager_model = ""
        self.eager: dict[str, str] = {}
        self.fp8 = ""
        self.refit: RefitReport | None = None
        self._calls = 0

    def called(self, eager: Mapping[str, str]) -> None:
        self._calls += 1
        self.eager |= eager

    def refitted(self, patcher: Any, node_id: str) -> None:
        """Shows what the refit touched, on our node and on the LoRA nodes that asked for it."""
        line = refit_line(self.refit)
        for each in (node_id, *patcher.attachments.get(REFIT_NODES, ())):
            show(each, line)

    def summary(self, report: Report, blocks: Sequence[str], foreign: Collection[str]) -> str:
        """Several lines: how many blocks ran compiled and by what, LoRA, what FP8 cuts off, builds, and who ran the
        other blocks why."""
        left_out = set(self.eager) | set(foreign)
        compiled = len(blocks) - len(left_out) if self._calls else 0
        ways = _ways(report)
        lines = [f"{compiled} of {len(blocks)} blocks compiled" + (f": {'; '.join(ways)}" if ways else "")]
        lines += [self.fp8] if self.fp8 else []
        lines.append(refit_line(self.refit))
        lines += [f"Warning: {words}"] if (words := range_words(report.out_of_range)) else []
        lines.append(f"builds: {report.builds} ({report.build_seconds:.1f} s for the last)")
        return "\n".join([*lines, *_by_reason(self.eager)])


def _ways(report: Report) -> list[str]:
    """How blocks are cut and what runs their parts, each way once: "split tensorrt + eager, cudnn attention"."""
    said = [words for name, words in report.segments.items() if not name.startswith("stem")]
    return sorted({way.partition(" (")[2].removesuffix(")") for words in said for way in words.split("; ")})


def refit_line(refit: RefitReport | None) -> str:
    if refit is None:
        return "LoRA: no layers touched"
    return (
        f"LoRA: {refit.layers} layers touched ({refit.merged} merged, {refit.restored} restored), "
        f"{refit.milliseconds:.0f} ms"
    )


def _by_reason(eager: Mapping[str, str]) -> list[str]:
    ordered = sorted(eager.items(), key=lambda item: item[1])
    lines = []
    for reason, group in groupby(ordered, key=lambda item: item[1]):
        names = [name for name, _ in group]
        who = names[0] if len(names) == 1 else f"{len(names)} blocks"
        lines.append(f"ComfyUI runs {who}: {reason}")
    return lines

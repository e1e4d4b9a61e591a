"""TRT Engine Cache: what is cached for this GPU, and how to make it smaller."""

from __future__ import annotations

import time
from collections.abc import Callable

from comfy_api.latest import io, ui

from ..trt_core.engine_cache import EngineCache, Entry
from ..trt_core.gpu import environments
from .adapters.host import engine_folder, named

NODE = "TRT Engine Cache"
_GB, _DAY_SECONDS = 10**9, 86400.0
_MOST_LINES = 40


class EngineCacheNode(io.ComfyNode):
    """Shows which compiled engines and plans are kept on disk, how large and how old they are. Prune deletes what is
    old or too much; clear deletes all of this GPU's. Nothing is lost by it but the time to build again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TRT_EngineCache",
            display_name=NODE,
            category="TensorRT",
            description=" ".join((cls.__doc__ or "").split()),
            search_aliases=["tensorrt", "engine", "cache", "clear", "prune", "disk"],
            inputs=[
                io.Combo.Input(
                    "action", options=list(_ACTIONS), default="list",
                    tooltip="list shows; prune deletes what is damaged, unused for long or too much; clear deletes all "
                    "entries of this GPU.",
                ),
                io.Float.Input(
                    "keep_gb", default=10.0, min=0.0, max=10000.0, step=0.5, advanced=True,
                    tooltip="For prune: keep at most this much, least recently used first out.",
                ),
                io.Int.Input(
                    "unused_days", default=90, min=1, max=10000, advanced=True,
                    tooltip="For prune: delete what was not used for so many days.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **widgets: object) -> float:
        return time.time()  # the disk may have changed: never answered from the cache of results

    @classmethod
    def execute(cls, action: str, keep_gb: float, unused_days: int) -> io.NodeOutput:
        with named(NODE):
            return io.NodeOutput(
                ui=ui.PreviewText(_ACTIONS[action](EngineCache(engine_folder()), keep_gb, unused_days))
            )


def _list(cache: EngineCache, keep_gb: float, unused_days: int) -> str:
    entries, here = cache.entries(), environments()
    lines = [_line(entry, entry.manifest.environment in here) for entry in entries[:_MOST_LINES]]
    if len(entries) > _MOST_LINES:
        lines.append(f"and {len(entries) - _MOST_LINES} more")
    total = sum(entry.size_bytes for entry in entries)
    return "\n".join([f"{len(entries)} entries, {_size(total)}, in {cache.folder}", *lines])


def _prune(cache: EngineCache, keep_gb: float, unused_days: int) -> str:
    report = cache.prune(int(keep_gb * _GB), unused_days)
    return (
        f"Deleted {report.removed} entries, {_size(report.removed_bytes)}, and {report.leftovers} leftovers.\n"
        f"Kept {report.kept} entries, {_size(report.kept_bytes)}."
    )


def _clear(cache: EngineCache, keep_gb: float, unused_days: int) -> str:
    count, size_bytes = cache.clear()
    return f"Deleted {count} entries, {_size(size_bytes)}."


_ACTIONS: dict[str, Callable[[EngineCache, float, int], str]] = {"list": _list, "prune": _prune, "clear": _clear}


def _line(entry: Entry, usable: bool) -> str:
    facts = " ".join(str(value) for value in entry.info.values() if isinstance(value, (str, int, float)))
    age_days = max(0.0, time.time() - entry.last_used) / _DAY_SECONDS
    note = "" if usable else ", made by other versions"
    return f"{entry.manifest.kind}: {facts[:80]}, {_size(entry.size_bytes)}, used {age_days:.1f} days ago{note}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 10**5 else f"{size_bytes / 1e3:.1f} KB"

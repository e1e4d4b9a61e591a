"""The result as plain text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .flow import Result, Row
from .options import Options

PHASE_COLUMNS = (
    "phase",
    "size",
    "ms/step",
    "eager ms/step",
    "first step ms",
    "LoRA call ms",
    "switch ms",
    "layers written",
    "error",
)


def text(result: Result) -> str:
    """What the user reads: phases, segments, and how to read the errors."""
    report = result.report
    lines = [
        f"{result.model} on {result.device}, {result.dtype}",
        "",
        *table(PHASE_COLUMNS, [_cells(row) for row in result.rows]),
        "",
        *table(("segment", "runs on"), sorted(report.segments.items())),
        *(f"{block} runs eagerly: {why}" for block, why in report.eager_blocks.items()),
        "",
        f"Building took {report.build_seconds:.2f} s of the first call; engines are cached for later runs.",
        "switch ms: restoring and merging the bound weights. LoRA call ms: diffusers' calls, which read the file and "
        "add its layers.",
        f"error: relative L2 of the latents against eager PyTorch. Noise floor: eager differs from itself by "
        f"{result.noise_floor:.1e} when only its attention kernel is exchanged.",
        _restored(result.restored_error),
    ]
    return "\n".join(lines)


def _restored(error: float) -> str:
    if error == 0:
        return "Restored: the transformer computes the same bits as before it was compiled."
    return f"Restored: the transformer differs from before by {error:.1e}."


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.phase.title,
        str(row.phase.size),
        f"{row.compiled.step_ms:.1f}",
        f"{row.eager.step_ms:.1f}",
        f"{row.compiled.first_step_ms:.1f}",
        f"{row.compiled.lora_call_ms:.1f}",
        f"{row.switch_ms:.1f}" if row.refits else "-",
        str(row.layers_written or "-"),
        f"{row.error:.1e}",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numbers = [all(not row[i] or row[i][0] in "0123456789-" for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    ]


def as_json(result: Result, options: Options) -> dict[str, Any]:
    """All numbers under stable names; times carry their unit."""
    report = result.report
    return {
        "model": result.model,
        "device": result.device,
        "dtype": result.dtype,
        "backend": options.backend.value,
        "steps": options.steps,
        "seed": options.seed,
        "phases": [_json_row(row) for row in result.rows],
        "segments": report.segments,
        "eager_blocks": report.eager_blocks,
        "build_seconds": report.build_seconds,
        "noise_floor": result.noise_floor,
        "restored_error": result.restored_error,
        "versions": result.versions,
    }


def _json_row(row: Row) -> dict[str, Any]:
    return {
        "phase": row.phase.title,
        "lora": row.phase.lora,
        "width_px": row.phase.size.width_px,
        "height_px": row.phase.size.height_px,
        "call_seconds": row.compiled.seconds,
        "first_step_ms": row.compiled.first_step_ms,
        "step_ms": row.compiled.step_ms,
        "eager_step_ms": row.eager.step_ms,
        "lora_call_ms": row.compiled.lora_call_ms,
        "switch_ms": row.switch_ms,
        "layers_written": row.layers_written,
        "error": row.error,
    }

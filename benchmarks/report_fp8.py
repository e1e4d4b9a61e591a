"""How exact FP8 is and what it holds: two tables for the README."""

from __future__ import annotations

from .lines import Line
from .report_tables import latest, number, stack, table

_KEYS = ("kind", "weights", "delta", "budget_gb", "corrected")
_QUALITY = ("what", "error to fp32", "cosine", "to the simulation's error", "run")
_BUDGET = ("limit, GB", "tensors at most, GB", "ms per step", "first call, s", "first LoRA, s", "LoRA switch, ms",
           "bases in host memory, GB", "run")  # fmt: skip


def fp8_section(lines: list[Line]) -> str:
    """Errors and LoRAs at 512 px, and the latest complete run under a limit of GPU memory."""
    cases = latest([line for line in lines if not line.get("incomplete")], _KEYS)
    quality = [row for line in cases for row in _QUALITY_ROWS.get(line["kind"], lambda _: [])(line)]
    budget = [_budget_row(line) for line in cases if line["kind"] == "budget"]
    tables = (table(_QUALITY, quality) if quality else "", table(_BUDGET, budget) if budget else "")
    return "\n\n".join(filter(None, (stack(cases), *tables)))


def _forward_rows(line: Line) -> list[tuple[str, ...]]:
    attention = "attention in FP8" if line.get("fp8_attention") else "attention in bf16"
    name = f"one call, {line['weights']} weights, {attention}"
    bf16 = (f"the same in eager bf16, {line['weights']} weights", number(line, "eager_error", 1, ".4f"),
            number(line, "eager_cosine", 1, ".5f"), "", line["run"])  # fmt: skip
    error, cosine = number(line, "error", 1, ".4f"), number(line, "cosine", 1, ".5f")
    return [(name, error, cosine, number(line, "ratio_to_recipe", 1, ".2f"), line["run"]), bf16]


def _euler_rows(line: Line) -> list[tuple[str, ...]]:
    last = f"{line['latent_errors'][-1]:.4f}"
    biases = ", biases corrected" if line.get("corrected") else ""
    noise = f"{line['last_ratio_to_noise']:.2f} times white noise's"
    name = f"the latent after {line['steps']} Euler steps{biases} ({noise})"
    return [(name, last, "", number(line, "last_ratio_to_simulated", 1, ".2f"), line["run"])]


def _gain_rows(line: Line) -> list[tuple[str, ...]]:
    loras = f"mean of {line['loras']} LoRAs" if "loras" in line else "one LoRA"
    spread = f" ± {line['gain_standard_error']:.2f}" if "gain_standard_error" in line else ""
    name = f"LoRA of {line['delta']:.1%} of the weights, {loras}: {line['gain']:.2f}{spread} of its change arrives"
    return [(name, "", number(line, "cosine", 1, ".2f"), "", line["run"])]


def _switch_rows(line: Line) -> list[tuple[str, ...]]:
    wrong = line["a_to_none"]["different_weights"] + line["a_to_b"]["different_weights"]
    wrong += line["after_switches"]["different_weights"]
    same = f"{line['switches_same_output']} of {line['switches']} random switches gave the same bits"
    return [(f"A to none, A to B, {same}; {wrong} of {line['tensors']} bound tensors differ", "", "", "", line["run"])]


_QUALITY_ROWS = {
    "forward": _forward_rows, "euler": _euler_rows, "lora_gain": _gain_rows, "lora_switch": _switch_rows,
}  # fmt: skip


def _budget_row(line: Line) -> tuple[str, ...]:
    return (
        f"{line['budget_gb']:.0f}",
        number(line, "peak_allocated_bytes", 1e-9, ".1f"),
        number(line, "step_ms", 1, ".1f"),
        number(line, "first_call_seconds", 1, ".1f"),
        number(line, "lora_first_ms", 1e-3, ".1f"),
        number(line, "lora_switch_ms", 1, ".0f"),
        number(line, "base_host_bytes", 1e-9, ".1f"),
        line["run"],
    )

"""What is measured: one frozen dataclass per scenario, and the list that a run goes through."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Scenario:
    """One process: a model, a way to run it, and what is measured on it.

    `batches` are measured one after the other in this process; each gives a line. `lora` also measures a switch.
    """

    scenario: str
    backend: str | None = None
    base_weights: str | None = None
    batches: tuple[int, ...] = (1,)
    lora: bool = False
    warm: bool = False
    """Runs again in a second process with the cache that the first left, for `warm_first_call_seconds`."""
    height_px: int = 1024
    width_px: int = 1024
    text_tokens: int = 512
    precision: str = "bf16"
    lora_rank: int = 16
    limit_seconds: float | None = None
    """This process is stopped then, whatever `--limit` says."""
    needs: str | None = None
    """A package without which the scenario is left out."""

    @property
    def name(self) -> str:
        precision = None if self.precision == "bf16" else self.precision
        parts = [self.scenario, precision, self.backend, f"base_{self.base_weights}" if self.base_weights else None]
        return "-".join(part for part in parts if part)

    def fields(self) -> dict[str, Any]:
        """What a line says about its scenario."""
        names = ("scenario", "backend", "precision", "height_px", "width_px", "text_tokens", "base_weights")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scenario:
        known = {field.name for field in fields(cls)}
        return cls(**{k: tuple(v) if k == "batches" else v for k, v in values.items() if k in known})


SCENARIOS = (
    Scenario("eager", batches=(1, 2)),
    Scenario("compile_repeated_blocks", batches=(1, 2)),
    Scenario("torchao", batches=(1, 2), precision="fp8", limit_seconds=200, needs="torchao"),
    Scenario("ours", "auto", "gpu", batches=(1, 2), lora=True, warm=True),
    Scenario("ours", "auto", "host", lora=True),
    Scenario("ours", "tensorrt", "gpu", batches=(1, 2), lora=True, warm=True),
    Scenario("ours", "inductor", "gpu", batches=(1, 2), lora=True, warm=True),
    Scenario("ours", "eager", "gpu", lora=True),
    Scenario("ours", "auto", "gpu", batches=(1, 2), lora=True, warm=True, precision="fp8"),
    Scenario("ours", "auto", "host", lora=True, precision="fp8"),
    Scenario("mttm"),
)


def named(names: list[str]) -> list[Scenario]:
    """Scenarios whose name starts with one of `names`; all of them for an empty list."""
    found = [s for s in SCENARIOS if not names or any(s.name.startswith(name) for name in names)]
    if not found:
        raise SystemExit(f"No scenario is called {names}. There are: {', '.join(s.name for s in SCENARIOS)}.")
    return found

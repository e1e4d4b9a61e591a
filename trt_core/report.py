"""What a compiled module says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Measurement
from .weights import RefitReport


@dataclass(frozen=True, slots=True)
class Report:
    """What runs where, for tables, logs and nodes. `segments`: name -> backend and why; times in seconds and ms.

    `out_of_range`: FP8 layer -> how many times its static scale's range its input reached in the first step after
    weights changed, the furthest first; empty where all inputs fit, and where scales are dynamic. `step`: "cuda graph"
    where the last step was one launch, else why it was not.
    """

    segments: dict[str, str]
    build_seconds: float
    last_refit: RefitReport | None
    eager_blocks: dict[str, str]
    plan_bytes: int
    measurements: tuple[Measurement, ...]
    builds: int
    out_of_range: dict[str, float] = field(default_factory=dict)
    step: str = ""

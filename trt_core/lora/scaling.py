"""The scale of LoRA factors without an alpha tensor, from the PEFT config that diffusers saves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidFile

METADATA_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class PeftScaling:
    """PEFT's rule: alpha / rank, or alpha / sqrt(rank) with `use_rslora`; 1.0 where no alpha is known."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PeftScaling:
        """Reads `lora_adapter_metadata`; raises `InvalidFile` where it is there but is no such config."""
        text = metadata.get(METADATA_KEY)
        if text is None:
            return cls()
        try:
            config: dict[str, Any] = json.loads(text)
            # A pipeline saves `transformer.lora_alpha`, a transformer alone saves `lora_alpha`.
            ours = (key for key in config if key.startswith(_PREFIX) or "." not in key)
            values = {key.removeprefix(_PREFIX): config[key] for key in ours}
            alpha = values.get("lora_alpha")
            patterns = {str(key): float(value) for key, value in (values.get("alpha_pattern") or {}).items()}
            for pattern in patterns:
                re.compile(pattern)
            return cls(None if alpha is None else float(alpha), patterns, bool(values.get("use_rslora")))
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise InvalidFile(
                f"The file's {METADATA_KEY} cannot be read: {error}.",
                expected="diffusers writes a PEFT LoraConfig there.",
            ) from error

    def __call__(self, module: str, rank: int) -> float:
        """The scale for the module named `module` in the file."""
        alpha = next((value for pattern, value in self.alpha_pattern.items() if _fits(pattern, module)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _fits(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None

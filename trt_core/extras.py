"""What one call adds to the plain transformer: ControlNet residuals, somebody else's blocks, an attention mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .execution import Pe

DoubleOverride = Callable[[Tensor, Tensor, Tensor, Pe], tuple[Tensor, Tensor]]
"""(img, txt, vec, pe) to (img, txt): somebody else's double block in place of the compiled one."""
SingleOverride = Callable[[Tensor, Tensor, Pe, int], Tensor]
"""(x, vec, pe, text tokens) to x: somebody else's single block in place of the compiled one."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a call adds to the plain transformer.

    Residuals (ControlNet) are added to the image tokens after the block of their index; None adds nothing. Overrides
    replace blocks by index. `mask` is an attention mask that broadcasts to [B, heads, tokens, tokens].
    """

    double_residuals: Sequence[Tensor | None] = ()
    single_residuals: Sequence[Tensor | None] = ()
    double_overrides: Mapping[int, DoubleOverride] = field(default_factory=dict)
    single_overrides: Mapping[int, SingleOverride] = field(default_factory=dict)
    mask: Tensor | None = None

"""How latents are compared."""

from __future__ import annotations

from torch import Tensor


def relative_error(latent: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((latent - reference).norm() / reference.norm())


def differs(latent: Tensor, reference: Tensor) -> bool:
    """Whether two latents differ by far more than rounding does."""
    return latent.shape != reference.shape or relative_error(latent, reference) > 1e-3

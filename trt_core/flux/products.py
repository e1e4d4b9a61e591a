"""One product of matrices of a step, by its size. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """x [rows, width] @ weight [columns, width]^T + bias in bf16, or E4M3 with a scale per row where `fp8`.

    `gelu`: GELU of the result. `onto`: added to what is there, without a bias.
    """

    rows: int
    columns: int
    width: int
    fp8: bool = False
    gelu: bool = False
    onto: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.width

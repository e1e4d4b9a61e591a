"""How long a segment's matrix products take alone: the least that a compiler takes which leaves them to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..measure import median_milliseconds
from .base import Request


def products_milliseconds(request: Request, inputs: list[Tensor]) -> float:
    """Milliseconds of the products, one after the other, at these inputs; plain ones without bias, FP8 ones as called.

    Inductor calls the same kernels for them, as it does unless asked to tune its own.
    """
    with torch.no_grad(), _NotedProducts() as noted:
        request.reference(*inputs)
    with torch.no_grad():
        calls = noted.calls
        return median_milliseconds(lambda: [call() for call in calls], request.device) if calls else 0.0


class _NotedProducts(TorchFunctionMode):
    """Keeps what linear layers multiply while they run: both factors, and the call that multiplies them again."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor]] = []
        self.calls: list[Callable[[], Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight = args[0].reshape(-1, args[0].shape[-1]), args[1].t()
            self._note(x, weight, partial(torch.mm, x, weight))
        elif function is torch._scaled_mm:
            self._note(*args[:2], partial(function, *args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    def _note(self, x: Tensor, weight: Tensor, call: Callable[[], Tensor]) -> None:
        self.products.append((x, weight))
        self.calls.append(call)

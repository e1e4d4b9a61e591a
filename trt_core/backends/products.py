"""How long a segment's matrix products take alone: the least that a compiler takes which leaves them to PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..flux import fp8
from ..measure import median_milliseconds
from .base import Request


def products_milliseconds(request: Request, inputs: list[Tensor]) -> float:
    """Milliseconds of the products, one after the other, at these inputs; plain ones without bias, FP8 ones as called.

    Inductor calls the same kernels for them, as it does unless asked to tune its own.
    """
    with torch.no_grad():
        with _NotedProducts() as noted:
            request.reference(*inputs)
        calls = noted.calls
        return median_milliseconds(lambda: [call() for call in calls], request.device) if calls else 0.0


class _NotedProducts(TorchFunctionMode):
    """Keeps what linear layers multiply while they run, as calls whose first two arguments are the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[partial[Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight = args[:2]
            self.calls.append(partial(torch.mm, x.reshape(-1, x.shape[-1]), weight.t()))
        elif function in (torch._scaled_mm, fp8.PRODUCT):
            self.calls.append(partial(function, *args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

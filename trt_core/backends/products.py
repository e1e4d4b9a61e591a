"""How long a segment's matrix products take alone: the least that a compiler takes which leaves them to PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..measure import median_milliseconds
from .base import Request


def products_milliseconds(request: Request, inputs: list[Tensor]) -> float:
    """Milliseconds of the products without bias, one after the other, at these inputs.

    Inductor calls the same kernels for them, as it does unless asked to tune its own. Only plain products are seen: of
    an FP8 segment those of its layers that are not FP8, which is less than it takes, too.
    """
    with torch.no_grad(), _NotedProducts() as noted:
        request.reference(*inputs)
        products = noted.products
        if not products:
            return 0.0
        return median_milliseconds(lambda: [torch.mm(x, weight) for x, weight in products], request.device)


class _NotedProducts(TorchFunctionMode):
    """Keeps what linear layers multiply while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight = args[:2]
            self.products.append((x.reshape(-1, x.shape[-1]), weight.t()))
        return function(*args, **(kwargs or {}))

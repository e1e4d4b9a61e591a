"""The residual stream between blocks: a sum whose last addition is left to whoever reads it.

Layer norm reads what a gate and a sum have just written. Where one kernel does both, the stream is read once less: per
block five passes over its rows instead of six in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OpenSum(NamedTuple):
    """x + gate * add, not added up yet: x and add [B, L, hidden], gate [B, hidden]."""

    x: Tensor
    add: Tensor
    gate: Tensor

    def closed(self) -> Tensor:
        """The sum [B, L, hidden]. In 16 bits one kernel, which rounds once; in fp32 with the bits of x + gate * add."""
        gate = self.gate[:, None, :]
        if self.x.dtype is torch.float32:
            return self.x + gate * self.add
        return finite(torch.addcmul(self.x, gate, self.add))


Stream = Tensor | OpenSum


def opened(stream: Stream, mod: Tensor) -> OpenSum:
    """`stream` with something left to add: nothing, gated by zeros, where it is a tensor. `mod` [n, B, hidden]."""
    if isinstance(stream, OpenSum):
        return stream
    # Another tensor object of the same memory: for Dynamo, one that comes twice is a case of its own to compile. No
    # view of it: PyTorch 2.11 loses track of sizes that only a view's base has, and fails at the second batch size.
    return OpenSum(stream, stream.detach(), torch.zeros_like(mod[-1]))


def closed(stream: Stream) -> Tensor:
    return stream.closed() if isinstance(stream, OpenSum) else stream


def finite(x: Tensor) -> Tensor:
    """fp16 overflows in FLUX's last double blocks (a known trait of the weights); other dtypes pass unchanged."""
    return x.clamp(-65504, 65504) if x.dtype is torch.float16 else x

"""A second stream of a GPU, for work that fills the multiprocessors that another kernel leaves idle at its end.

Attention and products hand out tiles: where a picture's tiles do not come out even, the last ones run on a part of the
GPU. At 4608 tokens attention has 864 tiles for an H100's 132 multiprocessors, 6.5 rounds; what is launched beside it
begins in the seventh. Both streams are one order for whoever looks from outside, so the pair can be captured in a CUDA
graph and needs no care for the memory of tensors made before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def forked(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream that begins where the current one is; on leaving, the current one waits for what was launched on it.

    `device`: a tensor's, with its index.

    What is launched first gets the multiprocessors first: launch the longer kernel on the current stream, then the
    other on this one. Tensors that it writes are made before, so that their memory belongs to the current stream.
    """
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        yield side
    finally:  # whatever happened: memory of the current stream may be in use on the other
        current.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

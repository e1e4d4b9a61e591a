"""Torch-TensorRT's own MutableTorchTensorRTModule with safe options: the generic path, and the baseline.

It bakes the weights into one engine, exports the whole model at the first call and again at every refit. Measured for
FLUX.1-dev on one H200: 377 s and 77 GB of host memory for the first call, over 136 s for a refit.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from torch import nn

from ..errors import MissingDependency
from ..gpu import current_gpu, why_not_tensorrt

_LOG = logging.getLogger("trt_core.mttm")


def stock_module(model: nn.Module, **settings: Any) -> nn.Module:
    """`model` behind Torch-TensorRT's mutable module; `settings` override the safe options below.

    Raises `MissingDependency` without a GPU, TensorRT or Torch-TensorRT.
    """
    if reason := why_not_tensorrt(current_gpu()):
        raise MissingDependency(f'backend="mttm" cannot be used here: {reason}.', widget="backend")
    # Returns freed memory of the builder to the system: host memory falls from 5 to 3 times the model
    # (Torch-TensorRT, resource_management.rst).
    os.environ.setdefault("TORCHTRT_ENABLE_BUILDER_MALLOC_TRIM", "1")
    import torch_tensorrt

    _LOG.info("stock mutable module: the first call takes minutes and several times the model's host memory")
    wrapped = torch_tensorrt.MutableTorchTensorRTModule(model, **{**SAFE_OPTIONS, **settings})
    _originals[wrapped] = model
    return wrapped


def stock_original(wrapped: object) -> nn.Module | None:
    """The model behind a stock module made here, or None."""
    return _originals.get(wrapped) if isinstance(wrapped, nn.Module) else None


# Not an attribute of the wrapper: it would register the model as its own descendant, and nn.Module's walks over
# children would never end.
_originals: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


SAFE_OPTIONS: dict[str, Any] = {
    # Needed by FLUX's export (Torch-TensorRT's examples/apps/flux_demo.py).
    "strict": False,
    "prefer_deferred_runtime_asserts_over_guards": True,
    # A refittable engine; strong typing is the default from 2.11 on, so precision is the model's own.
    "immutable_weights": False,
    "truncate_double": True,  # rope frequencies are fp64
    "min_block_size": 1,
    # The original stays on the GPU: moving it to the CPU and back costs seconds at every refit.
    "offload_module_to_cpu": False,
}

"""FP8 in TensorRT: converters for the casts to and from E4M3 in an exported segment, and which blocks it can run.

TensorRT has no casts to and from E4M3, only layers that also divide or multiply by a scale. The exported segments scale
by themselves (`flux/fp8_export.py`), so that scale is the constant 1 here: exact, the same for every recipe, and within
the rule of TensorRT 10 that it is known when the engine is built.

TensorRT-RTX 1.4 refuses E4M3 as an engine's input. There the input is declared as bytes (the address that is bound is
the same) and each byte becomes its number by a table.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from typing import Any

import torch

from ..flux.precision import FP8, Precision
from ..gpu import GpuInfo, why_not_fp8
from . import tensorrt_api

_LOG = logging.getLogger("trt_core.tensorrt")


def why_not_tensorrt_fp8(precision: Precision, gpu: GpuInfo | None) -> str | None:
    """Why TensorRT cannot run a block of this precision here, or None. Scales of every kind are no reason."""
    return why_not_fp8(gpu) if precision.fp8 else None


@cache
def source_version() -> str:
    """Digest of this file, which makes part of an FP8 engine: an edit is a miss in the cache."""
    return sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:16]


@cache
def register_converters() -> None:
    """Teaches torch_tensorrt the casts to and from E4M3, in this process. Its own come with ModelOpt only."""
    from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter

    dynamo_tensorrt_converter(
        torch.ops.aten._to_copy.default,
        capability_validator=lambda node, settings=None: _is_fp8_cast(node),
        priority=ConverterPriority.HIGH,
        supports_dynamic_shapes=True,
    )(_convert_cast)


def input_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to declare an engine's input of `dtype` as: bytes for E4M3 where the library refuses that."""
    return torch.uint8 if dtype is FP8 and not _takes_fp8_inputs() else dtype


@cache
def _takes_fp8_inputs() -> bool:
    """Found by building the smallest such engine (0.1 s), because two flavours number their versions differently."""
    trt = tensorrt_api.load_tensorrt()
    builder = trt.Builder(tensorrt_api.new_logger(trt, errors=logging.DEBUG))
    network = builder.create_network(0)
    weight = network.add_input("weight", trt.DataType.FP8, (16, 16))
    ones = torch.ones(1)  # TensorRT reads them when it builds
    one = network.add_constant((), trt.Weights(trt.DataType.FLOAT, ones.data_ptr(), 1)).get_output(0)
    network.mark_output(network.add_dequantize(weight, one, trt.DataType.BF16).get_output(0))
    taken = builder.build_serialized_network(network, builder.create_builder_config()) is not None
    _LOG.debug("engines %s FP8 inputs", "take" if taken else "refuse")
    return taken


def _is_fp8_cast(node: torch.fx.Node) -> bool:
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, torch.fx.Node) else None
    return node.kwargs.get("dtype") is FP8 or getattr(value, "dtype", None) is FP8


def _convert_cast(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """torch_tensorrt's signature for converters; gives the tensor that stands for the cast one."""
    import torch_tensorrt

    trt, network, source = tensorrt_api.load_tensorrt(), ctx.net, args[0]
    one = _constant(ctx, torch.ones(()), f"{name}_scale")
    if kwargs["dtype"] is FP8:
        return network.add_quantize(source, one, trt.DataType.FP8).get_output(0)
    if source.dtype == trt.DataType.UINT8:
        # The table's numbers are quantized again, without loss, so that the product is one of two E4M3 tensors.
        source = network.add_quantize(_decoded(ctx, source, name), one, trt.DataType.FP8).get_output(0)
    kind = torch_tensorrt.dtype._from(kwargs["dtype"]).to(trt.DataType)
    return network.add_dequantize(source, one, kind).get_output(0)


def _decoded(ctx: Any, codes: Any, name: str) -> Any:
    """The bf16 numbers of E4M3 bytes."""
    trt, network = tensorrt_api.load_tensorrt(), ctx.net
    values = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.bfloat16)
    # Bytes can only be cast to floats, and only integers can be indices.
    floats = network.add_cast(codes, trt.DataType.FLOAT).get_output(0)
    indices = network.add_cast(floats, trt.DataType.INT32).get_output(0)
    return network.add_gather(_constant(ctx, values, f"{name}_values"), indices, 0).get_output(0)


def _constant(ctx: Any, value: torch.Tensor, name: str) -> Any:
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    return get_trt_tensor(ctx, value, name, dtype=value.dtype)

"""Everything that differs between TensorRT flavours and torch_tensorrt versions, in one place.

Written for torch_tensorrt 2.11 to 2.14. The flavour is decided as torch_tensorrt decides it: the distribution that
provides the package `torch_tensorrt` is `torch-tensorrt-rtx` (then TensorRT-RTX) or `torch-tensorrt`.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import BuildFailed, MissingDependency
from ..gpu import NONE, current_gpu, installed_packages, why_not_tensorrt

_LOG = logging.getLogger("trt_core.tensorrt")

TensorRT = Any
"""The module `tensorrt` or `tensorrt_rtx`; neither ships type stubs that hold for all supported versions."""


def flavour() -> str | None:
    """ "tensorrt_rtx", "tensorrt", or None where neither is installed. Imports nothing."""
    found = installed_packages()
    return found["tensorrt_flavour"] if found["tensorrt"] != NONE else None


def is_rtx() -> bool:
    return flavour() == "tensorrt_rtx"


def load_tensorrt() -> TensorRT:
    """The TensorRT module; raises `MissingDependency` where it is not installed or its library does not load."""
    name = flavour()
    if name is None:
        raise MissingDependency("TensorRT is not installed.", fix=_install_fix(), widget="backend")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency(f"{name} is installed but does not load: {error}", fix=_install_fix()) from error


def new_logger(trt: TensorRT, errors: int = logging.WARNING) -> Any:
    """A TensorRT logger that forwards to Python logging, its errors as `errors`; one is kept for the whole process."""

    class Forward(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = errors if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) else logging.DEBUG
            _LOG.log(level, message)

    return Forward()


def serialized_engine(
    program: torch.export.ExportedProgram, inputs: Sequence[Any], device: torch.device, timing_cache: str
) -> bytes:
    """Plan bytes of an exported program. `inputs` are `torch_tensorrt.Input` in the order of its arguments.

    Precision is that of the exported graph: strong typing is the default in 2.11 and 2.12 and the only mode later.
    """
    import torch_tensorrt

    logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.cuda.device(device):
        warnings.simplefilter("ignore")
        try:
            return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=list(inputs),
                device=torch_tensorrt.Device(gpu_id=device.index or 0),
                immutable_weights=True,
                require_full_compilation=True,
                timing_cache_path=timing_cache,
            )
        # torch_tensorrt logs the cause and then trips over its own missing result (UnboundLocalError).
        except (RuntimeError, UnboundLocalError, AssertionError, NotImplementedError, TypeError) as error:
            raise BuildFailed(f"TensorRT could not build the engine: {error}") from error


def dynamic_input(low: Sequence[int], opt: Sequence[int], high: Sequence[int], dtype: torch.dtype, name: str) -> Any:
    """A `torch_tensorrt.Input` with a range, or a fixed shape where the three are equal."""
    import torch_tensorrt

    # One element in place of the random tensor that Input would draw in fp32 and keep in host memory, and that nothing
    # reads on the way to an engine: for linear1 of FLUX.1-dev 264 MB, the peak of a builder process.
    example = torch.zeros((), dtype=dtype).expand(tuple(opt))
    if tuple(low) == tuple(opt) == tuple(high):
        return torch_tensorrt.Input(shape=tuple(opt), dtype=dtype, name=name, torch_tensor=example)
    return torch_tensorrt.Input(
        min_shape=tuple(low), opt_shape=tuple(opt), max_shape=tuple(high), dtype=dtype, name=name, torch_tensor=example
    )


def create_context(trt: TensorRT, engine: Any, runtime_cache: bytes | None) -> tuple[Any, Any | None]:
    """An execution context without scratch memory of its own, and TensorRT-RTX's runtime cache (None elsewhere).

    TensorRT-RTX compiles kernels at first use; its runtime cache keeps them, so that a later process does not.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(engine, "create_runtime_config") or not is_rtx():
        return engine.create_execution_context(strategy), None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    cache = config.create_runtime_cache()
    if runtime_cache:
        cache.deserialize(runtime_cache)
    config.set_runtime_cache(cache)
    # Eager: compile for the actual shape at its first call instead of in the background while sampling.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config), cache


def _install_fix() -> str:
    gpu = current_gpu()
    return why_not_tensorrt(gpu) or "Reinstall Torch-TensorRT."

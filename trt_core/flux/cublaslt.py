"""Products of E4M3 matrices with a scale per row, by cuBLASLt without a workspace: the same bits, sooner.

PyTorch offers it a workspace, and it takes kernels that count their tiles in there, which a launch of its own sets to
zero before each product. Without one it takes those whose tiles are dealt out beforehand. Measured on an H100, in turns
with `torch._scaled_mm`: FLUX's products of 4096 and 4608 tokens take 0.88 to 0.995 of its time, each bit the same.

Source: cuBLAS library documentation, cublasLtMatmul and CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F (12.9 and newer).
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..errors import first_line

_CAPABILITY = (9, 0)
"""Hopper: where this was measured. Ada's cuBLASLt has no scales per row."""
_SINCE = 120900
_KEPT_SHAPES = 512
_LOCK = threading.Lock()
"""A description holds the addresses of one call."""
_THREAD = threading.local()

# Numbers of cublasLt.h and library_types.h.
_E4M3, _BF16, _FP32, _COMPUTE_FP32 = 28, 14, 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS, _A_SCALE, _B_SCALE, _FAST_ACCUM, _BIAS_TYPE, _A_MODE, _B_MODE = (
    3, 7, 8, 17, 18, 25, 26, 31, 32,
)  # fmt: skip
_TRANSPOSED, _EPILOGUE_BIAS, _SCALE_PER_ROW = 1, 4, 3
_MAX_WORKSPACE_BYTES = 1
_ALIGNED_ADDRESS = 1 << 40
"""Stands for scales and bias while a kernel is chosen, which looks at addresses and reads nothing."""


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8), ("workspace_bytes", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Product:
    """What one shape needs at each call."""

    handle: c_void_p
    description: c_void_p
    weight: c_void_p
    rows: c_void_p
    out: c_void_p
    found: _Found


@cache
def why_not(device_index: int) -> str | None:
    """Why products on this GPU are PyTorch's, or None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index) != _CAPABILITY:
        return "cuBLASLt's scales per row were measured on compute capability 9.0 alone"
    return _why_not_loaded()


def multiply(
    q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> bool:
    """Writes (q * q_scale) @ (weight * weight_scale).T + bias to `out`; False, and nothing written, where it cannot.

    q [M, K] and weight [N, K] are E4M3, q dense in its last axis; q_scale and weight_scale hold M and N fp32 numbers,
    bias [N] and `out` [M, N] are bf16. Sums are Hopper's fast ones. Runs on PyTorch's current stream.
    """
    (rows, width), columns = q.shape, weight.shape[0]
    library, one, zero = _library(), c_float(1.0), c_float(0.0)
    with torch.cuda.device(q.device), _LOCK:
        _enter_context(q.device)
        product = _product_of(q.device.index, rows, columns, width, q.stride(0), out.stride(0), bias is not None)
        if product is None:
            return False
        for attribute, tensor in ((_A_SCALE, weight_scale), (_B_SCALE, q_scale), (_BIAS, bias)):
            if tensor is not None:
                _set(product.description, attribute, c_void_p(tensor.data_ptr()))
        _check(library.cublasLtMatmul(
            product.handle, product.description, byref(one), c_void_p(weight.data_ptr()), product.weight,
            c_void_p(q.data_ptr()), product.rows, byref(zero), c_void_p(out.data_ptr()), product.out,
            c_void_p(out.data_ptr()), product.out, byref(product.found.algorithm), None, c_size_t(0),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        ))  # fmt: skip
    return True


def _enter_context(device: torch.device) -> None:
    """CUDA's context belongs to a thread, which gets it with the first launch of PyTorch's: cuBLASLt makes none."""
    known = vars(_THREAD).setdefault("devices", set())
    if device.index not in known:
        torch.zeros(1, device=device)
        known.add(device.index)


@lru_cache(maxsize=_KEPT_SHAPES)
def _product_of(
    device_index: int, rows: int, columns: int, width: int, stride: int, out_stride: int, with_bias: bool
) -> _Product | None:
    """None where cuBLASLt has no kernel for it, for the current GPU. In its order, columns first, the product is
    out^T = weight @ q^T."""
    handle = _handle(device_index)
    made = (_description(with_bias), _layout(_E4M3, width, columns, width), _layout(_E4M3, width, rows, stride),
            _layout(_BF16, columns, rows, out_stride))  # fmt: skip
    found = _found(handle, *made)
    if found is None:
        _destroy(*made)
        return None
    product = _Product(handle, *made, found)
    weakref.finalize(product, _destroy, *made)
    return product


def _found(handle: c_void_p, description: c_void_p, weight: c_void_p, rows: c_void_p, out: c_void_p) -> _Found | None:
    library, preference, found, count = _library(), c_void_p(), _Found(), c_int()
    _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
    try:
        size = c_size_t(0)
        _check(library.cublasLtMatmulPreferenceSetAttribute(
            preference, _MAX_WORKSPACE_BYTES, byref(size), c_size_t(sizeof(size))
        ))  # fmt: skip
        status = library.cublasLtMatmulAlgoGetHeuristic(
            handle, description, weight, rows, out, out, preference, 1, byref(found), byref(count)
        )
    finally:
        library.cublasLtMatmulPreferenceDestroy(preference)
    return found if status == 0 and count.value == 1 and found.state == 0 else None


def _description(with_bias: bool) -> c_void_p:
    description = c_void_p()
    _check(_library().cublasLtMatmulDescCreate(byref(description), _COMPUTE_FP32, _FP32))
    _set(description, _TRANSPOSE_A, c_int32(_TRANSPOSED))
    _set(description, _FAST_ACCUM, c_int8(1))
    for attribute in (_A_MODE, _B_MODE):
        _set(description, attribute, c_int32(_SCALE_PER_ROW))
    for attribute in (_A_SCALE, _B_SCALE):
        _set(description, attribute, c_void_p(_ALIGNED_ADDRESS))
    if with_bias:
        _set(description, _EPILOGUE, c_int32(_EPILOGUE_BIAS))
        _set(description, _BIAS_TYPE, c_int32(_BF16))
        _set(description, _BIAS, c_void_p(_ALIGNED_ADDRESS))
    return description


def _layout(dtype: int, rows: int, columns: int, stride: int) -> c_void_p:
    layout = c_void_p()
    _check(_library().cublasLtMatrixLayoutCreate(
        byref(layout), dtype, c_uint64(rows), c_uint64(columns), c_int64(stride)
    ))  # fmt: skip
    return layout


def _set(description: c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    _check(_library().cublasLtMatmulDescSetAttribute(description, attribute, byref(value), c_size_t(sizeof(value))))


def _destroy(description: c_void_p, *layouts: c_void_p) -> None:
    library = _library()
    library.cublasLtMatmulDescDestroy(description)
    for layout in layouts:
        library.cublasLtMatrixLayoutDestroy(layout)


@cache
def _handle(device_index: int) -> c_void_p:
    handle = c_void_p()
    _check(_library().cublasLtCreate(byref(handle)))
    return handle


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLASLt refuses a product of E4M3 matrices (status {status}).")


def _why_not_loaded() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    try:
        library = _library()
    except OSError as error:
        return f"cuBLASLt cannot be called beside PyTorch: {first_line(error)}"
    version = library.cublasLtGetVersion()
    return None if version >= _SINCE else f"cuBLASLt {version} has no scales per row"


@cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded: a library is found by its name once it is in the process."""
    major = str(torch.version.cuda).partition(".")[0]
    library = ctypes.CDLL(f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}")
    library.cublasLtGetVersion.restype = c_size_t
    return library

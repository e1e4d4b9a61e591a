"""Products of bf16 matrices, and of E4M3 ones with a scale per row, by cuBLASLt without a workspace: sooner.

PyTorch offers it a workspace, and it takes kernels that count their tiles in there, which a launch of its own sets to
zero before each product. Without one it takes those whose tiles are dealt out beforehand. Measured in turns with
PyTorch, FLUX's products of 4096 and 4608 tokens: in E4M3 on an H100 0.88 to 0.995 of its time, each bit the same; in
bf16 on an H200 0.96 to 1.00.

Source: cuBLAS library documentation, cublasLtMatmul and CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F (12.9 and newer).
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Sequence
from ctypes import (
    byref,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..errors import first_line
from .cublaslt_kernels import CLUSTERS, TILES, Kernel, preferred
from .products import Product

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
_TRANSPOSED, _EPILOGUE_NONE, _EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS, _SCALE_PER_ROW = 1, 1, 4, 36, 3
_MAX_WORKSPACE_BYTES, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_NVJET = 66
"""The algorithm whose kernels are called nvjet, for Hopper."""
_TILE, _CUSTOM_OPTION, _STAGES, _CLUSTER = 1, 5, 6, 8
_STAGES_OF = {_BF16: 35, _E4M3: 36}
"""As many as fit, of 64 or 128 numbers each."""
_TMA_ALIGNMENT = 16
_FULL_ALIGNMENT = 256
"""Bytes that cuBLASLt takes for granted of addresses if it is told nothing; PyTorch's own allocations have 512."""
_ALIGNED_ADDRESS = 1 << 40
"""Stands for scales and bias while a kernel is chosen, which looks at addresses and reads nothing."""


_Algorithm = c_uint64 * 8
"""cublasLtMatmulAlgo_t."""


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", _Algorithm), ("workspace_bytes", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Work:
    """What a description says: the type of both matrices, and what is done to the sums."""

    matrices: int
    epilogue: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a kernel must take, and which one is meant: None for cuBLASLt's choice."""

    alignment: int
    kernel: Kernel | None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Prepared:
    """What one shape needs at each call."""

    handle: c_void_p
    description: c_void_p
    weight: c_void_p
    rows: c_void_p
    out: c_void_p
    algorithm: ctypes.Array[c_uint64]


@cache
def why_not(device_index: int) -> str | None:
    """Why products on this GPU are PyTorch's, or None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index) != _CAPABILITY:
        return "cuBLASLt's scales per row were measured on compute capability 9.0 alone"
    return _why_not_loaded()


def multiply(
    q: Tensor,
    q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, *,
    kernel: Kernel | None = None,
) -> bool:  # fmt: skip
    """Writes (q * q_scale) @ (weight * weight_scale).T + bias to `out`; False, and nothing written, where it cannot.

    q [M, K] and weight [N, K] are E4M3, q dense in its last axis; q_scale and weight_scale hold M and N fp32 numbers,
    bias [N] and `out` [M, N] are bf16. Sums are Hopper's fast ones. `kernel`: this one alone. Runs on PyTorch's current
    stream.
    """
    epilogue = _EPILOGUE_NONE if bias is None else _EPILOGUE_BIAS
    vectors = ((_A_SCALE, weight_scale), (_B_SCALE, q_scale), (_BIAS, bias))
    return _multiply(Product(q.shape[0], *weight.shape, fp8=True), epilogue, kernel, q, weight, out, vectors)


def multiply_bf16(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gelu: bool = False, onto: bool = False,
    kernel: Kernel | None = None,
) -> bool:  # fmt: skip
    """Writes x @ weight.T + bias to `out`, GELU (tanh form) of it where `gelu`; False, and nothing written, where it
    cannot. `onto` adds what `out` held.

    x [M, K], weight [N, K], bias [N] and `out` [M, N] are bf16, all matrices dense in their last axis. `gelu` needs a
    bias. Sums are in fp32. `kernel`: this one alone. Runs on PyTorch's current stream.
    """
    epilogue = _EPILOGUE_NONE if bias is None else _EPILOGUE_GELU_BIAS if gelu else _EPILOGUE_BIAS
    product = Product(x.shape[0], *weight.shape, gelu=gelu, onto=onto)
    return _multiply(product, epilogue, kernel, x, weight, out, ((_BIAS, bias),))


def _multiply(
    product: Product, epilogue: int, kernel: Kernel | None, x: Tensor, weight: Tensor, out: Tensor,
    vectors: Sequence[tuple[int, Tensor | None]],
) -> bool:  # fmt: skip
    library, one, before = _library(), c_float(1.0), c_float(float(product.onto))
    work, strides = _Work(_E4M3 if product.fp8 else _BF16, epilogue), (x.stride(0), weight.stride(0), out.stride(0))
    with torch.cuda.device(x.device), _LOCK:
        _enter_context(x.device)
        found = _chosen(x.device.index, work, product, strides, _alignment(x, weight, out), kernel)
        if found is None:
            return False
        for attribute, tensor in vectors:
            if tensor is not None:
                _set(found.description, attribute, c_void_p(tensor.data_ptr()))
        _check(library.cublasLtMatmul(
            found.handle, found.description, byref(one), c_void_p(weight.data_ptr()), found.weight,
            c_void_p(x.data_ptr()), found.rows, byref(before), c_void_p(out.data_ptr()), found.out,
            c_void_p(out.data_ptr()), found.out, byref(found.algorithm), None, c_size_t(0),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        ))  # fmt: skip
    return True


def _chosen(
    device_index: int, work: _Work, product: Product, strides: tuple[int, int, int], alignment: int,
    kernel: Kernel | None,
) -> _Prepared | None:  # fmt: skip
    """The product with `kernel`; without one, with the preferred one where it fits, else with cuBLASLt's choice."""
    size = (product.rows, product.columns, product.width, *strides)
    if kernel is not None:
        return _prepared(device_index, work, _Wish(alignment, kernel), *size)
    liked = preferred(device_index, product)
    found = None if liked is None else _prepared(device_index, work, _Wish(alignment, liked), *size)
    return found or _prepared(device_index, work, _Wish(alignment, None), *size)


def _enter_context(device: torch.device) -> None:
    """CUDA's context belongs to a thread, which gets it with the first launch of PyTorch's: cuBLASLt makes none."""
    known = vars(_THREAD).setdefault("devices", set())
    if device.index not in known:
        torch.zeros(1, device=device)
        known.add(device.index)


@lru_cache(maxsize=_KEPT_SHAPES)
def _prepared(
    device_index: int, work: _Work, wish: _Wish, rows: int, columns: int, width: int, stride: int, weight_stride: int,
    out_stride: int,
) -> _Prepared | None:  # fmt: skip
    """None where cuBLASLt has no such kernel, for the current GPU. In its order, columns first, the product is
    out^T = weight @ x^T."""
    handle = _handle(device_index)
    made = (_description(work), _layout(work.matrices, width, columns, weight_stride),
            _layout(work.matrices, width, rows, stride), _layout(_BF16, columns, rows, out_stride))  # fmt: skip
    algorithm = _proposed(handle, *made, wish.alignment) if wish.kernel is None else _named(handle, *made, work, wish)
    if algorithm is None:
        _destroy(*made)
        return None
    prepared = _Prepared(handle, *made, algorithm)
    weakref.finalize(prepared, _destroy, *made)
    return prepared


def _alignment(*matrices: Tensor) -> int:
    """The largest power of two, in bytes, that divides all addresses."""
    together = _FULL_ALIGNMENT
    for matrix in matrices:
        together |= matrix.data_ptr()
    return together & -together


def _proposed(
    handle: c_void_p, description: c_void_p, weight: c_void_p, rows: c_void_p, out: c_void_p, alignment: int
) -> _Algorithm | None:
    library, preference, found, count = _library(), c_void_p(), _Found(), c_int()
    _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
    try:
        alignments = ((name, c_uint32(alignment)) for name in _MIN_ALIGNMENTS)
        for attribute, value in ((_MAX_WORKSPACE_BYTES, c_size_t(0)), *alignments):
            _check(library.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), c_size_t(sizeof(value))
            ))  # fmt: skip
        status = library.cublasLtMatmulAlgoGetHeuristic(
            handle, description, weight, rows, out, out, preference, 1, byref(found), byref(count)
        )
    finally:
        library.cublasLtMatmulPreferenceDestroy(preference)
    return found.algorithm if status == 0 and count.value and found.state == 0 else None


def _named(
    handle: c_void_p, description: c_void_p, weight: c_void_p, rows: c_void_p, out: c_void_p, work: _Work, wish: _Wish
) -> _Algorithm | None:
    """The kernel that is wished for, where cuBLASLt has it, and says that it computes this product without workspace.

    cuBLASLt is not told addresses before it runs, so that their alignment is looked at here.
    """
    kernel, library, algorithm, found = wish.kernel, _library(), _Algorithm(), _Found()
    if kernel is None or wish.alignment < _TMA_ALIGNMENT:
        return None
    types = (_COMPUTE_FP32, _FP32, work.matrices, work.matrices, _BF16, _BF16)
    if library.cublasLtMatmulAlgoInit(handle, *types, _NVJET, byref(algorithm)):
        return None
    numbers = (
        (_TILE, c_uint32(TILES[kernel.tile])), (_STAGES, c_uint32(_STAGES_OF[work.matrices])),
        (_CUSTOM_OPTION, c_uint32(kernel.option)), (_CLUSTER, c_uint16(CLUSTERS[kernel.cluster])),
    )  # fmt: skip
    for attribute, value in numbers:
        if library.cublasLtMatmulAlgoConfigSetAttribute(
            byref(algorithm), attribute, byref(value), c_size_t(sizeof(value))
        ):
            return None
    layouts = (weight, rows, out, out)
    status = library.cublasLtMatmulAlgoCheck(handle, description, *layouts, byref(algorithm), byref(found))
    return algorithm if status == 0 and found.state == 0 else None


def _description(work: _Work) -> c_void_p:
    description = c_void_p()
    _check(_library().cublasLtMatmulDescCreate(byref(description), _COMPUTE_FP32, _FP32))
    _set(description, _TRANSPOSE_A, c_int32(_TRANSPOSED))
    if work.matrices == _E4M3:
        _set(description, _FAST_ACCUM, c_int8(1))
        for attribute in (_A_MODE, _B_MODE):
            _set(description, attribute, c_int32(_SCALE_PER_ROW))
        for attribute in (_A_SCALE, _B_SCALE):
            _set(description, attribute, c_void_p(_ALIGNED_ADDRESS))
    if work.epilogue != _EPILOGUE_NONE:
        _set(description, _EPILOGUE, c_int32(work.epilogue))
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
        raise RuntimeError(f"cuBLASLt refuses a product of matrices (status {status}).")


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

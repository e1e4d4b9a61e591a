"""cuBLASLt through ctypes: descriptions of products, layouts of matrices, and kernels by its proposal or by number.

Source: cuBLAS library documentation, cublasLt API; numbers are those of cublasLt.h and library_types.h.
"""

from __future__ import annotations

import ctypes
import sys
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
from functools import cache

import torch

from ..errors import first_line
from .cublaslt_kernels import CLUSTERS, TILES, Kernel

_SINCE = 120900
E4M3, BF16, _FP32, _COMPUTE_FP32 = 28, 14, 0, 68
_TRANSPOSE_A, _EPILOGUE, BIAS, A_SCALE, B_SCALE, _FAST_ACCUM, _BIAS_TYPE, _A_MODE, _B_MODE = (
    3, 7, 8, 17, 18, 25, 26, 31, 32,
)  # fmt: skip
_TRANSPOSED, EPILOGUE_NONE, EPILOGUE_BIAS, EPILOGUE_GELU_BIAS, _SCALE_PER_ROW = 1, 1, 4, 36, 3
_MAX_WORKSPACE_BYTES, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_NVJET = 66
"""The algorithm whose kernels are called nvjet, for Hopper."""
_TILE, _CUSTOM_OPTION, _STAGES, _CLUSTER = 1, 5, 6, 8
_STAGES_OF = {BF16: 35, E4M3: 36}
"""As many as fit, of 64 or 128 numbers each."""
_TMA_ALIGNMENT = 16
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
class Work:
    """What a description says: the type of both matrices, and what is done to the sums."""

    matrices: int
    epilogue: int


@dataclass(frozen=True, slots=True)
class Described:
    """A product in cuBLASLt's words, on the GPU whose handle it is."""

    handle: c_void_p
    work: Work
    description: c_void_p
    weight: c_void_p
    rows: c_void_p
    out: c_void_p

    @property
    def layouts(self) -> tuple[c_void_p, c_void_p, c_void_p, c_void_p]:
        return self.weight, self.rows, self.out, self.out


def describe(
    device_index: int, work: Work, rows: int, columns: int, width: int, strides: tuple[int, int, int]
) -> Described:
    """`strides`: between rows of x, of the weight and of the result. In cuBLASLt's order, columns first, the product is
    out^T = weight @ x^T."""
    x_stride, weight_stride, out_stride = strides
    weight, x = (_layout(work.matrices, width, n, stride) for n, stride in ((columns, weight_stride), (rows, x_stride)))
    return Described(
        _handle(device_index), work, _description(work), weight, x, _layout(BF16, columns, rows, out_stride)
    )


def destroy(described: Described) -> None:
    library = load()
    library.cublasLtMatmulDescDestroy(described.description)
    for layout in (described.weight, described.rows, described.out):
        library.cublasLtMatrixLayoutDestroy(layout)


def proposed(described: Described, alignment: int) -> ctypes.Array[c_uint64] | None:
    """The kernel that cuBLASLt thinks the fastest, for addresses that are multiples of `alignment` bytes."""
    library, preference, found, count = load(), c_void_p(), _Found(), c_int()
    check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
    try:
        alignments = ((name, c_uint32(alignment)) for name in _MIN_ALIGNMENTS)
        for attribute, value in ((_MAX_WORKSPACE_BYTES, c_size_t(0)), *alignments):
            check(library.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), c_size_t(sizeof(value))
            ))  # fmt: skip
        status = library.cublasLtMatmulAlgoGetHeuristic(
            described.handle, described.description, *described.layouts, preference, 1, byref(found), byref(count)
        )
    finally:
        library.cublasLtMatmulPreferenceDestroy(preference)
    return found.algorithm if status == 0 and count.value and found.state == 0 else None


def named(described: Described, kernel: Kernel, alignment: int) -> ctypes.Array[c_uint64] | None:
    """This kernel, where cuBLASLt has it and says that it computes the product without a workspace.

    cuBLASLt is not told addresses before it runs, so that their alignment is looked at here.
    """
    algorithm, found = _algorithm(described.work, described.handle, kernel), _Found()
    if algorithm is None or alignment < _TMA_ALIGNMENT:
        return None
    status = load().cublasLtMatmulAlgoCheck(
        described.handle, described.description, *described.layouts, byref(algorithm), byref(found)
    )
    return algorithm if status == 0 and found.state == 0 else None


def _algorithm(work: Work, handle: c_void_p, kernel: Kernel) -> ctypes.Array[c_uint64] | None:
    library, algorithm = load(), _Algorithm()
    types = (_COMPUTE_FP32, _FP32, work.matrices, work.matrices, BF16, BF16)
    if library.cublasLtMatmulAlgoInit(handle, *types, _NVJET, byref(algorithm)):
        return None
    numbers = (
        (_TILE, c_uint32(TILES[kernel.tile])), (_STAGES, c_uint32(_STAGES_OF[work.matrices])),
        (_CUSTOM_OPTION, c_uint32(kernel.option)), (_CLUSTER, c_uint16(CLUSTERS[kernel.cluster])),
    )  # fmt: skip
    statuses = [
        library.cublasLtMatmulAlgoConfigSetAttribute(byref(algorithm), name, byref(value), c_size_t(sizeof(value)))
        for name, value in numbers
    ]
    return None if any(statuses) else algorithm


def _description(work: Work) -> c_void_p:
    description = c_void_p()
    check(load().cublasLtMatmulDescCreate(byref(description), _COMPUTE_FP32, _FP32))
    set_attribute(description, _TRANSPOSE_A, c_int32(_TRANSPOSED))
    if work.matrices == E4M3:
        set_attribute(description, _FAST_ACCUM, c_int8(1))
        for attribute in (_A_MODE, _B_MODE):
            set_attribute(description, attribute, c_int32(_SCALE_PER_ROW))
        for attribute in (A_SCALE, B_SCALE):
            set_attribute(description, attribute, c_void_p(_ALIGNED_ADDRESS))
    if work.epilogue != EPILOGUE_NONE:
        set_attribute(description, _EPILOGUE, c_int32(work.epilogue))
        set_attribute(description, _BIAS_TYPE, c_int32(BF16))
        set_attribute(description, BIAS, c_void_p(_ALIGNED_ADDRESS))
    return description


def _layout(dtype: int, rows: int, columns: int, stride: int) -> c_void_p:
    layout = c_void_p()
    check(load().cublasLtMatrixLayoutCreate(
        byref(layout), dtype, c_uint64(rows), c_uint64(columns), c_int64(stride)
    ))  # fmt: skip
    return layout


def set_attribute(description: c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    check(load().cublasLtMatmulDescSetAttribute(description, attribute, byref(value), c_size_t(sizeof(value))))


@cache
def _handle(device_index: int) -> c_void_p:
    handle = c_void_p()
    check(load().cublasLtCreate(byref(handle)))
    return handle


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLASLt refuses a product of matrices (status {status}).")


def why_not_loaded() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    try:
        library = load()
    except OSError as error:
        return f"cuBLASLt cannot be called beside PyTorch: {first_line(error)}"
    version = library.cublasLtGetVersion()
    return None if version >= _SINCE else f"cuBLASLt {version} has no scales per row"


@cache
def load() -> ctypes.CDLL:
    """The one that PyTorch has loaded: a library is found by its name once it is in the process."""
    major = str(torch.version.cuda).partition(".")[0]
    library = ctypes.CDLL(f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}")
    library.cublasLtGetVersion.restype = c_size_t
    return library

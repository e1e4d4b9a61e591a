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
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
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
_TRANSPOSED, _EPILOGUE_NONE, _EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS, _SCALE_PER_ROW = 1, 1, 4, 36, 3
_MAX_WORKSPACE_BYTES, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_FULL_ALIGNMENT = 256
"""Bytes that cuBLASLt takes for granted of addresses if it is told nothing; PyTorch's own allocations have 512."""
_ALIGNED_ADDRESS = 1 << 40
"""Stands for scales and bias while a kernel is chosen, which looks at addresses and reads nothing."""


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8), ("workspace_bytes", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proposal:
    """Which of the kernels that cuBLASLt proposes, from 0, the one it thinks the fastest; and memory that they may use,
    which must stay until the product is done."""

    place: int = 0
    workspace: Tensor | None = None


FIRST = Proposal()


@dataclass(frozen=True, slots=True)
class _Work:
    """What a description says: the type of both matrices, and what is done to the sums."""

    matrices: int
    epilogue: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a kernel must take, and which of those that do is meant."""

    alignment: int
    place: int
    workspace_bytes: int


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
    q: Tensor,
    q_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, *,
    proposal: Proposal = FIRST,
) -> bool:  # fmt: skip
    """Writes (q * q_scale) @ (weight * weight_scale).T + bias to `out`; False, and nothing written, where it cannot.

    q [M, K] and weight [N, K] are E4M3, q dense in its last axis; q_scale and weight_scale hold M and N fp32 numbers,
    bias [N] and `out` [M, N] are bf16. Sums are Hopper's fast ones. Runs on PyTorch's current stream.
    """
    work = _Work(_E4M3, _EPILOGUE_NONE if bias is None else _EPILOGUE_BIAS)
    vectors = ((_A_SCALE, weight_scale), (_B_SCALE, q_scale), (_BIAS, bias))
    return _multiply(work, proposal, q, weight, out, vectors, 0.0)


def multiply_bf16(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gelu: bool = False, onto: bool = False,
    proposal: Proposal = FIRST,
) -> bool:  # fmt: skip
    """Writes x @ weight.T + bias to `out`, GELU (tanh form) of it where `gelu`; False, and nothing written, where it
    cannot. `onto` adds what `out` held.

    x [M, K], weight [N, K], bias [N] and `out` [M, N] are bf16, all matrices dense in their last axis. `gelu` needs a
    bias. Sums are in fp32. Runs on PyTorch's current stream.
    """
    epilogue = _EPILOGUE_NONE if bias is None else _EPILOGUE_GELU_BIAS if gelu else _EPILOGUE_BIAS
    return _multiply(_Work(_BF16, epilogue), proposal, x, weight, out, ((_BIAS, bias),), 1.0 if onto else 0.0)


def _multiply(
    work: _Work, proposal: Proposal, x: Tensor, weight: Tensor, out: Tensor,
    vectors: Sequence[tuple[int, Tensor | None]], beta: float,
) -> bool:  # fmt: skip
    library, one, before, room = _library(), c_float(1.0), c_float(beta), proposal.workspace
    room_bytes, room_address = (0, None) if room is None else (room.nbytes, room.data_ptr())
    wish = _Wish(_alignment(x, weight, out), proposal.place, room_bytes)
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    with torch.cuda.device(x.device), _LOCK:
        _enter_context(x.device)
        product = _product_of(x.device.index, work, wish, x.shape[0], *weight.shape, *strides)
        if product is None:
            return False
        for attribute, tensor in vectors:
            if tensor is not None:
                _set(product.description, attribute, c_void_p(tensor.data_ptr()))
        _check(library.cublasLtMatmul(
            product.handle, product.description, byref(one), c_void_p(weight.data_ptr()), product.weight,
            c_void_p(x.data_ptr()), product.rows, byref(before), c_void_p(out.data_ptr()), product.out,
            c_void_p(out.data_ptr()), product.out, byref(product.found.algorithm), c_void_p(room_address),
            c_size_t(room_bytes), c_void_p(torch.cuda.current_stream().cuda_stream),
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
    device_index: int, work: _Work, wish: _Wish, rows: int, columns: int, width: int, stride: int, weight_stride: int,
    out_stride: int,
) -> _Product | None:  # fmt: skip
    """None where cuBLASLt has no such kernel, for the current GPU. In its order, columns first, the product is
    out^T = weight @ x^T."""
    handle = _handle(device_index)
    made = (_description(work), _layout(work.matrices, width, columns, weight_stride),
            _layout(work.matrices, width, rows, stride), _layout(_BF16, columns, rows, out_stride))  # fmt: skip
    found = _found(handle, *made, wish)
    if found is None:
        _destroy(*made)
        return None
    product = _Product(handle, *made, found)
    weakref.finalize(product, _destroy, *made)
    return product


def _alignment(*matrices: Tensor) -> int:
    """The largest power of two, in bytes, that divides all addresses."""
    together = _FULL_ALIGNMENT
    for matrix in matrices:
        together |= matrix.data_ptr()
    return together & -together


def _found(
    handle: c_void_p, description: c_void_p, weight: c_void_p, rows: c_void_p, out: c_void_p, wish: _Wish
) -> _Found | None:
    library, preference, found, count = _library(), c_void_p(), (_Found * (wish.place + 1))(), c_int()
    _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
    try:
        alignments = ((name, c_uint32(wish.alignment)) for name in _MIN_ALIGNMENTS)
        for attribute, value in ((_MAX_WORKSPACE_BYTES, c_size_t(wish.workspace_bytes)), *alignments):
            _check(library.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), c_size_t(sizeof(value))
            ))  # fmt: skip
        status = library.cublasLtMatmulAlgoGetHeuristic(
            handle, description, weight, rows, out, out, preference, wish.place + 1, found, byref(count)
        )
    finally:
        library.cublasLtMatmulPreferenceDestroy(preference)
    there = status == 0 and count.value > wish.place and found[wish.place].state == 0
    return _Found.from_buffer_copy(found[wish.place]) if there else None


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

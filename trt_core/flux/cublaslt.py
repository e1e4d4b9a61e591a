"""Products of bf16 matrices, and of E4M3 ones with a scale per row, by cuBLASLt without a workspace: sooner.

PyTorch offers it a workspace, and it takes kernels that count their tiles in there, which a launch of its own sets to
zero before each product. Without one it takes those whose tiles are dealt out beforehand. Measured in turns with
PyTorch, FLUX's products of 4096 and 4608 tokens: in E4M3 on an H100 0.88 to 0.995 of its time, each bit the same; in
bf16 on an H200 0.96 to 1.00.

Source: cuBLAS library documentation, cublasLtMatmul and CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F (12.9 and newer).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import cublaslt_library as lt
from .cublaslt_kernels import OWN, Kernel, preferred
from .cublaslt_library import Described, Work
from .products import Product

_CAPABILITY = (9, 0)
"""Hopper: where this was measured. Ada's cuBLASLt has no scales per row."""
_KEPT_SHAPES = 512
_LOCK = threading.Lock()
"""A description holds the addresses of one call."""
_THREAD = threading.local()
_FULL_ALIGNMENT = 256
"""Bytes that cuBLASLt takes for granted of addresses if it is told nothing; PyTorch's own allocations have 512."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a kernel must take, and which one is meant."""

    alignment: int
    kernel: Kernel


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Prepared:
    """What one shape needs at each call."""

    described: Described
    algorithm: ctypes.Array[c_uint64]


@cache
def why_not(device_index: int) -> str | None:
    """Why products on this GPU are PyTorch's, or None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index) != _CAPABILITY:
        return "cuBLASLt's scales per row were measured on compute capability 9.0 alone"
    return lt.why_not_loaded()


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
    epilogue = lt.EPILOGUE_NONE if bias is None else lt.EPILOGUE_BIAS
    vectors = ((lt.A_SCALE, weight_scale), (lt.B_SCALE, q_scale), (lt.BIAS, bias))
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
    epilogue = lt.EPILOGUE_NONE if bias is None else lt.EPILOGUE_GELU_BIAS if gelu else lt.EPILOGUE_BIAS
    product = Product(x.shape[0], *weight.shape, gelu=gelu, onto=onto)
    return _multiply(product, epilogue, kernel, x, weight, out, ((lt.BIAS, bias),))


def _multiply(
    product: Product, epilogue: int, kernel: Kernel | None, x: Tensor, weight: Tensor, out: Tensor,
    vectors: Sequence[tuple[int, Tensor | None]],
) -> bool:  # fmt: skip
    one, before = c_float(1.0), c_float(float(product.onto))
    work, strides = Work(lt.E4M3 if product.fp8 else lt.BF16, epilogue), (x.stride(0), weight.stride(0), out.stride(0))
    with torch.cuda.device(x.device), _LOCK:
        _enter_context(x.device)
        found = _chosen(x.device.index, work, product, strides, _alignment(x, weight, out), kernel)
        if found is None:
            return False
        about = found.described
        for attribute, tensor in vectors:
            if tensor is not None:
                lt.set_attribute(about.description, attribute, c_void_p(tensor.data_ptr()))
        lt.check(lt.load().cublasLtMatmul(
            about.handle, about.description, byref(one), c_void_p(weight.data_ptr()), about.weight,
            c_void_p(x.data_ptr()), about.rows, byref(before), c_void_p(out.data_ptr()), about.out,
            c_void_p(out.data_ptr()), about.out, byref(found.algorithm), None, c_size_t(0),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        ))  # fmt: skip
    return True


def _chosen(
    device_index: int, work: Work, product: Product, strides: tuple[int, int, int], alignment: int,
    kernel: Kernel | None,
) -> _Prepared | None:  # fmt: skip
    """The product with `kernel`; without one, with the preferred one where it fits, else with cuBLASLt's choice."""
    size = (product.rows, product.columns, product.width, strides)
    wanted = kernel or preferred(device_index, product) or OWN
    found = _prepared(device_index, work, _Wish(alignment, wanted), *size)
    return found if found or kernel else _prepared(device_index, work, _Wish(alignment, OWN), *size)


def _enter_context(device: torch.device) -> None:
    """CUDA's context belongs to a thread, which gets it with the first launch of PyTorch's: cuBLASLt makes none."""
    known = vars(_THREAD).setdefault("devices", set())
    if device.index not in known:
        torch.zeros(1, device=device)
        known.add(device.index)


@lru_cache(maxsize=_KEPT_SHAPES)
def _prepared(
    device_index: int, work: Work, wish: _Wish, rows: int, columns: int, width: int, strides: tuple[int, int, int]
) -> _Prepared | None:
    """None where cuBLASLt has no such kernel, for the current GPU."""
    described = lt.describe(device_index, work, rows, columns, width, strides)
    algorithm = (
        lt.proposed(described, wish.alignment)
        if wish.kernel == OWN
        else lt.named(described, wish.kernel, wish.alignment)
    )
    if algorithm is None:
        lt.destroy(described)
        return None
    prepared = _Prepared(described, algorithm)
    weakref.finalize(prepared, lt.destroy, described)
    return prepared


def _alignment(*matrices: Tensor) -> int:
    """The largest power of two, in bytes, that divides all addresses."""
    together = _FULL_ALIGNMENT
    for matrix in matrices:
        together |= matrix.data_ptr()
    return together & -together

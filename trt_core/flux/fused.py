"""What Inductor fuses badly: other kernels inside its code on a GPU, plain PyTorch everywhere else.

Triton's, measured on one H200 at 4608 tokens and hidden 3072. q/k norm and RoPE: Inductor's own kernel takes 0.116 ms
for q and k of a single block and 0.12 ms for those of a double block, where reading and writing them once takes 0.03.
Layer norm and modulation: 0.046 ms for 0.015. GELU and the join with attention's output: 0.107 ms for 0.055.

cuBLAS's, for weights that are not FP8: a product applies the GELU to its sums before it rounds and stores them.
Measured on an H100, whole blocks in bf16: a double block takes 2.10 for 2.13 ms at 4608 tokens (at 8704 the same), a
single block, whose linear layers are cut so that nothing has to be joined, 2.02 for 2.09 ms (5.09 for 5.05 at 9216).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cublaslt, cublaslt_kernels, operators
from .open_sum import OpenSum
from .products import Product
from .rope import rotate
from .rows import portions, together

EPS = 1e-6
MAX_ROW = 16384
"""A program of the row kernels holds a whole row in registers; wider rows take the plain path."""

Layer = tuple[Tensor, Tensor]
"""Weight [N, K] and bias [N]."""

_kernels: ModuleType | None = None
_row_kernels: ModuleType | None = None
_weight_kernels: ModuleType | None = None
_attention_kernels: ModuleType | None = None


def load_kernels() -> None:
    """Imports the Triton kernels where Triton is installed. Before compiling: Dynamo does not trace imports well."""
    global _kernels, _row_kernels, _weight_kernels, _attention_kernels
    if _kernels is None and _triton_installed():
        from . import triton_attention, triton_kernels, triton_rows, triton_weights

        _kernels, _row_kernels, _weight_kernels = triton_kernels, triton_rows, triton_weights
        _attention_kernels = triton_attention


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def row_kernels(x: Tensor, width: int) -> ModuleType | None:
    """`triton_rows` where Dynamo is compiling for `x` [B, L, K] on a GPU and rows of `width` fit, else None."""
    return _row_kernels if _use_kernels(x) and x.dim() == 3 and width <= MAX_ROW else None


def attention_kernels(qkv: Tensor) -> ModuleType | None:
    """`triton_attention` where Dynamo is compiling for `qkv` on a GPU, else None."""
    return _attention_kernels if _use_kernels(qkv) else None


def weight_kernels(weight: Tensor) -> ModuleType | None:
    """`triton_weights` for eager calls on `weight` [N, K], or None: no GPU, no Triton, or rows that are too wide."""
    if not weight.is_cuda or weight.shape[-1] > MAX_ROW:
        return None
    load_kernels()
    return _weight_kernels


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of `x` [B, L, D] without weights, then * (1 + scale) + shift; shift and scale [B, D]."""
    kernels = row_kernels(x, x.shape[-1])
    if kernels is not None:
        return kernels.modulated_norm(x, shift, scale, EPS)
    normed = F.layer_norm(x, (x.shape[-1],), eps=EPS)
    return normed * (1 + scale[:, None, :]) + shift[:, None, :]


def gated_norm(stream: OpenSum, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The stream added up [B, L, D], and its `modulated_norm`."""
    kernels = row_kernels(stream.x, stream.x.shape[-1])
    if kernels is not None:
        return kernels.gated_norm(stream, shift, scale, EPS)
    x = stream.closed()
    return x, modulated_norm(x, shift, scale)


def join_gelu(attn: Tensor, mlp: Tensor) -> Tensor:
    """[B, L, hidden + mlp_hidden]: attn [B, L, hidden], then GELU (tanh form) of mlp [B, L, mlp_hidden]."""
    kernels = row_kernels(mlp, attn.shape[-1] + mlp.shape[-1])
    if kernels is not None:
        return kernels.join_gelu(attn, mlp)
    return torch.cat((attn, F.gelu(mlp, approximate="tanh")), -1)


def has_gelu_epilogue(x: Tensor) -> bool:
    """Whether `gelu_product` of x is one kernel: inside Inductor's code on a GPU, in 16 bits.

    Not in fp32: how many of its digits cuBLAS's GELU gets right was not measured.
    """
    return _use_kernels(x) and x.dtype in (torch.bfloat16, torch.float16)


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight^T + bias) [..., N] (tanh form), rounded once where x has the epilogue; x [..., K], weight [N, K].

    PyTorch's `_addmm_activation` leaves all of it to cuBLASLt, also for a weight whose rows are far apart, if bias is a
    vector and the result is contiguous, and Inductor calls it as it is (2.11: `isInputCompliesAddmmCudaLt` in Blas.cpp,
    `make_fallback` in lowering.py). Written into a part of longer rows, bias and GELU would be kernels again: that is
    why the MLP's half is not put beside attention's output for one second product.
    """
    if not has_gelu_epilogue(x):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if _is_ours(x):
        return _PLAIN_PRODUCT(x, weight, bias, True)
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


def plain_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] @ weight^T + bias; weight [N, K]."""
    if _use_kernels(x) and _is_ours(x):
        return _PLAIN_PRODUCT(x, weight, bias, False)
    return F.linear(x, weight, bias)


def _is_ours(x: Tensor) -> bool:
    """Whether products of x are `cublaslt`'s: in bf16.

    H200, in turns with PyTorch: 35 products of 512 to 4608 rows took 0.986 of its time in the mean and 1.004 at most,
    20 of 8704 to 16896 rows 0.999 (0.975 to 1.016); with kernels that were measured (`kernel_ranking`) less.
    """
    return x.dtype is torch.bfloat16 and x.dim() == 3


def joined_product(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """attn [..., K] and mlp [..., M] joined, @ weight^T + bias: the second part's product added onto the first one's.

    Attention's part is the first, because it is rounded twice and is the smaller one: a fifth of the columns, and
    averages of values. Two rounded products summed in the kernel that follows are 0.04 ms slower (H100, 4608 tokens).
    """
    return _ACCUMULATED_PRODUCT(attn, mlp, weight, bias)


def norm_rope(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D] after RMS norm over D with `scale` [D] and RoPE by cos, sin [L, D / 2], rounded once."""
    if _use_kernels(x) and _kernels is not None:
        return _kernels.norm_rope(x, x, scale, scale, cos, sin, cos, sin, 0, EPS)
    return rotate(rms_norm(x, scale), cos, sin).to(x.dtype)


def joint_norm_rope(
    txt: Tensor, img: Tensor, txt_scale: Tensor, img_scale: Tensor,
    txt_cos: Tensor, txt_sin: Tensor, img_cos: Tensor, img_sin: Tensor,
) -> Tensor:  # fmt: skip
    """`norm_rope` of txt and img, each with its own scale and angles, joined along the tokens, text first."""
    if _use_kernels(img) and _kernels is not None:
        return _kernels.norm_rope(img, txt, img_scale, txt_scale, img_cos, img_sin, txt_cos, txt_sin, txt.shape[1], EPS)
    parts = (norm_rope(txt, txt_scale, txt_cos, txt_sin), norm_rope(img, img_scale, img_cos, img_sin))
    return torch.cat(parts, dim=1)


def norm_rope_qk(
    img: Tensor, txt: Tensor | None, img_scales: tuple[Tensor, Tensor], txt_scales: tuple[Tensor, Tensor],
    img_angles: tuple[Tensor, Tensor], txt_angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`norm_rope`, or with `txt` `joint_norm_rope`, of q and of k, each [B, L, H, D].

    `img` [B, n_img, ...] and `txt` hold q, then k in their first columns, dense in the last axis. Scales: q's and k's.
    """
    dim = img_scales[0].shape[0]
    if _use_kernels(img) and _kernels is not None:
        n_txt, other = (0, img) if txt is None else (txt.shape[1], txt)
        parts = (_heads(img, 0, dim), _heads(other, 0, dim), img_scales, txt_scales, *img_angles, *txt_angles)
        both = _kernels.norm_rope_qk(*parts, n_txt, EPS)
        return both[0], both[1]
    q, k = (
        norm_rope(_heads(img, n, dim), img_scales[n], *img_angles)
        if txt is None
        else joint_norm_rope(
            _heads(txt, n, dim), _heads(img, n, dim), txt_scales[n], img_scales[n], *txt_angles, *img_angles
        )
        for n in (0, 1)
    )
    return q, k


def joint_product(img: Tensor, txt: Tensor, img_layer: Layer, txt_layer: Layer) -> Tensor:
    """Both streams' products [1, n_txt + n_img, N], text first: written where they are wanted, they need no joining."""
    return _JOINT_PRODUCT(img, txt, *img_layer, *txt_layer)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm over the last axis. Compiled, it stays in fp32 and is fused with RoPE; eager, it is one kernel."""
    if not torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), scale, eps=EPS)
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * scale.float()


def _use_kernels(x: Tensor) -> bool:
    """Only inside Inductor's code: TensorRT's export must see plain operations, and eager is everyone's reference."""
    # Not is_exporting(): Dynamo answers True to that as well.
    return x.is_cuda and torch.compiler.is_dynamo_compiling()


def _heads(qkv: Tensor, part: int, dim: int) -> Tensor:
    """q, k or v [B, n, H, D] of [B, n, 3 * H * D], a view."""
    width = qkv.shape[-1] // 3
    return qkv[..., part * width : (part + 1) * width].unflatten(-1, (-1, dim))


def _joint_product(
    img: Tensor, txt: Tensor, img_weight: Tensor, img_bias: Tensor, txt_weight: Tensor, txt_bias: Tensor
) -> Tensor:
    n_txt = txt.shape[1]
    out = img.new_empty((n_txt + img.shape[1], img_weight.shape[0]))
    write_product(txt[0], txt_weight, txt_bias, out[:n_txt])
    write_product(img[0], img_weight, img_bias, out[n_txt:])
    return out[None]


def _empty_joint_product(
    img: Tensor, txt: Tensor, img_weight: Tensor, img_bias: Tensor, txt_weight: Tensor, txt_bias: Tensor
) -> Tensor:
    return img.new_empty((1, txt.shape[1] + img.shape[1], img_weight.shape[0]))


def _accumulated_product(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = attn.shape[-1]
    out = _empty_product(attn, mlp, weight, bias)
    flat = out.flatten(0, -2)
    write_product(attn.flatten(0, -2), weight[:, :width], bias, flat)
    write_product(mlp.flatten(0, -2), weight[:, width:], None, flat)
    return out


def _plain_product(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    out = _empty_plain_product(x, weight, bias, gelu)
    for rows, part in together(x, out):
        write_product(rows, weight, bias, part, gelu=gelu)
    return out


def _empty_plain_product(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def write_product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gelu: bool = False) -> None:
    """Writes rows @ weight^T + bias to `out`, GELU of it where `gelu`; without a bias, adds the product onto `out`.

    rows [M, K], weight [N, K], bias [N], out [M, N]. For eager calls; by `cublaslt` where it can.
    """
    if not _fits_cublaslt(rows, weight):
        product_by_pytorch(rows, weight, bias, out, gelu)
        return
    about = {"gelu": gelu, "onto": bias is None}
    most = cublaslt_kernels.at_once(rows.device.index, Product(rows.shape[0], *weight.shape, **about))
    for x, part in portions(most, rows, out):
        if not cublaslt.multiply_bf16(x, weight, bias, part, **about):
            product_by_pytorch(x, weight, bias, part, gelu)


def product_by_pytorch(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gelu: bool = False) -> None:
    """`write_product` in eager PyTorch."""
    if bias is None:
        out.addmm_(rows, weight.t())
    elif gelu:
        torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _fits_cublaslt(rows: Tensor, weight: Tensor) -> bool:
    whole = rows.is_cuda and rows.dtype is torch.bfloat16 and rows.stride(1) == 1 == weight.stride(1)
    return whole and cublaslt.why_not(rows.device.index) is None


def _empty_product(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return attn.new_empty((*attn.shape[:-1], weight.shape[0]))


# An operator, because Inductor calls `addmm` out of place, and then PyTorch copies the first result before cuBLAS adds
# onto the copy.
_ACCUMULATED_PRODUCT = operators.define(
    __name__, "accumulated_product(Tensor attn, Tensor mlp, Tensor weight, Tensor bias) -> Tensor",
    _accumulated_product, _accumulated_product, _empty_product,
)  # fmt: skip

# An operator, because Inductor calls PyTorch's `addmm`, which gives cuBLASLt a workspace.
_PLAIN_PRODUCT = operators.define(
    __name__, "plain_product(Tensor x, Tensor weight, Tensor bias, bool gelu) -> Tensor",
    _plain_product, _plain_product, _empty_plain_product,
)  # fmt: skip

# An operator, because Inductor lets no product write into a part of a tensor. For one picture: of several, the rows of
# either stream are not together.
_JOINT_PRODUCT = operators.define(
    __name__,
    "joint_product(Tensor img, Tensor txt, Tensor img_weight, Tensor img_bias, Tensor txt_weight, Tensor txt_bias)"
    " -> Tensor",
    _joint_product, _joint_product, _empty_joint_product,
)  # fmt: skip

"""Runs FLUX's blocks through compiled segments, inside ComfyUI's own forward.

ComfyUI's `forward_orig` runs as it is; each block is replaced through `patches_replace["dit"]`, the hook it offers for
that. So positions, reference latents, guidance, ControlNet residuals, LoRA on what lies around the blocks, and whatever
a later ComfyUI adds there are ComfyUI's own, bit for bit; only the blocks, 99 % of the work, are ours. A forward of our
own would save nothing measurable and would have to follow every change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...trt_core.background import run_cancellable
from ...trt_core.block_runner import BlockRunner
from ...trt_core.execution import Pe
from ...trt_core.mutable_module import MutableTRTModule
from ...trt_core.weights import BoundWeights
from . import weights

Replacement = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
_LENT_OPTIONS: Mapping[str, Any] = {
    "comfy_cast_weights": False, "weight_function": [], "bias_function": [], "_full_precision_mm": True,
}  # fmt: skip
"""What makes a ComfyUI layer take its parameters as they are."""


class Lender:
    """Lends the bound weights, LoRAs merged, to ComfyUI's own block while it runs: no second merge, and no second copy
    but of FP8 weights, which the block gets in the compute dtype."""

    def __init__(self, name: str, block: nn.Module, bound: BoundWeights) -> None:
        self._parts = []
        for path, module in block.named_modules():
            lent = {}
            for kind in ("weight", "bias"):
                tensor = bound.readable(weights.bfl_name(f"{name}.{path}.{kind}"))
                if tensor is not None:
                    lent[kind] = nn.Parameter(tensor, requires_grad=False)
            if lent:
                self._parts.append((module, lent))

    @contextmanager
    def lent(self) -> Iterator[None]:
        before = [(module, dict(module._parameters), dict(module.__dict__)) for module, _ in self._parts]
        try:
            for module, lent in self._parts:
                module._parameters.update(lent)
                module.__dict__.update(_LENT_OPTIONS)
            yield
        finally:
            for module, parameters, state in before:
                module._parameters.update(parameters)
                for option in _LENT_OPTIONS:
                    if option in state:
                        module.__dict__[option] = state[option]
                    else:
                        del module.__dict__[option]


class BlockCall:
    """One call of the transformer: the replacements for its blocks, and what they share.

    `eager`: block name -> why ComfyUI's own block runs with the bound weights. `foreign` blocks are ComfyUI's wholly.
    `ran`: which kinds of block have run at which shapes, kept by the caller from call to call.
    """

    def __init__(
        self, module: MutableTRTModule, flux: nn.Module, eager: dict[str, str], foreign: frozenset[str], ran: set[Any]
    ) -> None:
        self._module, self._flux, self.eager, self._foreign = module, flux, eager, foreign
        self._ran = ran
        self._ours: dict[int, tuple[Tensor, Any]] = {}
        self._runner: tuple[tuple[int, int, int, bool], BlockRunner] | None = None

    def replacements(self, theirs: Mapping[tuple[str, int], Replacement]) -> dict[tuple[str, int], Replacement]:
        """`patches_replace["dit"]` with ours added; a block that somebody replaced gets ComfyUI's own as original."""
        merged = dict(theirs)
        for name in weights.block_names(self._flux):
            kind, index = name.split("s.")
            key = (kind, int(index))
            if name in self._foreign:
                continue
            if key in theirs:
                self.eager.setdefault(name, "another node replaces it")
                merged[key] = self._with_lent_original(name, theirs[key])
            else:
                merged[key] = self._replacement(name, *key)
        return merged

    def _replacement(self, name: str, kind: str, index: int) -> Replacement:
        compiled = self._double if kind == "double_block" else self._single

        def run(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if name not in self.eager and (reason := _why_eager_call(args)):
                self.eager[name] = reason
            if name in self.eager:
                return self._lent_original(name, extra["original_block"])(args)
            with torch.inference_mode(False), torch.no_grad():
                return compiled(index, args)

        return run

    def _double(self, index: int, args: dict[str, Any]) -> dict[str, Tensor]:
        img, txt, mask = args["img"], args["txt"], args["attn_mask"]
        pe = self._kept(args["pe"], lambda pe: _angles(pe, txt.shape[1]))
        runner = self._runner_for(img.shape[0], img.shape[1], txt.shape[1], mask)
        inputs = (_own(img), _own(txt), self._kept(args["vec"], _own), pe, self._mask(mask))
        img, txt = self._cancellable("double", lambda: runner.double(index, *inputs))
        return {"img": img, "txt": txt}

    def _single(self, index: int, args: dict[str, Any]) -> dict[str, Tensor]:
        x, mask = args["img"], args["attn_mask"]
        n_txt = args["transformer_options"]["img_slice"][0]
        pe = self._kept(args["pe"], lambda pe: _angles(pe, n_txt))
        runner = self._runner_for(x.shape[0], x.shape[1] - n_txt, n_txt, mask)
        inputs = (_own(x), self._kept(args["vec"], _own), pe, self._mask(mask))
        return {"img": self._cancellable("single", lambda: runner.single(index, *inputs))}

    def _cancellable(self, kind: str, work: Callable[[], Any]) -> Any:
        """What `work` returns. The first block of a kind at new shapes runs in a thread, so that cancel works there:
        Inductor compiles once more for batches above 1, and kernels load at their first use."""
        ran = (kind, self._runner and self._runner[0])
        if ran in self._ran:
            return work()
        progress, stage = self._module.progress, f"First {kind} block at this size"
        progress.update(stage, 0, 1)
        done = run_cancellable(lambda: _finished(work()), progress, stage)
        progress.update(stage, 1, 1)
        self._ran.add(ran)
        return done

    def _runner_for(self, batch: int, img_tokens: int, txt_tokens: int, mask: Tensor | None) -> BlockRunner:
        shapes = (batch, img_tokens, txt_tokens, mask is not None)
        if self._runner is None or self._runner[0] != shapes:
            self._runner = (shapes, self._module.runner(*shapes))
        return self._runner[1]

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else self._kept(mask, _with_heads)

    def _kept(self, source: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """`make(source)`, made once per call: ComfyUI hands the same tensor to every block."""
        if id(source) not in self._ours:
            self._ours[id(source)] = (source, make(source))
        return self._ours[id(source)][1]

    def _with_lent_original(self, name: str, theirs: Replacement) -> Replacement:
        def run(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            return theirs(args, {**extra, "original_block": self._lent_original(name, extra["original_block"])})

        return run

    def _lent_original(self, name: str, original: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
        def run(args: dict[str, Any]) -> dict[str, Any]:
            block = self._flux.get_submodule(name)
            with Lender(name, block, self._module.weights).lent():
                return original(args)

        return run


def _finished(outputs: Any) -> Any:
    """The outputs once they are there: another thread may be on another stream."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return outputs


def _why_eager_call(args: Mapping[str, Any]) -> str:
    pe = args["pe"]
    if pe is None or pe.ndim != 6:
        return "it has no rotary embedding of the usual form"
    if pe.shape[0] > 1 and not torch.equal(pe, pe[:1].expand_as(pe)):
        return "another node gives each picture of the batch other positions"
    return ""


def _angles(pe: Tensor, txt_tokens: int) -> Pe:
    """ComfyUI's rotations [1, 1, tokens, head / 2, 2, 2] as cosines and sines [tokens, head / 2], the same bits."""
    rotation = pe[0, 0]
    return Pe(rotation[..., 0, 0].clone(), rotation[..., 1, 0].clone(), txt_tokens)


def _with_heads(mask: Tensor) -> Tensor:
    """A mask [L, L], [B, L, L] or [B, H, L, L] in a form that broadcasts to the last."""
    return _own(mask.unsqueeze(1) if mask.ndim == 3 else mask)


def _own(tensor: Tensor) -> Tensor:
    """The tensor outside of inference mode: torch.compile compiles anew for one that was made inside."""
    return tensor.clone() if tensor.is_inference() else tensor

"""Which rows of which BFL weight a LoRA's module name means, for every naming that FLUX trainers write.

Names and layouts were read from diffusers' `lora_conversion_utils.py`, ComfyUI's `flux_to_diffusers`, the
`lora_flux.py` of kohya-ss and the Open Model Initiative's `convert_flux_lora.py` that OneTrainer uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

Shapes = Mapping[str, tuple[int, ...]]
"""BFL weight name -> shape, for one architecture: `{"img_in.weight": (3072, 64), ...}`."""


class LoraFormat(Enum):
    """Whose key names a LoRA file has."""

    KOHYA = "kohya"
    DIFFUSERS = "diffusers"
    BFL = "bfl"
    ONETRAINER = "onetrainer"
    LYCORIS = "lycoris"
    XLABS = "xlabs"
    TEXT_ENCODER = "text encoder only"


@dataclass(frozen=True, slots=True)
class Target:
    """A BFL module, which of its output rows are meant (None: all), and whether its halves are exchanged."""

    module: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
    naming: LoraFormat = LoraFormat.BFL

    def weight(self, shapes: Shapes) -> str:
        """The name of the module's weight: `.scale` for an RMS norm, `.weight` for all others."""
        scale = f"{self.module}.scale"
        return scale if scale in shapes else f"{self.module}.weight"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """The shape of the rows that are meant."""
        whole = tuple(shapes[self.weight(shapes)])
        return whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])


# Parts of a fused weight as (start, stop) in units of the hidden size; None is the last row.
_Part = tuple[int, int | None]
_Q, _K, _V, _MLP, _QKV = (0, 1), (1, 2), (2, 3), (3, None), (0, 3)
_Names = Mapping[str, tuple[str, _Part | None]]

_DIFFUSERS_DOUBLE: _Names = {
    "attn.to_q": ("img_attn.qkv", _Q),
    "attn.to_k": ("img_attn.qkv", _K),
    "attn.to_v": ("img_attn.qkv", _V),
    "attn.add_q_proj": ("txt_attn.qkv", _Q),
    "attn.add_k_proj": ("txt_attn.qkv", _K),
    "attn.add_v_proj": ("txt_attn.qkv", _V),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
}
_DIFFUSERS_SINGLE: _Names = {
    "attn.to_q": ("linear1", _Q),
    "attn.to_k": ("linear1", _K),
    "attn.to_v": ("linear1", _V),
    "proj_mlp": ("linear1", _MLP),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
    "attn.norm_q": ("norm.query_norm", None),
    "attn.norm_k": ("norm.key_norm", None),
}
_XLABS_DOUBLE: _Names = {
    "processor.qkv_lora1": ("img_attn.qkv", None),
    "processor.qkv_lora2": ("txt_attn.qkv", None),
    "processor.proj_lora1": ("img_attn.proj", None),
    "processor.proj_lora2": ("txt_attn.proj", None),
}
_XLABS_SINGLE: _Names = {"processor.qkv_lora": ("linear1", _QKV), "processor.proj_lora": ("linear2", None)}
# The Open Model Initiative numbers the parts of a fused BFL weight.
_OMI_DOUBLE: _Names = {
    f"{stream}_attn.qkv.{index}": (f"{stream}_attn.qkv", part)
    for stream in ("img", "txt")
    for index, part in enumerate((_Q, _K, _V))
}
_OMI_SINGLE: _Names = {f"linear1.{index}": ("linear1", part) for index, part in enumerate((_Q, _K, _V, _MLP))}

_BLOCKS: tuple[tuple[str, str, _Names, LoraFormat], ...] = (
    ("double_blocks", "transformer_blocks", _DIFFUSERS_DOUBLE, LoraFormat.DIFFUSERS),
    ("single_blocks", "single_transformer_blocks", _DIFFUSERS_SINGLE, LoraFormat.DIFFUSERS),
    ("double_blocks", "double_blocks", _XLABS_DOUBLE, LoraFormat.XLABS),
    ("single_blocks", "single_blocks", _XLABS_SINGLE, LoraFormat.XLABS),
    ("double_blocks", "double_blocks", _OMI_DOUBLE, LoraFormat.ONETRAINER),
    ("single_blocks", "single_blocks", _OMI_SINGLE, LoraFormat.ONETRAINER),
)
_TOP_LEVEL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_SWAPPED = "norm_out.linear"

_DOTTED_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "lora_transformer.",
    "unet.",
)
_FLAT_PREFIXES = {
    "lora_unet_": LoraFormat.KOHYA,
    "lora_transformer_": LoraFormat.ONETRAINER,
    "lycoris_": LoraFormat.LYCORIS,
}


@dataclass(frozen=True, slots=True)
class TargetTable:
    """Every module name that means something in one architecture, dotted and with underscores."""

    dotted: Mapping[str, Target]
    flat: Mapping[str, Target]

    @classmethod
    def of(cls, shapes: Shapes) -> TargetTable:
        dotted = dict(_targets(shapes))
        return cls(dotted, {name.replace(".", "_"): target for name, target in dotted.items()})

    def depth(self, blocks: str) -> int:
        """How many `double_blocks` or `single_blocks` the architecture has."""
        return len(_block_indices(self.dotted, blocks))

    def find(self, module: str) -> tuple[Target, LoraFormat] | None:
        """What `module` means and whose naming that is, or None.

        Dotted and flat names have a table each: `img_attn_qkv` in a dotted name is HunyuanVideo, not FLUX.
        """
        return self._find_dotted(module) if "." in module else self._find_flat(module)

    def _find_dotted(self, module: str) -> tuple[Target, LoraFormat] | None:
        while module not in self.dotted:
            prefix = next((prefix for prefix in _DOTTED_PREFIXES if module.startswith(prefix)), None)
            if prefix is None:
                return None
            module = module[len(prefix) :]
        target = self.dotted[module]
        return target, target.naming

    def _find_flat(self, module: str) -> tuple[Target, LoraFormat] | None:
        for prefix, naming in _FLAT_PREFIXES.items():
            # Some trainers leave an underscore at the end (ComfyUI issue 4347).
            if module.startswith(prefix) and (target := self.flat.get(module[len(prefix) :].rstrip("_"))):
                return target, naming
        target = self.flat.get(module)
        return (target, target.naming) if target else None


def _targets(shapes: Shapes) -> Iterator[tuple[str, Target]]:
    modules = {name.rpartition(".")[0] for name in shapes}
    for module in modules:
        yield module, Target(module)
        if f"{module}.scale" in shapes:
            yield f"{module}.scale", Target(module)
    for alias, module in _TOP_LEVEL.items():
        if module in modules:
            yield alias, Target(module, swapped=alias == _SWAPPED, naming=LoraFormat.DIFFUSERS)
    if "img_in" in modules:
        yield "img_in.proj", Target("img_in", naming=LoraFormat.ONETRAINER)
    for blocks, alias_blocks, names, naming in _BLOCKS:
        for index in _block_indices(modules, blocks):
            for alias, (tail, part) in names.items():
                module = f"{blocks}.{index}.{tail}"
                if module in modules:
                    rows = _rows(shapes, module, part)
                    yield f"{alias_blocks}.{index}.{alias}", Target(module, rows, naming=naming)


def _block_indices(modules: Collection[str], blocks: str) -> set[str]:
    return {module.split(".")[1] for module in modules if module.startswith(f"{blocks}.")}


def _rows(shapes: Shapes, module: str, part: _Part | None) -> tuple[int, int] | None:
    if part is None:
        return None
    rows, hidden = shapes[f"{module}.weight"]
    start, stop = part
    return start * hidden, rows if stop is None else stop * hidden

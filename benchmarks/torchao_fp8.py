"""The competitor of our FP8: torchao's dynamic float8 per row in diffusers' compiled blocks."""

from __future__ import annotations

from typing import Any

from torch import nn


def quantize(model: nn.Module) -> int:
    """Quantizes the blocks' linear layers except modulations, where they lie; how many they are."""
    from torchao.quantization import quantize_

    before = sum(_chosen(module, name) for name, module in model.named_modules())
    quantize_(model, _config(), filter_fn=_chosen)
    return before


def _config() -> Any:
    """torchao's own choices but one: it would also let Inductor try many shapes of every kernel, which makes the first
    call minutes long, and changes no product: those are cuBLAS's."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def _chosen(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "transformer_blocks." in name and not name.endswith(".linear")

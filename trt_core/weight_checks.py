"""What weights must be before they are bound: on one device, of one floating dtype, contiguous."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .errors import UnsupportedModel


def check_one_device(weights: Iterable[Tensor]) -> None:
    """Raises `UnsupportedModel` where the weights lie on more than one device."""
    devices = {str(t.device) for t in weights}
    if len(devices) > 1:
        raise UnsupportedModel(
            f"The weights lie on several devices: {', '.join(sorted(devices))}.",
            fix='Move the whole transformer to one: pipe.transformer.to("cuda").',
        )


def check_uniform(weights: Mapping[str, Tensor]) -> None:
    """Raises `UnsupportedModel` unless all weights have one floating dtype and are contiguous."""
    dtypes = {t.dtype for t in weights.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise UnsupportedModel(
            f"The weights have the dtypes {', '.join(sorted(str(d) for d in dtypes))}.",
            expected="One floating dtype (bfloat16, float16 or float32) for all.",
            fix="Load the transformer with torch_dtype=torch.bfloat16.",
        )
    loose = [name for name, t in weights.items() if not t.is_contiguous()]
    if loose:
        raise UnsupportedModel(f"{loose[0]} is not contiguous in memory.", fix="Call .contiguous() on it first.")

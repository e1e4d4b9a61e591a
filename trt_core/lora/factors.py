"""The tensors of one module of a LoRA file as patches, with every shape checked against the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import LoraMismatch
from .changes import (
    Additive,
    Change,
    Difference,
    Dora,
    DoraRule,
    Hadamard,
    Kronecker,
    LowRank,
    Patch,
    Replacement,
    SwappedHalves,
)
from .roles import Role
from .targets import Shapes, Target

Scaling = Callable[[str, int], float]
"""The scale of a module (its name in the file) of a rank, for files without an alpha tensor."""

_UNSUPPORTED = {
    Role.CONVOLUTION: "is a factor of a convolution, and FLUX has none",
    Role.RESHAPE: "makes the layer larger (a Control LoRA)",
    Role.OTHER_METHOD: "belongs to a method that is not supported here",
}
_METHODS = "LoRA, DoRA, LoHa, LoKr and full differences are supported."


@dataclass(frozen=True, slots=True)
class Group:
    """All tensors of one module: its `name` in the file, what it means, and key and tensor of each role."""

    name: str
    target: Target
    tensors: Mapping[Role, tuple[str, Tensor]]

    def patches(self, shapes: Shapes, scaling: Scaling) -> Iterator[Patch]:
        """The patches to the module's weight and bias; `LoraMismatch` names key, seen and expected shape."""
        self._refuse_unsupported()
        weight = self.target.weight(shapes)
        for change in self._weight_changes(self.target.shape(shapes), scaling):
            yield self._patch(weight, change)
        for change in self._bias_changes(shapes, scaling):
            yield self._patch(f"{self.target.module}.bias", change)

    def _patch(self, weight: str, change: Change) -> Patch:
        return Patch(weight, self.target.rows, SwappedHalves(change) if self.target.swapped else change)

    def _refuse_unsupported(self) -> None:
        for role, reason in _UNSUPPORTED.items():
            if role in self.tensors:
                raise LoraMismatch(f"LoRA key {self.tensors[role][0]!r} {reason}.", expected=_METHODS)

    def _weight_changes(self, shape: tuple[int, ...], scaling: Scaling) -> Iterator[Change]:
        factored = self._factored(shape, scaling)
        if factored is not None:
            yield self._with_magnitude(factored, shape)
        elif Role.MAGNITUDE in self.tensors or Role.DORA_SCALE in self.tensors:
            role = Role.MAGNITUDE if Role.MAGNITUDE in self.tensors else Role.DORA_SCALE
            raise LoraMismatch(f"LoRA key {self.tensors[role][0]!r} has no factors beside it.", fix=_DAMAGED)
        if Role.DIFF in self.tensors:
            yield Difference(self._shaped(Role.DIFF, shape))
        for role in (Role.NORM, Role.SET_WEIGHT):
            if role in self.tensors:
                yield Replacement(self._shaped(role, shape))

    def _bias_changes(self, shapes: Shapes, scaling: Scaling) -> Iterator[Change]:
        roles = [role for role in (Role.UP_BIAS, Role.DIFF_BIAS) if role in self.tensors]
        if roles and f"{self.target.module}.bias" not in shapes:
            raise LoraMismatch(
                f"LoRA key {self.tensors[roles[0]][0]!r} changes a bias, and {self.target.module} has none."
            )
        for role in roles:
            out = self.target.shape(shapes)[0]
            scale = self._scale(self._rank(Role.DOWN), scaling) if role is Role.UP_BIAS else 1.0
            yield Difference(self._shaped(role, (out,)), scale)

    def _factored(self, shape: tuple[int, ...], scaling: Scaling) -> Additive | None:
        if self._any(Role.DOWN, Role.UP):
            return self._low_rank(shape, scaling)
        if self._any(Role.HADA_W1_A, Role.HADA_W1_B, Role.HADA_W2_A, Role.HADA_W2_B):
            return self._hadamard(shape, scaling)
        if self._any(*_LOKR):
            return self._kronecker(shape, scaling)
        return None

    def _low_rank(self, shape: tuple[int, ...], scaling: Scaling) -> LowRank:
        rank = self._rank(Role.DOWN)
        out, width = self._matrix_shape(shape, Role.DOWN)
        down, up = self._shaped(Role.DOWN, (rank, width)), self._shaped(Role.UP, (out, rank))
        return LowRank(down, up, self._scale(rank, scaling))

    def _hadamard(self, shape: tuple[int, ...], scaling: Scaling) -> Hadamard:
        out, width = self._matrix_shape(shape, Role.HADA_W1_A)
        rank, rank2 = self._rank(Role.HADA_W1_B), self._rank(Role.HADA_W2_B)
        return Hadamard(
            self._shaped(Role.HADA_W1_A, (out, rank)),
            self._shaped(Role.HADA_W1_B, (rank, width)),
            self._shaped(Role.HADA_W2_A, (out, rank2)),
            self._shaped(Role.HADA_W2_B, (rank2, width)),
            self._scale(rank, scaling),
        )

    def _kronecker(self, shape: tuple[int, ...], scaling: Scaling) -> Kronecker:
        w1 = self._kronecker_side(Role.LOKR_W1, Role.LOKR_W1_A, Role.LOKR_W1_B)
        w2 = self._kronecker_side(Role.LOKR_W2, Role.LOKR_W2_A, Role.LOKR_W2_B)
        seen = (w1[0].shape[0] * w2[0].shape[0], w1[-1].shape[1] * w2[-1].shape[1])
        if seen != shape:
            key = next(self.tensors[role][0] for role in _LOKR if role in self.tensors)
            raise self._wrong_shape(key, seen, shape)
        change = Kronecker(w1, w2)
        # LyCORIS writes a meaningless alpha (1e10) where neither side is a product.
        return change if change.rank is None else Kronecker(w1, w2, self._scale(change.rank, scaling))

    def _kronecker_side(self, full: Role, left: Role, right: Role) -> tuple[Tensor, ...]:
        if full in self.tensors:
            return (self._matrix(full),)
        rank = self._rank(right)
        rows = self._matrix(left).shape[0]
        return self._shaped(left, (rows, rank)), self._matrix(right)

    def _with_magnitude(self, inner: Additive, shape: tuple[int, ...]) -> Change:
        if Role.MAGNITUDE in self.tensors:
            return Dora(inner, self._shaped(Role.MAGNITUDE, shape[:1]), DoraRule.PEFT)
        if Role.DORA_SCALE not in self.tensors:
            return inner
        key, scale = self.tensors[Role.DORA_SCALE]
        if tuple(scale.shape) == shape[:1]:
            return Dora(inner, scale, DoraRule.PEFT)
        if tuple(scale.shape) not in ((shape[0], 1), (1, shape[1])):
            raise self._wrong_shape(key, tuple(scale.shape), (shape[0], 1))
        return Dora(inner, scale, DoraRule.COMFYUI)

    def _any(self, *roles: Role) -> bool:
        return any(role in self.tensors for role in roles)

    def _scale(self, rank: int, scaling: Scaling) -> float:
        if Role.ALPHA not in self.tensors:
            return scaling(self.name, rank)
        key, alpha = self.tensors[Role.ALPHA]
        if alpha.numel() != 1:
            raise self._wrong_shape(key, tuple(alpha.shape), ())
        return alpha.item() / rank

    def _rank(self, role: Role) -> int:
        rank = self._matrix(role).shape[0]
        if rank == 0:
            raise LoraMismatch(f"LoRA key {self.tensors[role][0]!r} has rank 0.", fix=_DAMAGED)
        return rank

    def _matrix(self, role: Role) -> Tensor:
        """The tensor of `role` as a matrix; 1 x 1 convolutions, as some extractors write, become one."""
        if role not in self.tensors:
            present = next(key for key, _ in self.tensors.values())
            raise LoraMismatch(f"LoRA key {present!r} has no {role.name.lower()} tensor beside it.", fix=_DAMAGED)
        key, tensor = self.tensors[role]
        if tensor.dim() < 2:
            raise LoraMismatch(f"LoRA key {key!r} has shape {list(tensor.shape)}.", expected="A matrix is expected.")
        return tensor.flatten(1) if tensor.dim() > 2 else tensor

    def _matrix_shape(self, shape: tuple[int, ...], role: Role) -> tuple[int, int]:
        if len(shape) != 2:
            raise LoraMismatch(
                f"The LoRA has factors for {self.target.module}, whose weight is a vector of {list(shape)}.",
                fix=_DAMAGED,
            )
        return shape[0], shape[1]

    def _shaped(self, role: Role, expected: tuple[int, ...]) -> Tensor:
        tensor = self._matrix(role) if len(expected) == 2 else self.tensors[role][1]
        if tuple(tensor.shape) != expected:
            raise self._wrong_shape(self.tensors[role][0], tuple(self.tensors[role][1].shape), expected)
        return tensor

    def _wrong_shape(self, key: str, seen: tuple[int, ...], expected: tuple[int, ...]) -> LoraMismatch:
        control = self.target.module == "img_in"
        return LoraMismatch(
            f"LoRA key {key!r} has shape {list(seen)}.",
            expected=f"{self.target.module} of this model needs {list(expected)}.",
            fix="A Control, Depth, Canny or Fill LoRA needs the model with as many input channels."
            if control
            else "Use a LoRA that was trained for this FLUX.1 model.",
        )


_LOKR = (
    Role.LOKR_W1,
    Role.LOKR_W2,
    Role.LOKR_W1_A,
    Role.LOKR_W1_B,
    Role.LOKR_W2_A,
    Role.LOKR_W2_B,
)
_DAMAGED = "The file is incomplete or damaged; download it again."

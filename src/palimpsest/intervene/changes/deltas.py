"""Low-rank changes of one W_out, for one fact each or for all at once; and of a norm's readers."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import joined
from palimpsest.intervene.intervention import Intervention
from palimpsest.model import offload
from palimpsest.model.calls import followed
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import NOBODY


@dataclass(frozen=True, kw_only=True)
class OutDeltas(Intervention):
    """A change ΔW of one layer's W_out: one for each fact if it is independent, otherwise one.

    In a forward pass each prompt feels its owner's ΔW alone, at every token, in float32 as if the
    weight were changed; a single ΔW really changes the weight, rounded to its precision.
    """

    @property
    def layer(self) -> int:
        """The layer whose W_out is changed."""
        assert self.change.layer is not None
        return self.change.layer

    @abstractmethod
    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""

    @abstractmethod
    def differences(self) -> tuple[Difference, ...]:
        """ΔW in factors."""

    @abstractmethod
    def per_prompt(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Let each prompt feel its owner's ΔW while the context lasts."""

    def alone(self, fact: int) -> Self:
        """ΔW of one fact, as a single one.

        Raises:
            RequestError: there is no such fact.
        """
        facts = len(next(iter(self.tensors().values())))
        if not 0 <= fact < facts:
            raise RequestError(
                f"expected owner to be a target fact's place, from 0 to {facts - 1}, found {fact}; "
                "count them in the run's facts.json"
            )
        mine: dict[str, Any] = {n: t[fact : fact + 1] for n, t in self.tensors().items()}
        return replace(self, change=replace(self.change, independent=False), **mine)

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Change the model while the context lasts."""
        if self.change.independent:
            return self.per_prompt(handle)
        return added(handle.w_out(self.layer), self.matrix(0))


@dataclass(frozen=True, kw_only=True)
class WeightDeltas(OutDeltas):
    """`ΔW_f = Σ_j right[f, j] left[f, j]ᵀ`, added to W_out of the change's layer.

    There is one delta a fact if the change is independent, otherwise a single one (F = 1).

    Attributes:
        left: `[F, r, d_mlp]` float32.
        right: `[F, r, d_model]` float32.
    """

    kind: ClassVar[str] = "weight_deltas"
    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`left` and `right`."""
        return {"left": self.left, "right": self.right}

    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""
        return self.right[fact].T @ self.left[fact]

    def differences(self) -> tuple[Difference, ...]:
        """`left` and `right` of the layer."""
        return (Difference(self.layer, self.left, self.right, self.change.independent),)

    def plus(self, other: Intervention) -> Intervention:
        """Both sums in one; each delta keeps its own rows."""
        if not isinstance(other, WeightDeltas) or other.layer != self.layer:
            return super().plus(other)
        return replace(
            self,
            change=joined([self, other]),
            left=torch.cat([self.left, other.left], 1),
            right=torch.cat([self.right, other.right], 1),
        )

    def per_prompt(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """`right (left · k)` of each prompt's owner is added at every token."""
        left, right = self.left.to(handle.device), self.right.to(handle.device)

        def response(key: Tensor, owner: Tensor) -> Tensor:
            mine = (owner != NOBODY).float()[:, None, None]
            multiplier = key.float() @ left[owner].mT * mine
            return multiplier @ right[owner]

        return responding(handle, self.layer, response)


@contextmanager
def responding(
    handle: ModelHandle, layer: int, response: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Add to W_out's output a function of its input and of whose prompt each row is.

    Calls of the model by other code, which tell no owners, are refused while the context lasts.

    Args:
        handle: the model.
        layer: whose W_out.
        response: of keys `[n, t, d_mlp]` and owners `[n]`; gives `[n, t, d_model]`.
    """
    w_out = handle.module(Site(layer, "mlp"))
    keys: list[Tensor] = []

    def remember(key: Tensor) -> None:
        keys[:] = [key]

    def add(value: Tensor) -> Tensor:
        return value + response(keys[0], handle.under_way.owners()).to(value)

    with (
        followed(handle),
        handle.hooked_input([(w_out, remember)]),
        handle.hooked([(w_out, add)]),
    ):
        yield


@contextmanager
def added(weight: Tensor, delta: Tensor) -> Iterator[None]:
    """Add a delta to a weight while the context lasts; the sum is rounded once."""
    saved = weight.clone()
    try:
        precise = torch.promote_types(saved.dtype, torch.float32)
        weight.copy_(saved.to(precise) + delta.to(weight.device, precise))
        yield
    finally:
        weight.copy_(saved)


@dataclass(frozen=True, kw_only=True)
class BiasShift(Intervention):
    """A vector added to the bias of one layer's W_out.

    Attributes:
        shift: `[d_model]` float32.
    """

    kind: ClassVar[str] = "bias_shift"
    shift: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`shift`."""
        return {"shift": self.shift}

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Shift the bias while the context lasts."""
        assert self.change.layer is not None
        w_out = handle.module(Site(self.change.layer, "mlp"))
        return added(offload.value(w_out, "bias"), self.shift)


@dataclass(frozen=True, kw_only=True)
class ReaderDeltas(Intervention):
    """`left right` added to the weights of all matrices that read the norm's output at the site.

    The readers stand one below the other, in the order of `ModelHandle.readers`.

    Attributes:
        left: `[Σ out, r]` float64.
        right: `[r, d_model]` float64.
        shift: `[Σ out]` float64, added to the biases; only of readers that have one.
    """

    kind: ClassVar[str] = "reader_deltas"
    left: Tensor
    right: Tensor
    shift: Tensor

    @property
    def site(self) -> Site:
        """The norm's output."""
        assert self.change.layer is not None
        return Site(self.change.layer, self.change.part)

    def tensors(self) -> dict[str, Tensor]:
        """`left`, `right` and `shift`."""
        return {"left": self.left, "right": self.right, "shift": self.shift}

    @contextmanager
    def changing(self, handle: ModelHandle) -> Iterator[None]:
        """Change every reader while the context lasts."""
        readers = handle.readers(self.site)
        biases = [bias for _, bias in readers if bias is not None]
        lefts = self.left.split([len(weight) for weight, _ in readers])
        shifts = self.shift.split([len(bias) for bias in biases])
        with ExitStack() as stack:
            for (weight, _), left in zip(readers, lefts, strict=True):
                stack.enter_context(added(weight, left @ self.right))
            for bias, shift in zip(biases, shifts, strict=True):
                stack.enter_context(added(bias, shift))
            yield

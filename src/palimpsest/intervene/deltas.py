"""Low-rank changes of one W_out, for one fact each or for all at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import NOBODY


@dataclass(frozen=True, kw_only=True)
class WeightDeltas(Intervention):
    """`ΔW_f = Σ_j right[f, j] left[f, j]ᵀ`, added to W_out of the change's layer.

    If the change is independent there is one delta a fact, and in a forward pass each prompt feels
    its owner's alone: `W k + right (left · k)` at every token, exactly as if the weight were
    changed. Otherwise there is a single delta (F = 1), and the weight is really changed.

    Attributes:
        left: `[F, r, d_mlp]` float32, scaled so that its product with the key that it was made for
            is 1.
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

    @property
    def layer(self) -> int:
        """The layer whose W_out is changed."""
        assert self.change.layer is not None
        return self.change.layer

    @contextmanager
    def applied(self, handle: ModelHandle) -> Iterator[None]:
        """Change the model while the context lasts.

        Raises:
            RequestError: the intervention was fitted on another model.
        """
        self.check_model(handle)
        with self._per_prompt(handle) if self.change.independent else self._in_weight(handle):
            yield

    @contextmanager
    def _in_weight(self, handle: ModelHandle) -> Iterator[None]:
        weight = handle.w_out(self.layer)
        saved = weight.clone()
        try:
            weight.add_(self.matrix(0).to(weight))
            yield
        finally:
            weight.copy_(saved)

    @contextmanager
    def _per_prompt(self, handle: ModelHandle) -> Iterator[None]:
        w_out = handle.module(Site(self.layer, "mlp"))
        left, right = self.left.to(handle.device), self.right.to(handle.device)
        keys: list[Tensor] = []

        def remember(key: Tensor) -> None:
            keys[:] = [key]

        def add(value: Tensor) -> Tensor:
            if handle.running is None:
                raise RuntimeError("per-fact deltas need a batch with owners: use model.forward")
            owner = handle.running.owner
            mine = (owner != NOBODY).float()[:, None, None]
            multiplier = keys[0].float() @ left[owner].mT * mine
            return value + (multiplier @ right[owner]).to(value)

        with handle.hooked_input([(w_out, remember)]), handle.hooked([(w_out, add)]):
            yield

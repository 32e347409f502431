"""AlphaEdit, null-space constrained editing (Fang et al. 2024, arXiv 2410.02355)."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from palimpsest.errors import RequestError, check_number
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.editors.editor import see
from palimpsest.intervene.editors.solving import ridge
from palimpsest.intervene.editors.spread import Spread, Written, mean_key
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class AlphaEdit(Spread):
    """MEMIT, its changes projected to where the model's own keys hardly reach.

    `Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + ridge 1)⁻¹` (equation 14), P the projection to the singular
    vectors of C whose singular values are below `threshold`, K_p the keys of the edits made before.
    K_p grows with sequential edits: keys are those in the model that carries the edit.

    Attributes:
        threshold: absolute, on the singular values of C; the public code has 0.02.
        ridge: the public code has 10; EasyEdit has 1 for Llama-3 and Qwen2.5.
    """

    threshold: float = 0.02
    ridge: float = 10.0

    def __post_init__(self) -> None:
        """Check threshold and ridge too.

        Raises:
            RequestError: one is not above 0, or what `Spread` refuses.
        """
        super().__post_init__()
        check_number("intervene.threshold", self.threshold, above=0)
        check_number("intervene.ridge", self.ridge, above=0)

    def penalty(self, edits: int) -> float:
        """`ridge`."""
        return self.ridge

    def begin(self, model: ModelHandle, site: Site) -> "_AlphaEdit":
        """Find the null space of every layer, sample the prefixes.

        Raises:
            RequestError: too few layers, or no singular value is below the threshold.
        """
        layers = self.layers(site)
        spaces = {}
        for layer, second in self.moment_source.several(model, layers).items():
            half = None
            if second.half is not None:
                with suppress(RequestError):  # what half of the text leaves open is no fault of all
                    half = self._null_space(second.half())
            spaces[layer] = (self._null_space(second.matrix()), half)
        return _AlphaEdit(self, layers, self.contexts(model), spaces)

    def _null_space(self, moments: Tensor) -> Tensor:
        """Û `[d_mlp, rank]`, P = Û Ûᵀ."""
        values, vectors = torch.linalg.eigh(moments)
        inside: Tensor = vectors[:, values < self.threshold]
        if not inside.shape[1]:
            raise RequestError(
                "expected singular values of the second moments below intervene.threshold="
                f"{self.threshold:g}, found {float(values[0]):.3g} as the smallest; raise it"
            )
        return inside


@dataclass(frozen=True)
class _AlphaEdit(Written):
    """AlphaEdit at work.

    Attributes:
        spaces: by layer, Û of C, and of C over half of the tokens if it has one.
        before: by layer, the keys of the edits made before, `[e, d_mlp]` each.
        pending: the last edit's facts, whose keys are read once the model carries it.
    """

    spaces: Mapping[int, tuple[Tensor, Tensor | None]]
    before: dict[int, list[Tensor]] = field(default_factory=dict)
    pending: list[Fact] = field(default_factory=list)

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> Composition:
        """One change for each fact, or one for all; earlier edits' keys are kept as they are."""
        for layer in self.layers if self.pending else ():
            key = mean_key(see(model, self.pending, layer, self.contexts))
            self.before.setdefault(layer, []).append(key)
        made = super().edit(model, facts, independent)
        self.pending[:] = [fact for fact in facts if fact.id not in made.change.failed]
        return replace(made, diagnostics=(*made.diagnostics, *self._ranks()))

    def _ranks(self) -> Iterator[Row]:
        """The share of dimensions that the null space has, by layer; once."""
        for layer, (space, _) in () if self.before else self.spaces.items():
            yield Row(
                axis="cost", scope="fact", metric="null_space", protocol="share_of_d_mlp",
                layer=layer, value=space.shape[1] / space.shape[0],
            )  # fmt: skip

    def left(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(K̃ᵀ P K̃ + ridge 1)⁻¹ K̃ᵀ P`, K̃ the earlier keys and these; the rows of these."""
        earlier = self.before.get(layer, [])
        every = torch.cat([*earlier, key[0]]).unsqueeze(0) if earlier else key
        penalty = self.method.penalty(key.shape[1])

        def response(space: Tensor) -> Tensor:
            return ridge(every @ space @ space.T, every, penalty)[:, -key.shape[1] :]

        whole, half = self.spaces[layer]
        return response(whole), None if half is None else response(half)

"""LEACE weighed by ordinary text: the same guarantee, and less damage where no fact is asked."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import check_number
from palimpsest.intervene.erasers.eraser import Affine, Around, cross_covariance, orthonormal
from palimpsest.intervene.erasers.leace import Leace, erased
from palimpsest.intervene.erasers.whitening import Whitening
from palimpsest.intervene.moments import RunningText
from palimpsest.model.forward import capturing, run_to
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate


@dataclass(frozen=True)
class LeaceBackground(Leace):
    """The affine map that erases the concept and changes a mixture of states least.

    LEACE changes the concept's states least: E‖r(x) − x‖² over them. Here the mean is over a
    mixture of them and the states of ordinary text, so that S = (1 − w) Σ_xx + w E[(t − μ)(t − μ)ᵀ]
    takes the place of Σ_xx (μ the concept's mean, t the text's states). With W = (S^½)⁺,

        r(x) = x − W⁺ P_{W Σ_xz} W (x − μ).

    On the fit sample Cov(r(x), z) = Σ_xz − W⁺ P W Σ_xz = 0, since Σ_xz lies in the range of S.
    Among all affine maps of which that holds and that keep μ, this one changes the mixture least
    (the proof of LEACE's theorem 4.2 with S in place of Σ_xx); the concept's states alone it does
    not.

    Attributes:
        share: w, the text's.
        text: where the text comes from, its tokens and its seed.
    """

    share: float = 0.5
    text: Any = field(default_factory=RunningText)

    def __post_init__(self) -> None:
        """Check the share too.

        Raises:
            RequestError: it is negative or above 1, or as of `Leace`.
        """
        super().__post_init__()
        check_number("intervene.share", self.share, least=0)
        check_number("1 - intervene.share", 1 - self.share, above=0)

    @property
    def imitates(self) -> "LeaceBackground | None":
        """For the shuffled control, the same with the true labels."""
        return replace(self, shuffled=False) if self.shuffled else None

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """The map.

        Raises:
            RequestError: the tolerance leaves some of the concept.
        """
        mean = states.mean(0)
        total, scatter = text_moments(around.model, around.site, self.text)
        centred = states - mean
        own = centred.T @ centred / len(states)
        cross = torch.outer(total, mean)
        text = scatter - cross - cross.T + torch.outer(mean, mean)
        spread = torch.lerp(own, text, self.share)
        affine = least_change(spread, cross_covariance(states, labels), mean, self.svd_tol)
        return erased(affine, states, labels)


def least_change(spread: Tensor, cross: Tensor, mean: Tensor, tolerance: float) -> Affine:
    """The map with R Σ_xz removed that changes states of second moment `spread` about `mean` least.

    Args:
        spread: S `[d, d]`.
        cross: Σ_xz `[d, k]`.
        mean: μ `[d]`.
        tolerance: of the singular values of W Σ_xz, in multiples of the largest.
    """
    whitening = Whitening.of(spread)
    removed = orthonormal(whitening.white(cross), tolerance)
    return whitening.affine(removed, removed, mean)


def text_moments(model: ModelHandle, site: Site, text: RunningText) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and mean of x xᵀ `[d, d]` of a text's states at a site, float64.

    Position 0 is left out unless the text's `sink` is set.
    """

    def make() -> dict[str, Tensor]:
        return _text_moments(model, site, text.rows(model), 0 if text.sink else 1)

    key = {**text.key(model), "site": [site.layer, site.part], "of": "states"}
    found = cached_tensors("text_states", key, make)
    return found["mean"], found["scatter"]


@within_memory
@torch.no_grad()
def _text_moments(model: ModelHandle, site: Site, ids: Tensor, first: int) -> dict[str, Tensor]:
    width = model.width
    total = torch.zeros(width, dtype=torch.float64)
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for rows in ids.split(max(1, model.batch_size // 4)):
        batch = collate([Tokens(tuple(row), len(row)) for row in rows.tolist()], model.device)
        with capturing(model, [site]) as states:
            run_to(model, batch, site.layer)
        flat = states[site][:, first:].flatten(0, 1).double().cpu()
        total += flat.sum(0)
        scatter += flat.T @ flat
    count = ids.shape[0] * (ids.shape[1] - first)
    return {"mean": total / count, "scatter": scatter / count}

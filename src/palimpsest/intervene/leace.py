"""LEACE, least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819), of objects."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from concept_erasure import LeaceFitter
from torch import Tensor

from palimpsest.errors import RequestError, check_number, check_seed
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.files import cached_tensors
from palimpsest.intervene.erasers import Erasure
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy, Position, Site, check_choice
from palimpsest.record.row import Row

FitOn = Literal["target+fit", "fit"]

RESIDUAL_LIMIT = 1e-9
"""Largest residual cross-covariance on the fit sample, relative to the one before erasure."""


@dataclass(frozen=True)
class Leace:
    """*Which object* of a relation, made unreadable to every linear probe at one site.

    The concept is the one-hot true object; the states are those of the fit subjects at one token of
    the relation's prompt. Fitted in float64 through the concept-erasure package. On the fitted
    sample the cross-covariance of erased states and concept is zero (theorem 3.1 and equation 1 of
    the paper); on fresh subjects leakage falls with n/d.

    Attributes:
        part: `residual` (a block's output), `mlp` or `attention`.
        position: the token whose states are fitted on.
        policy: the tokens that are erased.
        fit_on: `target+fit`, or `fit` alone.
        svd_tol: singular values of the whitened cross-covariance below this are dropped.
        shuffled: permute the labels: the control `leace_shuffled`.
        seed: of the permutation.
    """

    part: str = "residual"
    position: str = "last_prompt"
    policy: str = "all_but_sink"
    fit_on: str = "target+fit"
    svd_tol: float = 1e-6
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices and the numbers.

        Raises:
            RequestError: unknown part, position, policy or fit sample; a negative tolerance; a
                seed out of range.
        """
        check_number("intervene.svd_tol", self.svd_tol, least=0)
        check_seed("intervene.seed", self.seed)
        check_choice("intervene.part", self.part, Part)
        check_choice("intervene.position", self.position, Position)
        check_choice("intervene.policy", self.policy, Policy)
        check_choice("intervene.fit_on", self.fit_on, FitOn)

    @property
    def scope(self) -> str:
        """It is fitted on the facts of a relation, not on single ones."""
        return "relation"

    @property
    def imitates(self) -> "Leace | None":
        """For the shuffled control, LEACE with the true labels."""
        return replace(self, shuffled=False) if self.shuffled else None

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Erasure:
        """Fit the eraser on the facts' true objects.

        Raises:
            RequestError: several relations, fewer than two classes, too many for the width, or a
                tolerance that leaves some of the concept.
        """
        site = Site(site.layer, self.part)  # type: ignore[arg-type]
        sample = (*facts.target, *facts.fit) if self.fit_on == "target+fit" else facts.fit
        labels = one_hot(sample, model.width)
        if self.shuffled:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
            labels = labels[order]
        states = self._states(model, sample, site)
        left, right, bias = fit_leace(states, labels, self.svd_tol)
        erased = states - ((states - bias) @ right.T) @ left.T
        residual = relative_cross_covariance(states, erased, labels)
        if not residual < RESIDUAL_LIMIT:
            raise RequestError(
                f"expected LEACE to leave a relative cross-covariance below {RESIDUAL_LIMIT:.0e} "
                f"on its fit sample, found {residual:.1e}; lower intervene.svd_tol"
            )
        return Erasure(
            change=Change("relation", False, site.layer, site.part, self.policy),  # type: ignore[arg-type]
            model=model.fingerprint,
            proj_left=left,
            proj_right=right,
            bias=bias,
            diagnostics=tuple(
                _diagnostics(sample[0].relation, site, states, left, right, residual)
            ),
        )

    def _states(self, model: ModelHandle, sample: tuple[Fact, ...], site: Site) -> Tensor:
        """The sample's states `[n, d_model]` float64 in the unchanged model."""

        def make() -> dict[str, Tensor]:
            rows = [model.encode(fact.prompt) for fact in sample]
            return {"states": features(model, rows, [site], [self.position])[0, 0]}  # type: ignore[list-item]

        key = {
            "model": model.state,
            "prefix": model.prefix,
            "site": [site.layer, site.part],
            "position": self.position,
            "facts": [[fact.prompt.text, fact.prompt.span] for fact in sample],
        }
        return cached_tensors("states", key, make)["states"].double()


def one_hot(facts: tuple[Fact, ...], width: int) -> Tensor:
    """True objects as `[n, classes]` float64 of zeros and ones.

    Raises:
        RequestError: several relations, fewer than two classes, or as many classes as dimensions.
    """
    relations = sorted({fact.relation for fact in facts})
    if len(relations) > 1:
        raise RequestError(
            f"expected the facts of one relation for LEACE, found {len(relations)} "
            f"({', '.join(relations[:5])}, ...); choose one with facts.relations=[...]"
        )
    classes = sorted({fact.true for fact in facts})
    if len(classes) < 2:
        raise RequestError(
            f"expected at least two classes (true objects) for LEACE, found {len(classes)} over "
            f"{len(facts)} facts; raise facts.fit or choose a relation with more objects"
        )
    if len(classes) >= width:
        raise RequestError(
            f"expected fewer classes than the model's {width} dimensions for LEACE, found "
            f"{len(classes)}; choose a relation with fewer objects"
        )
    index = torch.tensor([classes.index(fact.true) for fact in facts])
    return torch.nn.functional.one_hot(index, len(classes)).double()


def fit_leace(states: Tensor, labels: Tensor, svd_tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """LEACE of states `[n, d]` and one-hot labels `[n, k]`, both float64.

    Returns:
        L `[d, r]`, R `[r, d]` and the mean `[d]`, so that r(x) = x − L R (x − mean).
    """
    fitter = LeaceFitter(states.shape[1], labels.shape[1], dtype=torch.float64, svd_tol=svd_tol)
    fitter.update(states, labels)
    eraser = fitter.eraser
    return eraser.proj_left.clone(), eraser.proj_right.clone(), eraser.bias.clone()


def relative_cross_covariance(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """‖Cov(after, labels)‖ / ‖Cov(before, labels)‖ in Frobenius norm, over one sample."""
    centred = labels - labels.mean(0)
    norms = [((x - x.mean(0)).T @ centred).norm() for x in (after, before)]
    return float(norms[0] / norms[1])


def _diagnostics(
    relation: str, site: Site, states: Tensor, left: Tensor, right: Tensor, residual: float
) -> list[Row]:
    n, width = states.shape
    return [
        Row(
            axis="cost", scope="relation", split="fit", relation=relation, layer=site.layer,
            metric=metric, protocol=protocol, value=float(value), n=n,
        )
        for metric, protocol, value in (
            ("residual_cross_covariance", "fit_sample", residual),
            ("rank", "projection", torch.linalg.matrix_rank(left @ right)),
            ("n_over_d", "fit_sample", n / width),
        )
    ]  # fmt: skip

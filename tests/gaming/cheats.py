"""Methods that look good by some number, and take little or nothing from the model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.method import MethodBase
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site


@dataclass(frozen=True)
class Rotation(MethodBase):
    """States turned within the span of the objects' means: every object where another one was.

    Nothing is lost, as a turn can be undone; a probe trained before it reads the wrong object.
    """

    part: ClassVar[str] = "residual"  # type: ignore[misc]
    scope: ClassVar[str] = "relation"  # type: ignore[misc]

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Of the fit facts' states at the prompt's last token."""
        rows = [model.encode(fact.prompt) for fact in facts.fit]
        states = features(model, rows, [site], ["last_prompt"])[0, 0].double()
        objects = sorted({fact.true for fact in facts.fit})
        means = torch.stack(
            [
                states[[n for n, fact in enumerate(facts.fit) if fact.true == name]].mean(0)
                for name in objects
            ]
        )
        centre = means.mean(0)
        basis = torch.linalg.qr((means - centre).T).Q[:, : len(objects) - 1]
        here = (means - centre) @ basis
        left, _, right = torch.linalg.svd(here.T @ here.roll(1, 0))
        turn = left @ right  # the nearest rotation that takes each mean to the next one's place
        return Erasure(
            change=Change("relation", False, site.layer, "residual", "all", fitted_on=("fit",)),
            model=model.fingerprint,
            proj_left=basis,
            proj_right=basis.T - turn.T @ basis.T,
            bias=centre,
        )


@dataclass(frozen=True)
class Noise(MethodBase):
    """An edit of each fact that writes noise into W_out.

    Attributes:
        size: of the noise, in multiples of the entries' own spread.
        seed: of the noise.
    """

    part: ClassVar[str] = "mlp"  # type: ignore[misc]

    size: float = 3.0
    seed: int = 0

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Each fact has noise of its own."""
        weight = model.w_out(site.layer).float()
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(len(facts.target), *weight.shape, generator=generator)
        return DenseDeltas(
            change=Change("fact", True, site.layer),
            model=model.fingerprint,
            delta=noise * self.size * weight.std(),
        )


@dataclass(frozen=True)
class Ruin(Noise):
    """The same noise for all: the model says nothing any more."""

    size: float = 1000.0

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """One noise."""
        apart = super().fit(model, facts, site)
        return apart.alone(0)

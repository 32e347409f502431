"""A relation that tiny models can be asked about, and what is true of an erased sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers.eraser import concept, cross_covariance, states_of
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.conftest import fact, splits

ENDINGS = {"land": "German", "stan": "Greek", "onia": "Spanish"}
"""A place's name tells its language, so that there is a concept to erase."""

HEADS = [first + last for first in ("Bo", "Ta", "Le", "Ki") for last in "rlmnd"]

PLACES = tuple(
    fact(head + ending, language, "Latin", "They say that the people of {} speak")
    for ending, language in ENDINGS.items()
    for head in HEADS[: {"land": 20, "stan": 16, "onia": 12}[ending]]
)

SAMPLE = splits(PLACES[::6], PLACES)
"""All places are there to fit on, and some are targets: theorems are of the fit sample."""

LABELS = concept(SAMPLE.fit, 32).labels


def states(
    model: ModelHandle, site: Site, facts: Splits = SAMPLE, position: str = "last_prompt"
) -> Tensor:
    """The sample's states `[n, d]` at a site, of the model as it stands."""
    return states_of(model, facts.fit, [site], position)[0]


def means(found: Tensor) -> Tensor:
    """Mean state of each class, `[k, d]`."""
    return LABELS.T @ found / LABELS.sum(0)[:, None]


def assert_erased(before: Tensor, erasure: Erasure, tolerance: float = 1e-9) -> None:
    """What every eraser with LEACE's guarantee does: no cross-covariance, one mean for all classes.

    The concept must have been there before.
    """
    after = erasure.erase(before)
    scale = cross_covariance(before, LABELS).norm()
    assert (means(before) - before.mean(0)).norm() > 1e-3
    assert cross_covariance(after, LABELS).norm() < tolerance * scale
    gaps = (means(after) - after.mean(0)).norm() / (means(before) - before.mean(0)).norm()
    assert gaps < tolerance * 10
    assert torch.allclose(erasure.erase(after), after, atol=1e-9 * float(before.abs().max()))


def readable(found: Tensor) -> float:
    """Accuracy of a least-squares classifier on the sample that it is fitted on."""
    design = torch.cat([found - found.mean(0), torch.ones(len(found), 1).double()], 1)
    fitted = torch.linalg.lstsq(design, LABELS, driver="gelsd").solution
    return float(((design @ fitted).argmax(1) == LABELS.argmax(1)).double().mean())


def majority(facts: Sequence[Fact] = PLACES) -> float:
    """Share of the most common object."""
    names = [each.true for each in facts]
    return max(map(names.count, names)) / len(names)

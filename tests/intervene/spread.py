"""Editors of several layers, fitted by the package and by hand, for the tests of each."""

from collections.abc import Callable, Sequence

from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.spread import Spread
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal_memit
from tests.intervene.conftest import CONTEXTS, TARGETS, copy_of, splits

Moments = Callable[[ModelHandle], GivenMoments]

SEARCH = ValueSearch(steps=5, clamp=0.75)

LAYER = 2
"""The last that is changed."""

CHOSEN = TARGETS[1:4]
"""Subjects of few tokens and of many, new objects of one token and of several."""

Changes = dict[int, Tensor]
"""ΔW by layer."""


def fit(
    model: ModelHandle,
    moments: Moments,
    kind: type[Spread],
    target: tuple[Fact, ...] = CHOSEN,
    contexts: Sequence[str] = CONTEXTS,
    **options: object,
) -> Composition | History:
    """An editor's work with the contexts and moments that the literal one gets."""
    prefixes = GivenPrefixes(list(contexts))
    method = kind(**{"search": SEARCH, "prefixes": prefixes, "moments": moments(model), **options})
    return method.fit(model, splits(target), Site(LAYER, "mlp"))


def changes(made: Intervention, fact: int = 0) -> Changes:
    """ΔW by layer of one fact, or of the only group."""
    parts = made.parts[-1].parts if isinstance(made, History) else made.parts
    return {part.layer: part.matrix(fact) for part in parts}


def one_at_a_time(
    model: ModelHandle, solve: literal_memit.Solve, span: int, target: tuple[Fact, ...] = CHOSEN
) -> list[Changes]:
    """Each fact's change, on a model of its own."""
    return [together(model, solve, span, (fact,)) for fact in target]


def together(
    model: ModelHandle, solve: literal_memit.Solve, span: int, target: tuple[Fact, ...] = CHOSEN
) -> Changes:
    """The change of all facts, on a copy of the model."""
    return literal_memit.edit(copy_of(model), target, layers(span), CONTEXTS, SEARCH, solve)


def layers(span: int) -> range:
    """The changed layers, from below."""
    return range(LAYER - span + 1, LAYER + 1)

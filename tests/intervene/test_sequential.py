"""One edit after another: equal to doing it by hand, with a memory of the way."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.controls import RandomDelta
from palimpsest.intervene.editors.alphaedit import AlphaEdit
from palimpsest.intervene.editors.editor import Editor, milestones
from palimpsest.intervene.editors.emmet import Emmet
from palimpsest.intervene.editors.finetune import FineTune
from palimpsest.intervene.editors.memit import Memit
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.r_rome import RRome
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal, literal_ft, literal_memit, literal_rome
from tests.intervene.conftest import (
    CONTEXTS,
    TARGETS,
    assert_untouched,
    copy_of,
    relative,
    splits,
    values_of,
    weights,
)

Moments = Callable[[ModelHandle], GivenMoments]

SITE = Site(2, "mlp")
SEARCH = ValueSearch(steps=4, clamp=0.75)
TUNED = FineTune(steps=4, lr=2e-3)

TOLERANCE = 2e-3
"""Rounding of one edit is carried into the search of the next."""

THREE = TARGETS[1:4]

METHODS = {
    "rome": Rome(search=SEARCH),
    "r_rome": RRome(search=SEARCH),
    "memit": Memit(search=SEARCH, span=2, weight=20.0),
    "emmet": Emmet(search=SEARCH),
    "alphaedit": AlphaEdit(search=SEARCH, span=2, threshold=0.5, ridge=2.0),
    "ft": TUNED,
    "ft_l": replace(TUNED, bound=3e-3),
}

ByLayer = dict[int, Tensor]


def method(name: str, moments: GivenMoments, protocol: str = "sequential") -> Editor:
    """An editor of `METHODS` with the contexts and moments that the literal one gets."""
    made = replace(METHODS[name], protocol=protocol)
    if isinstance(made, FineTune):
        return made
    return replace(made, prefixes=GivenPrefixes(list(CONTEXTS)), moments=moments)


def fit(
    model: ModelHandle,
    moments: Moments,
    name: str,
    target: tuple[Fact, ...] = THREE,
    protocol: str = "sequential",
) -> Intervention:
    """The editor's work."""
    return method(name, moments(model), protocol).fit(model, splits(target), SITE)


def matrices(made: Intervention) -> ByLayer:
    """ΔW by layer of a change that is no fact's own."""
    if isinstance(made, Composition):
        return {part.layer: part.matrix(0) for part in made.parts}
    assert isinstance(made, WeightDeltas | DenseDeltas)
    return {made.layer: made.matrix(0)}


# -- by hand ---------------------------------------------------------------------------------------

ByHand = Callable[[ModelHandle, Fact], ByLayer]
"""Edits a model for good; its weights are what is changed."""


def by_hand(name: str, c: dict[int, Tensor]) -> ByHand:
    """The literal version of an editor of `METHODS`."""
    if name in ("rome", "r_rome"):
        return partial(_rome, c[SITE.layer], name == "r_rome")
    if name in ("ft", "ft_l"):
        return partial(_tuned, METHODS[name])
    before: dict[int, list[Tensor]] = {1: [], 2: []}
    solves = {
        "memit": literal_memit.memit(20.0, c),
        "emmet": literal_memit.emmet(0.1, c),
        "alphaedit": literal_memit.alphaedit(0.5, 2.0, c, before),
    }
    return partial(_spread, solves[name], range(2 if name == "emmet" else 1, 3), before)


def _rome(c: Tensor, mean_everywhere: bool, model: ModelHandle, fact: Fact) -> ByLayer:
    edit = literal_rome.edit(model, fact, SITE.layer, CONTEXTS, c, SEARCH, mean_everywhere)
    literal.change_weight(model, SITE.layer, edit.change)
    return {SITE.layer: edit.change}


def _tuned(tuning: FineTune, model: ModelHandle, fact: Fact) -> ByLayer:
    return {SITE.layer: literal_ft.edit(model, (fact,), SITE.layer, tuning)[0]}


def _spread(
    solve: literal_memit.Solve,
    layers: range,
    before: dict[int, list[Tensor]],
    model: ModelHandle,
    fact: Fact,
) -> ByLayer:
    made = literal_memit.edit(model, (fact,), layers, CONTEXTS, SEARCH, solve)
    for layer in layers:
        before[layer].append(literal_memit.key(model, fact, layer, CONTEXTS)[:, None])
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_sequence_equals_edits_made_by_hand(
    model: ModelHandle, moments: Moments, name: str
) -> None:
    """Fit one fact, change the weights of a copy for good, fit the next on that copy, ..."""
    found = fit(model, moments, name)
    changed, edit = copy_of(model), by_hand(name, moments(model).given)
    total: ByLayer = {}
    for step, fact in enumerate(THREE, 1):
        made = edit(changed, fact)
        total = {layer: total.get(layer, 0) + change for layer, change in made.items()}
        mine = matrices(found.at(step)) if step in found.checkpoints else total
        assert mine.keys() == total.keys()
        assert max(relative(mine[layer], total[layer]) for layer in total) < TOLERANCE
    with found.applied(model):
        for layer in range(model.n_layers):
            torch.testing.assert_close(
                model.w_out(layer), changed.w_out(layer), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("name", ["rome", "memit", "ft"])
def test_a_sequence_is_no_batch_and_no_sum(model: ModelHandle, moments: Moments, name: str) -> None:
    layer = SITE.layer
    found = matrices(fit(model, moments, name).at(3))[layer]
    batch = matrices(fit(model, moments, name, protocol="batch"))[layer]
    single = fit(model, moments, name, protocol="independent")
    parts = single.parts if isinstance(single, Composition) else (single,)
    total = sum(parts[-1].matrix(i) for i in range(len(THREE)))
    assert relative(found, batch) > 0.01
    assert relative(found, total) > 0.01


# -- the history -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (10, (1, 2, 5, 10)),
        (60, (1, 2, 5, 10, 20, 50, 60)),
        (200, (1, 2, 5, 10, 20, 50, 100, 200)),
        (1000, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
    ],
)
def test_checkpoints_are_evenly_spread_over_magnitudes(
    edits: int, expected: tuple[int, ...]
) -> None:
    assert milestones(edits) == expected


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit", "ft"])
def test_a_checkpoint_is_the_state_after_so_many_edits(
    model: ModelHandle, moments: Moments, name: str
) -> None:
    found = fit(model, moments, name, TARGETS)
    assert isinstance(found, History)
    assert found.checkpoints == (1, 2, 5)
    for step in found.checkpoints:
        alone = fit(model, moments, name, TARGETS[:step]).at(step)
        assert alone.digest == found.at(step).digest
    with found.applied(model):
        after = [model.w_out(layer).clone() for layer in range(model.n_layers)]
    with found.at(5).applied(model):
        assert all(torch.equal(model.w_out(n), weight) for n, weight in enumerate(after))
    for step in (0, 3, 4, 6):
        with pytest.raises(ValueError, match=f"no checkpoint after {step} edits"):
            found.at(step)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_afterwards_what_it_was(
    model: ModelHandle, moments: Moments, name: str, empty_cache: Path
) -> None:
    before, w_out = weights(model), model.w_out(SITE.layer).clone()
    found = fit(model, moments, name, TARGETS[:2])
    assert_untouched(model, before)
    assert model.changes == []
    with found.applied(model):
        assert not torch.equal(model.w_out(SITE.layer), w_out)
    assert_untouched(model, before)
    assert model.changes == []


@pytest.mark.parametrize("name", ["rome", "alphaedit", "ft"])
@pytest.mark.parametrize("edits", [1, 2])
def test_a_model_is_what_it_was_after_an_edit_that_fails(
    gpt2: ModelHandle,
    moments: Moments,
    name: str,
    edits: int,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted while the model carries so many edits."""
    before = weights(gpt2)
    encode = ModelHandle.encode

    def interrupted(self: ModelHandle, *args: object, **options: object) -> object:
        if self.changes and edits_of(self) == edits:
            raise KeyboardInterrupt
        return encode(self, *args, **options)

    seen: list[str] = []

    def edits_of(handle: ModelHandle) -> int:
        if handle.changes[-1] not in seen:
            seen.append(handle.changes[-1])
        return len(seen)

    monkeypatch.setattr(ModelHandle, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(gpt2, moments, name)
    assert len(seen) == edits
    assert_untouched(gpt2, before)
    assert gpt2.changes == []


def test_every_edits_diagnostics_are_kept(model: ModelHandle, moments: Moments) -> None:
    for name, metric in (("rome", "value_loss"), ("ft", "tuning_loss")):
        found = fit(model, moments, name)
        rows = [row for row in found.diagnostics if row.metric == metric]
        assert [row.fact_id for row in rows] == [fact.id for fact in THREE]
    first = fit(model, moments, "rome", THREE[:1], protocol="independent")
    assert values_of(fit(model, moments, "rome"), "value_loss")[:1] == values_of(
        first, "value_loss"
    )


def test_random_directions_stay_the_same_along_the_way(gpt2: ModelHandle, moments: Moments) -> None:
    base = method("rome", moments(gpt2))
    found = RandomDelta(base).fit(gpt2, splits(THREE), SITE)
    real = base.fit(gpt2, splits(THREE), SITE)
    assert isinstance(found, History)
    last = found.at(3).right
    for step in (1, 2, 3):
        assert torch.equal(found.at(step).right, last[:, :step])
        assert torch.equal(found.at(step).left, real.at(step).left)
    torch.testing.assert_close(last.norm(dim=-1), real.at(3).right.norm(dim=-1))

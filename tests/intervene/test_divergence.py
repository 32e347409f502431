"""A search that comes to nothing costs its own fact alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.editors.editor import NOT_FINITE
from palimpsest.intervene.editors.finetune import Completions
from palimpsest.intervene.editors.objectives import Aim
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.handle import ModelHandle
from tests.intervene.conftest import TARGETS, relative
from tests.intervene.test_sequential import METHODS, SITE, THREE, fit

Moments = Callable[[ModelHandle], GivenMoments]

VICTIM = THREE[1]
OTHERS = (THREE[0], THREE[2])

SEARCHES = ("rome", "r_rome", "memit", "emmet", "alphaedit")
PROTOCOLS = ("independent", "batch", "sequential")


def make_diverge(patch: pytest.MonkeyPatch, victims: Sequence[Fact]) -> None:
    """From the first step on the victims' δ is no number, and all is computed with that."""
    names = {fact.id for fact in victims}
    optimise, total, completions = ValueSearch.optimise, ValueSearch._loss, Completions.of
    ill: list[Tensor] = []

    def marked(
        self: ValueSearch, model: ModelHandle, facts: Sequence[Fact], *rest: object
    ) -> dict[str, Tensor]:
        ill[:] = [torch.tensor([fact.id in names for fact in facts])]
        return optimise(self, model, facts, *rest)

    def loss(
        self: ValueSearch, model: ModelHandle, parts: object, delta: Tensor, start: Tensor
    ) -> Tensor:
        found = total(self, model, parts, delta, start)
        if delta.grad is not None:  # none is taken at the last evaluation
            delta.grad[ill[0]] = torch.nan
        return found

    def tuned(model: ModelHandle, facts: Sequence[Fact], layer: int, aim: Aim) -> list[Completions]:
        factor = torch.nan if any(fact.id in names for fact in facts) else 1.0
        found = completions(model, facts, layer, aim)
        return [replace(part, length=part.length * factor) for part in found]

    patch.setattr(ValueSearch, "optimise", marked)
    patch.setattr(ValueSearch, "_loss", loss)
    patch.setattr(Completions, "of", tuned)


@pytest.fixture
def one_diverges(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Callable[[], None]:
    """Makes the victim's search diverge from now on, nothing of before being kept."""

    def begin() -> None:
        monkeypatch.setenv("PALIMPSEST_CACHE", str(empty_cache / "diverging"))
        make_diverge(monkeypatch, [VICTIM])

    return begin


def deltas(made: Intervention) -> list[WeightDeltas | DenseDeltas]:
    """What a change is made of, layer by layer."""
    if isinstance(made, History):
        return deltas(made.parts[-1])
    if isinstance(made, Composition):
        return [part for each in made.parts for part in deltas(each)]
    assert isinstance(made, WeightDeltas | DenseDeltas)
    return [made]


def tensors_finite(made: Intervention) -> bool:
    """No tensor holds anything but numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in made.tensors().values())


@pytest.mark.parametrize("name", METHODS)
def test_independent_edits_are_exactly_as_without_it(
    model: ModelHandle, moments: Moments, name: str, one_diverges: Callable[[], None]
) -> None:
    sound = fit(model, moments, name, protocol="independent")
    one_diverges()
    found = fit(model, moments, name, protocol="independent")
    assert sound.change.failed == {}
    assert found.change.failed == {VICTIM.id: NOT_FINITE}
    assert tensors_finite(found)
    for mine, theirs in zip(deltas(found), deltas(sound), strict=True):
        assert not mine.matrix(1).any()
        assert theirs.matrix(1).any()
        assert torch.equal(mine.matrix(0), theirs.matrix(0))
        assert torch.equal(mine.matrix(2), theirs.matrix(2))


@pytest.mark.parametrize("protocol", ["batch", "sequential"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_change_for_all_is_made_without_it(
    model: ModelHandle,
    moments: Moments,
    name: str,
    protocol: str,
    one_diverges: Callable[[], None],
) -> None:
    without = fit(model, moments, name, OTHERS, protocol)
    one_diverges()
    found = fit(model, moments, name, protocol=protocol)
    assert found.change.failed == {VICTIM.id: NOT_FINITE}
    assert tensors_finite(found)
    for mine, theirs in zip(deltas(found), deltas(without), strict=True):
        assert relative(mine.matrix(0), theirs.matrix(0)) < 1e-4


@pytest.mark.parametrize("name", ["ft", "ft_l"])
def test_a_tuned_sequence_is_made_without_it(
    model: ModelHandle, moments: Moments, name: str, one_diverges: Callable[[], None]
) -> None:
    without = fit(model, moments, name, OTHERS)
    one_diverges()
    found = fit(model, moments, name)
    assert found.change.failed == {VICTIM.id: NOT_FINITE}
    assert torch.equal(deltas(found)[0].delta, deltas(without)[0].delta)


@pytest.mark.parametrize("name", ["ft", "ft_l"])
def test_a_batch_that_is_tuned_together_fails_together(
    gpt2: ModelHandle, moments: Moments, name: str, one_diverges: Callable[[], None]
) -> None:
    one_diverges()
    found = fit(gpt2, moments, name, protocol="batch")
    assert found.change.failed == {fact.id: NOT_FINITE for fact in THREE}
    assert not deltas(found)[0].delta.any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_is_changed_if_every_search_fails(
    gpt2: ModelHandle,
    moments: Moments,
    name: str,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
    empty_cache: Path,
) -> None:
    make_diverge(monkeypatch, THREE)
    found = fit(gpt2, moments, name, protocol=protocol)
    assert found.change.failed == {fact.id: NOT_FINITE for fact in THREE}
    before = [gpt2.w_out(layer).clone() for layer in range(gpt2.n_layers)]
    with found.applied(gpt2):
        assert all(torch.equal(gpt2.w_out(n), weight) for n, weight in enumerate(before))
    assert tensors_finite(found)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["rome", "memit", "ft"])
def test_its_diagnostics_are_null_with_the_cause(
    gpt2: ModelHandle,
    moments: Moments,
    name: str,
    protocol: str,
    one_diverges: Callable[[], None],
) -> None:
    one_diverges()
    found = fit(gpt2, moments, name, protocol=protocol)
    metrics = ("tuning_loss",) if name == "ft" else ("value_loss", "value_norm")
    rows = [row for row in found.diagnostics if row.metric in metrics]
    lost = {fact.id for fact in THREE} if (name, protocol) == ("ft", "batch") else {VICTIM.id}
    for row in rows:
        assert (row.value is None) == (row.fact_id is None or row.fact_id in lost)
        assert (row.n, row.note) == ((0, NOT_FINITE) if row.value is None else (1, None))
    assert {row.value is None for row in rows} == ({True} if len(lost) == 3 else {True, False})


@pytest.mark.parametrize("name", SEARCHES)
def test_a_sequence_goes_on_from_the_last_sound_state(
    gpt2: ModelHandle, moments: Moments, name: str, one_diverges: Callable[[], None]
) -> None:
    one_diverges()
    found = fit(gpt2, moments, name)
    assert isinstance(found, History)
    for first, second in zip(deltas(found.at(1)), deltas(found.at(2)), strict=True):
        torch.testing.assert_close(first.matrix(0), second.matrix(0))
    assert found.at(1).change.failed == {}
    assert found.at(2).change.failed == found.at(3).change.failed == {VICTIM.id: NOT_FINITE}


@pytest.mark.parametrize("rate", [1e3, 1e19, 1e30])
def test_whatever_the_rate_what_is_kept_is_within_its_bound(
    model: ModelHandle, rate: float
) -> None:
    search = ValueSearch(steps=4, lr=rate)
    values = search.find(model, TARGETS, SITE, ())
    assert values.delta.isfinite().all()
    limits = search.clamp * values.start.norm(dim=1)
    assert (values.delta.norm(dim=1) <= limits * (1 + 1e-6)).all()
    assert not values.delta[values.failed].any()

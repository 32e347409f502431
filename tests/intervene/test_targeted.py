"""A targeted edit gives the edited subject the new object's coordinates, and leaves the rest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.editors.editor import NOT_FINITE
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.targeted import Targeted
from palimpsest.intervene.editors.values import Hold, ValueSearch
from palimpsest.intervene.erasers.eraser import concept, states_of
from palimpsest.intervene.erasers.leace import fit_leace
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import ENDINGS, PLACES
from tests.intervene.conftest import CONTEXTS, assert_untouched, relative, splits, weights
from tests.intervene.test_divergence import make_diverge

Moments = Callable[[ModelHandle], GivenMoments]

LANGUAGES = sorted(set(ENDINGS.values()))
NEXT = dict(zip(LANGUAGES, LANGUAGES[1:] + LANGUAGES[:1], strict=True))
TARGETS = tuple(replace(f, new=NEXT[f.true]) for f in PLACES[::12])
FACTS = splits(TARGETS, tuple(f for f in PLACES if f.id not in {t.id for t in TARGETS}))
SEARCH = ValueSearch(steps=6, lr=0.2, objective="inject")
LOCATED = 1


@pytest.fixture
def fit(moments: Moments, prefixes: GivenPrefixes) -> Callable[..., Composition]:
    """Fit with given moments and prefixes."""

    def fitted(model: ModelHandle, facts: object = FACTS, **options: object) -> Composition:
        options = {"search": SEARCH, "below": 1, "above": 1, "stride": 1} | options
        method = Targeted(moments=moments(model), prefixes=prefixes, **options)
        return method.fit(model, facts, Site(LOCATED, "mlp"))

    return fitted


def subjects(model: ModelHandle, facts: tuple[Fact, ...], layer: int, owned: bool) -> Tensor:
    owners = {fact.id: n for n, fact in enumerate(facts)} if owned else None
    return states_of(model, facts, [Site(layer)], "last_subject", owners)[0]


def learned(model: ModelHandle, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """R, L and the class means of LEACE on the fit facts, computed anew."""
    known = concept(FACTS.fit, model.width)
    states = subjects(model, known.facts, layer, False)
    affine = fit_leace(states, known.labels, 1e-6)
    return affine.right, affine.left, known.labels.T @ states / known.labels.sum(0)[:, None]


def coordinates(model: ModelHandle, layer: int, objects: list[str]) -> Tensor:
    """R μ of each object."""
    right, _, means = learned(model, layer)
    return means[[LANGUAGES.index(name) for name in objects]] @ right.T


def test_the_subject_has_the_new_objects_coordinates(
    model: ModelHandle, fit: Callable[..., Composition]
) -> None:
    """At every changed layer; and before it had those of none in particular."""
    edit = fit(model)
    assert [part.change.layer for part in edit.parts] == [0, 1, 2]
    for layer in (0, 1, 2):
        right, _, _ = learned(model, layer)
        wanted = coordinates(model, layer, [str(f.new) for f in TARGETS])
        before = subjects(model, TARGETS, layer, False) @ right.T
        with edit.applied(model):
            after = subjects(model, TARGETS, layer, True) @ right.T
        assert relative(after, wanted) < 1e-4
        assert relative(before, wanted) > 0.3


def test_a_probe_of_the_fit_facts_reads_the_new_object(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    """Nearest class in LEACE's coordinates: right on the unchanged model, and then the new one."""
    edit, layer = fit(llama), 2
    right, _, means = learned(llama, layer)

    def read(states: Tensor) -> list[str]:
        gaps = torch.cdist(states @ right.T, means @ right.T)
        return [LANGUAGES[n] for n in gaps.argmin(1).tolist()]

    known = read(subjects(llama, FACTS.fit, layer, False))
    hits = sum(guess == f.true for guess, f in zip(known, FACTS.fit, strict=True))
    assert hits > 0.8 * len(FACTS.fit)
    with edit.applied(llama):
        found = read(subjects(llama, TARGETS, layer, True))
    assert found == [f.new for f in TARGETS]


def test_away_from_the_located_layer_only_coordinates_move(
    model: ModelHandle, fit: Callable[..., Composition]
) -> None:
    """r(h) is the same: what is added lies in L's columns."""
    edit = fit(model)
    for number in (0, 2):
        _, left, _ = learned(model, number)
        added = edit.parts[number].tensors()["right"][:, 0].double()
        inside = left @ torch.linalg.lstsq(left, added.T, driver="gelsd").solution
        assert relative(inside.T, added) < 1e-4


def test_the_search_adds_nothing_to_the_coordinates(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    """And it makes the new object likelier than the coordinates alone do."""
    found = fit(llama, below=0, above=0)
    still = fit(llama, below=0, above=0, search=replace(SEARCH, steps=1))
    right, _, _ = learned(llama, LOCATED)
    moved, base = (each.parts[0].tensors()["right"][:, 0].double() for each in (found, still))
    assert relative(moved, base) > 0.05
    assert relative(moved @ right.T, base @ right.T) < 1e-4
    rows = [llama.encode(f.prompt, f.new, owner=n) for n, f in enumerate(TARGETS)]
    prompts = [replace(row, ids=row.ids[: row.prompt]) for row in rows]
    first = torch.tensor([row.ids[row.prompt] for row in rows])
    likely = []
    for edit in (still, found):
        with edit.applied(llama):
            likely.append(next_token_logprobs(llama, prompts).gather(1, first[:, None]).mean())
    assert likely[1] > likely[0]


def test_a_hold_on_nothing_is_no_hold(llama: ModelHandle) -> None:
    free = [Hold(torch.zeros(llama.width), torch.zeros(llama.width, 0)) for _ in TARGETS]
    site = Site(LOCATED)
    plain, held = (SEARCH.optimise(llama, TARGETS, site, CONTEXTS, h) for h in ((), free))
    assert torch.equal(plain["delta"], held["delta"])
    assert plain["delta"].norm() > 0


def test_independent_edits_are_as_if_each_were_alone(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    all_at_once = fit(llama)
    for n, target in enumerate(TARGETS[:2]):
        alone = fit(llama, replace(FACTS, target=(target,)))
        for mine, part in zip(all_at_once.parts, alone.parts, strict=True):
            assert relative(mine.matrix(n), part.matrix(0)) < 1e-3


def test_a_batch_meets_every_subject(model: ModelHandle, fit: Callable[..., Composition]) -> None:
    edit = fit(model, protocol="batch")
    assert not edit.change.independent
    for layer in (0, 1, 2):
        right, _, _ = learned(model, layer)
        wanted = coordinates(model, layer, [str(f.new) for f in TARGETS])
        with edit.applied(model):
            after = subjects(model, TARGETS, layer, False) @ right.T
        assert relative(after, wanted) < 1e-3


def test_erasing_gives_the_coordinates_of_the_mean(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    edit = fit(llama, search=replace(SEARCH, objective="erase"))
    right, _, _ = learned(llama, 2)
    mean = subjects(llama, FACTS.fit, 2, False).mean(0)
    with edit.applied(llama):
        after = subjects(llama, TARGETS, 2, True) @ right.T
    assert relative(after, (mean @ right.T).expand_as(after)) < 1e-4


def test_an_object_without_fit_facts_is_only_cancelled(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    unknown = replace(FACTS, target=tuple(replace(f, new="Latin") for f in TARGETS))
    edit = fit(llama, unknown)
    right, _, _ = learned(llama, 0)
    mean = subjects(llama, FACTS.fit, 0, False).mean(0)
    with edit.applied(llama):
        after = subjects(llama, unknown.target, 0, True) @ right.T
    assert relative(after, (mean @ right.T).expand_as(after)) < 1e-4


@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_a_failed_search_changes_nothing_at_any_layer(
    llama: ModelHandle,
    fit: Callable[..., Composition],
    monkeypatch: pytest.MonkeyPatch,
    empty_cache: Path,
    protocol: str,
) -> None:
    make_diverge(monkeypatch, TARGETS[1:2])
    edit = fit(llama, protocol=protocol)
    assert edit.change.failed == {TARGETS[1].id: NOT_FINITE}
    monkeypatch.undo()  # the cache is the module's again
    rest = replace(FACTS, target=(TARGETS[0], *TARGETS[2:]))
    expected = fit(llama, rest, protocol=protocol)
    last, wanted = (e.at(e.checkpoints[-1]) if e.checkpoints else e for e in (edit, expected))
    for mine, part in zip(last.parts, wanted.parts, strict=True):
        if protocol == "independent":
            assert not mine.matrix(1).any()
            assert relative(mine.matrix(0), part.matrix(0)) < 1e-3
        else:
            assert relative(mine.matrix(0), part.matrix(0)) < 1e-3


def test_layers_that_the_model_lacks_are_left_out(
    llama: ModelHandle, fit: Callable[..., Composition]
) -> None:
    edit = fit(llama, below=9, above=9, stride=2)
    assert [part.change.layer for part in edit.parts] == [1, 3]


def test_the_model_is_left_as_it_was(llama: ModelHandle, fit: Callable[..., Composition]) -> None:
    before = weights(llama)
    with fit(llama, protocol="batch").applied(llama):
        assert not torch.equal(llama.w_out(2), before["model.layers.2.mlp.down_proj.weight"])
    assert_untouched(llama, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": replace(SEARCH, objective="amplify")}, "inject or erase.*'amplify'"),
        ({"below": -1}, "intervene.below"),
        ({"above": -1}, "intervene.above"),
        ({"stride": 0}, "intervene.stride"),
        ({"facts": replace(FACTS, fit=())}, "at least two classes.*facts.fit"),
    ],
)
def test_what_makes_no_sense_is_refused(
    llama: ModelHandle, fit: Callable[..., Composition], options: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        fit(llama, **options)

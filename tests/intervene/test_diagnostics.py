"""What a fit reports of itself, against a direct computation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.editors.alphaedit import AlphaEdit
from palimpsest.intervene.editors.editor import ValueEditor
from palimpsest.intervene.editors.emmet import Emmet
from palimpsest.intervene.editors.memit import Memit
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.r_rome import RRome
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.moments import GivenMoments, Moments, Second
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.record.row import Row
from tests.intervene import literal, literal_memit
from tests.intervene.conftest import CONTEXTS, TARGETS, copy_of, relative, splits, values_of

Make = Callable[[ModelHandle], GivenMoments]

SEARCH = ValueSearch(steps=4, clamp=0.75)
SITE = Site(2, "mlp")
FACTS = TARGETS[1:4]

OPTIONS = {"threshold": 0.5, "ridge": 2.0}

METHODS: dict[str, ValueEditor] = {
    "rome": Rome(search=SEARCH),
    "r_rome": RRome(search=SEARCH),
    "memit": Memit(search=SEARCH, span=1, weight=20.0),
    "emmet": Emmet(search=SEARCH),
    "alphaedit": AlphaEdit(search=SEARCH, span=1, **OPTIONS),
}


@dataclass(frozen=True)
class Halved:
    """Second moments with those over half of the text beside them."""

    whole: Mapping[int, Tensor]
    half: Mapping[int, Tensor]

    def several(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, Second]:
        return {layer: Second(self.whole[layer].clone, self.half[layer].clone) for layer in layers}


def halves(model: ModelHandle, moments: Make) -> Halved:
    """The given second moments, and others that are a little off."""
    whole = moments(model).given
    generator = torch.Generator().manual_seed(3)
    off = {}
    for layer, c in whole.items():
        noise = torch.randn(len(c), 3 * len(c), generator=generator, dtype=torch.float64)
        scale = c.diagonal().sqrt()[:, None]
        off[layer] = c + 0.2 * scale * (noise @ noise.T / noise.shape[1]) * scale.T
    return Halved(whole, off)


def fit(
    model: ModelHandle, method: ValueEditor, moments: object, protocol: str = "independent"
) -> Intervention:
    """Deltas of the facts."""
    options = {"protocol": protocol, "moments": moments}
    made = type(method)(**{**vars(method), **options, "prefixes": GivenPrefixes(list(CONTEXTS))})
    return made.fit(model, splits(FACTS), SITE)


def matrix(made: Intervention, fact: int) -> Tensor:
    """ΔW of the only layer."""
    return (made.parts[0] if isinstance(made, Composition) else made).matrix(fact)


def rows_of(made: Intervention, metric: str) -> list[Row]:
    """Diagnostics by metric."""
    return [row for row in made.diagnostics if row.metric == metric]


# -- whether there were tokens enough --------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["independent", "batch"])
@pytest.mark.parametrize("name", METHODS)
def test_convergence_is_the_change_between_half_and_all(
    model: ModelHandle, moments: Make, name: str, protocol: str
) -> None:
    """‖ΔW_half − ΔW‖ / ‖ΔW‖, from two fits."""
    method, second = METHODS[name], halves(model, moments)
    whole, half = (
        fit(model, method, GivenMoments(given), protocol) for given in (second.whole, second.half)
    )
    found = fit(model, method, second, protocol)
    groups = len(FACTS) if protocol == "independent" else 1
    expected = [relative(matrix(half, i), matrix(whole, i)) for i in range(groups)]
    assert values_of(found, "moments_convergence") == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0.01
    assert all(torch.equal(matrix(found, i), matrix(whole, i)) for i in range(groups))
    rows = rows_of(found, "moments_convergence")
    facts = [fact.id for fact in FACTS] if protocol == "independent" else [None]
    assert [row.fact_id for row in rows] == facts
    assert {(row.protocol, row.layer) for row in rows} == {("half_of_tokens", SITE.layer)}
    assert values_of(whole, "moments_convergence") == []


def test_a_sequence_tells_of_convergence_at_its_first_edit(
    model: ModelHandle, moments: Make
) -> None:
    method, second = METHODS["rome"], halves(model, moments)
    rows = rows_of(fit(model, method, second, "sequential"), "moments_convergence")
    assert [row.fact_id for row in rows] == [FACTS[0].id]
    expected = values_of(fit(model, method, second, "independent"), "moments_convergence")[0]
    assert rows[0].value == pytest.approx(expected)


def test_convergence_of_every_layer_is_that_of_its_own_change(
    model: ModelHandle, moments: Make
) -> None:
    """The layers below carry what all the tokens made of them."""
    second = halves(model, moments)
    method = Memit(search=SEARCH, span=2, weight=20.0)
    found = fit(model, method, second, "batch")
    shares = {}

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        whole, half = (
            literal_memit.memit(20.0, given)(layer, k, r) for given in (second.whole, second.half)
        )
        shares[layer] = relative(half, whole)
        return whole

    literal_memit.edit(copy_of(model), FACTS, (1, 2), CONTEXTS, SEARCH, solve)
    by_layer = {row.layer: row.value for row in rows_of(found, "moments_convergence")}
    assert by_layer == pytest.approx(shares, rel=1e-3)


def test_more_tokens_change_less(gpt2: ModelHandle) -> None:
    few, many = (
        values_of(
            fit(gpt2, METHODS["rome"], Moments(tokens=tokens, length=16)), "moments_convergence"
        )
        for tokens in (600, 9600)
    )
    assert all(late < early for early, late in zip(few, many, strict=True))


def test_too_few_tokens_for_a_half_are_no_error(gpt2: ModelHandle, moments: Make) -> None:
    second = halves(gpt2, moments)
    flat = Halved(second.whole, {layer: c * 0 for layer, c in second.half.items()})
    assert rows_of(fit(gpt2, METHODS["rome"], flat), "moments_convergence") == []


# -- losses and sinks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_losses_and_norms_are_those_of_the_search(
    gpt2: ModelHandle, moments: Make, name: str, protocol: str
) -> None:
    part = literal.w_out if name in ("rome", "r_rome") else literal.block
    found = fit(gpt2, METHODS[name], moments(gpt2), protocol)
    for i, fact in enumerate(FACTS[:1] if protocol == "sequential" else FACTS):
        search = literal.Search.of(gpt2, fact, CONTEXTS, part(gpt2, SITE.layer), SEARCH)
        expected = literal.find(gpt2, search)
        assert values_of(found, "value_loss")[i] == pytest.approx(expected.loss, rel=1e-4)
        norm = float(expected.delta.norm())
        assert values_of(found, "value_norm")[i] == pytest.approx(norm, rel=1e-4)
    rows = rows_of(found, "value_loss")
    assert [row.fact_id for row in rows] == [fact.id for fact in FACTS]
    assert {(row.axis, row.split, row.layer, row.n) for row in rows} == {
        ("cost", "target", SITE.layer, 1)
    }


@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_rows_are_unique(model: ModelHandle, moments: Make, protocol: str) -> None:
    for method in (*METHODS.values(), Memit(search=SEARCH, span=3)):
        rows = fit(model, method, halves(model, moments), protocol).diagnostics
        keys = {(row.metric, row.protocol, row.fact_id, row.layer) for row in rows}
        assert len(keys) == len(rows)


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_the_multiplier_at_position_0_of_every_layer(
    model: ModelHandle, moments: Make, protocol: str
) -> None:
    """The row's own part of ΔW there, in the model that carries the change of the layers below."""
    method = Memit(search=SEARCH, span=2, weight=20.0)
    found = fit(model, method, moments(model), protocol)
    assert isinstance(found, Composition)
    expected = []
    for below, part in zip((None, found.parts[0]), found.parts, strict=True):
        for i, fact in enumerate(FACTS):
            group, row = (i, 0) if protocol == "independent" else (0, i)
            changed = copy_of(model)
            if below is not None:
                literal.change_weight(changed, below.layer, below.matrix(group))
            first = literal.prompts(changed, fact, [])[0].ids[:1]
            sink = literal.taken(
                changed, literal.Row(first, 0, 0), literal.w_out(changed, part.layer)
            )[0]
            expected.append(float(part.left[group, row] @ sink))
    assert values_of(found, "sink_multiplier") == pytest.approx(expected, rel=1e-3, abs=1e-6)

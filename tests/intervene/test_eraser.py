"""What all erasers share: several layers, rare objects, the gate, what a fit reports."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.erasers.eraser import (
    REST,
    SAME,
    Eraser,
    concept,
    relative_cross_covariance,
)
from palimpsest.intervene.erasers.inlp import Inlp
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.leace_background import LeaceBackground
from palimpsest.intervene.erasers.leace_readers import LeaceReaders
from palimpsest.intervene.erasers.orth import MeanProjection
from palimpsest.intervene.erasers.random_subspace import RandomSubspace
from palimpsest.intervene.erasers.scrub import Scrub
from palimpsest.intervene.intervention import load
from palimpsest.intervene.moments import RunningText
from palimpsest.model import forward as module
from palimpsest.model.forward import capturing, forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import NORMS, Part, Site
from palimpsest.model.tokens import Batch, collate
from palimpsest.record.row import Row
from tests.intervene.concepts import ENDINGS, LABELS, PLACES, SAMPLE, assert_erased, states
from tests.intervene.conftest import copy_of

SITE = Site(2, "residual")


@pytest.fixture(scope="module")
def double(llama: ModelHandle) -> ModelHandle:
    return copy_of(llama, torch.float64)


# -- several layers --------------------------------------------------------------------------------


def test_several_layers_are_each_fitted_on_the_unchanged_model(double: ModelHandle) -> None:
    several = Leace(layers=[3, 1]).fit(double, SAMPLE, SITE)
    assert isinstance(several, Composition)
    assert [part.change.layer for part in several.parts] == [1, 3]
    assert several.change.layer == 1
    for part in several.parts:
        alone = Leace().fit(double, SAMPLE, Site(part.change.layer, "residual"))
        assert torch.equal(part.proj_right, alone.proj_right)
        assert_erased(states(double, Site(part.change.layer, "residual")), part)


def test_all_layers_take_one_pass_over_the_sample(
    double: ModelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    rows: list[int] = []
    real = module.run_to

    def counted(model: ModelHandle, batch: Batch, layer: int) -> None:
        rows.append(len(batch.ids))
        real(model, batch, layer)

    monkeypatch.setattr(module, "run_to", counted)
    found = Leace(all_layers=True).fit(double, SAMPLE, SITE)
    assert len(found.parts) == double.n_layers
    assert sum(rows) == len(PLACES)


def test_a_layer_that_the_model_lacks_is_refused(double: ModelHandle) -> None:
    with pytest.raises(RequestError, match=r"intervene.layers"):
        Leace(layers=[1, 99]).fit(double, SAMPLE, SITE)


# -- where the facts' states do not differ ------------------------------------------------------


def test_in_front_of_the_first_attention_all_prompts_end_alike(double: ModelHandle) -> None:
    """One token, no attention yet, and rotary positions: nothing to erase, and no map of noise."""
    found = Scrub("attention_norm").fit(double, SAMPLE, SITE)
    first, *rest = found.parts
    assert first.proj_left.shape == (double.width, 0)
    assert torch.equal(first.erase(states(double, SITE)), states(double, SITE))
    undefined = {(row.metric, row.protocol): row for row in first.diagnostics if row.value is None}
    assert set(undefined) == {
        ("residual_cross_covariance", "fit_sample"),
        ("residual_cross_covariance", "held_out"),
        ("variance_removed", "fit_sample"),
    }
    assert {(row.note, row.n) for row in undefined.values()} == {(SAME, 0)}
    assert value(first.diagnostics, "rank", "projection") == 0
    for part in rest:
        assert value(part.diagnostics, "residual_cross_covariance", "fit_sample") < 1e-9


@pytest.mark.parametrize("method", [Leace, LeaceReaders, MeanProjection, Inlp, RandomSubspace])
def test_where_nothing_can_be_erased_it_is_refused(
    double: ModelHandle, method: type[Eraser]
) -> None:
    policy = "all" if method is LeaceReaders else "all_but_sink"
    told = r"same for all at layer 0, attention_norm; choose a higher layer, or another intervene"
    with pytest.raises(RequestError, match=told):
        method("attention_norm", policy=policy).fit(double, SAMPLE, Site(0, "attention_norm"))
    method("attention_norm", policy=policy, position="last_subject").fit(
        double, SAMPLE, Site(0, "attention_norm")
    )


@pytest.mark.parametrize("part", NORMS)
def test_every_eraser_works_on_what_a_norm_gives(double: ModelHandle, part: Part) -> None:
    site = Site(2, part)
    before = states(double, site)
    text = RunningText(tokens=300, length=16)
    for method in (Leace(part), LeaceBackground(part, text=text), MeanProjection(part)):
        assert_erased(before, method.fit(double, SAMPLE, site))
    for method in (Inlp(part, c=100.0), RandomSubspace(part)):
        erasure = method.fit(double, SAMPLE, site)
        left = relative_cross_covariance(before, erasure.erase(before), LABELS)
        assert 1e-6 < left < 1.5
    below = Scrub(part, layers=[1, 2]).fit(double, SAMPLE, site)
    with below.parts[0].applied(double):
        assert_erased(states(double, site), below.parts[1], 1e-8)


# -- rare objects ----------------------------------------------------------------------------------


def with_rare(number: int = 2) -> tuple[Fact, ...]:
    """The places, and some whose languages hardly anyone speaks."""
    rare = [replace(PLACES[i], id=f"r{i}", true=f"Rare{i}") for i in range(number)]
    return (*PLACES, *rare)


def test_rare_objects_are_kept_dropped_or_merged_and_counted() -> None:
    sample = with_rare()
    kept, dropped, merged = (concept(sample, 32, rare, 5) for rare in ("keep", "drop", "merge"))
    assert kept.classes == tuple(sorted([*ENDINGS.values(), "Rare0", "Rare1"]))
    assert dropped.classes == tuple(sorted(ENDINGS.values()))
    assert len(dropped.facts) == len(PLACES)
    assert merged.classes == tuple(sorted([*ENDINGS.values(), REST]))
    assert merged.labels.sum(0).tolist()[merged.classes.index(REST)] == 2
    assert [(c.dropped, c.merged) for c in (kept, dropped, merged)] == [(0, 0), (2, 0), (0, 2)]


def test_what_was_dropped_stands_in_the_rows(double: ModelHandle) -> None:
    sample = replace(SAMPLE, fit=(*SAMPLE.fit, *with_rare()[-2:]))
    rows = Leace(rare="drop", least=5).fit(double, sample, SITE).diagnostics
    assert value(rows, "rare_facts", "dropped") == 2
    assert value(rows, "classes", "fit_sample") == len(ENDINGS)


# -- what a fit reports ----------------------------------------------------------------------------


def value(rows: tuple[Row, ...], metric: str, protocol: str) -> float | None:
    [row] = [row for row in rows if (row.metric, row.protocol) == (metric, protocol)]
    return row.value


def test_held_out_subjects_are_reported_beside_the_fit_sample(double: ModelHandle) -> None:
    known, fresh = PLACES[::2], PLACES[1::2]
    stranger = replace(PLACES[0], id="s", true="Basque")
    facts = replace(SAMPLE, target=(), fit=known, test=(*fresh, stranger))
    erasure = Leace().fit(double, facts, SITE)
    rows = erasure.diagnostics
    assert value(rows, "residual_cross_covariance", "fit_sample") < 1e-9
    [held_out] = [row for row in rows if row.protocol == "held_out"]
    assert (held_out.split, held_out.n) == ("test", len(fresh))
    before = states(double, SITE, replace(SAMPLE, target=(), fit=fresh))
    labels = concept(fresh, 32).labels
    wanted = relative_cross_covariance(before, erasure.erase(before), labels)
    assert held_out.value == pytest.approx(wanted)
    assert wanted > 0.01


def test_the_variance_that_is_removed_is_a_share_of_the_samples(double: ModelHandle) -> None:
    erasure = Leace().fit(double, SAMPLE, SITE)
    before = states(double, SITE)
    moved = (erasure.erase(before) - before).square().sum()
    wanted = float(moved / (before - before.mean(0)).square().sum())
    assert value(erasure.diagnostics, "variance_removed", "fit_sample") == pytest.approx(wanted)
    assert 0 < wanted < 1
    assert value(erasure.diagnostics, "rank", "projection") == LABELS.shape[1] - 1


# -- the gate --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_gate_lets_only_prompts_with_a_target_subject_through(double: ModelHandle) -> None:
    gated = Leace(gate="subjects").fit(double, SAMPLE, SITE)
    subject = SAMPLE.target[0].subject
    prompts = [
        SAMPLE.target[0].prompt,
        Prompt.fill("elsewhere", "What do they speak in {} today", subject),
        SAMPLE.fit[1].prompt,  # no target
        Prompt("no subject", "They say that it rains"),
    ]
    batch = collate([double.encode(prompt) for prompt in prompts], double.device)
    with capturing(double, [SITE]) as plain:
        forward(double, batch)
    with gated.applied(double), capturing(double, [SITE]) as found:
        forward(double, batch)
    same = [torch.equal(a, b) for a, b in zip(plain[SITE], found[SITE], strict=True)]
    assert same == [False, False, True, True]
    assert gated.change.oracle
    assert not Leace().fit(double, SAMPLE, SITE).change.oracle


def test_a_gated_erasure_comes_back_from_disk(double: ModelHandle, tmp_path: Path) -> None:
    gated = Leace(gate="subjects").fit(double, SAMPLE, SITE)
    gated.save(tmp_path)
    again = load(tmp_path, KINDS)
    assert again.digest == gated.digest
    assert torch.equal(again.subjects, gated.subjects)


def test_a_gate_that_nothing_opens_is_refused(double: ModelHandle) -> None:
    nobody = replace(SAMPLE, target=(), fit=PLACES)
    with pytest.raises(RequestError, match=r"open the gate, found none; set intervene.gate=always"):
        Leace(gate="subjects").fit(double, nobody, SITE)

"""Every number of the studies is what the plain versions, row by row, make of the same runs."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import numpy as np
import pytest

from palimpsest.record.results import Results, Run
from palimpsest.record.row import UPSTREAM, Row
from palimpsest.study.against import COLUMNS, differences
from palimpsest.study.erasing import OUTCOMES, agreements, correlated
from palimpsest.study.intervals import Estimate
from palimpsest.study.localization import findings, restored_shares, success
from palimpsest.study.recoverable import profiles
from palimpsest.study.regression import Observation, regress
from palimpsest.study.sequences import courses
from palimpsest.study.summary import details, summarise
from tests.study import plain
from tests.study import test_erasing as erasures
from tests.study import test_localization as edits

EXACT = 1e-9
LAYERS = (2, 5, 8)
STEPS = (1, 2, 5, 12)
MODEL = {"fingerprint": "m"}
POSITIONS = ("last_subject", "last_prompt")


def same(found: Estimate | None, wanted: Estimate | None) -> bool:
    """Whether two estimates are equal to 1e-9, and in words to the letter."""
    if found is None or wanted is None:
        return found is wanted
    words = [(e.n, e.note, e.place) for e in (found, wanted)]
    pairs = ((found.value, wanted.value), (found.low, wanted.low), (found.high, wanted.high))
    return words[0] == words[1] and all(close(*pair) for pair in pairs)


def close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=EXACT, abs_tol=EXACT)


def unequal(found: Mapping[object, Estimate], wanted: Mapping[object, Estimate]) -> list[object]:
    """What differs between two tables of estimates, with both values."""
    keys = [*wanted, *(key for key in found if key not in wanted)]
    return [
        (key, found.get(key), wanted.get(key))
        for key in keys
        if not same(found.get(key), wanted.get(key))
    ]


class Messy:
    """Rows with gaps, ties, causes, steps and places of every kind."""

    def __init__(
        self, seed: int, relations: int, steps: bool, last: bool, reached: tuple[int, ...]
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.facts = [(f"f{k:02d}", f"P{k % relations}") for k in range(14)]
        known: tuple[int | None, ...] = STEPS if steps else ()
        self.ends = (*known, None) if last else known
        self.reached = reached

    def rows(self) -> Iterator[Row]:
        for step in self.ends:
            known = self.facts[: step or len(self.facts)]
            yield from self._said(known, step)
        for place in product(LAYERS, POSITIONS):
            yield from self._states(*place)
        for protocol in ("few_shot", "rephrasing", "unchecked"):
            yield from self._attack(protocol, None, None, None)
        about = {"scope": "fact", "axis": "recoverability", "metric": "probe_baseline"}
        for k, relation in enumerate(("P0", "P1")):
            value = 0.2 + 0.1 * k
            yield Row(**about, protocol="majority", relation=relation, value=value, n=5 + k)
        for layer in (2, 5):
            yield from self._each(self.facts, "delta_norm", "l2", axis="cost", layer=layer)

    def _said(self, facts: list[tuple[str, str]], step: int | None) -> Iterator[Row]:
        at = {"step": step}
        yield from self._each(facts, "efficacy", "probability", prompt_id="fit", **at)
        for k in range(3):
            for metric, kind in (("paraphrase", "paraphrase"), ("neighborhood", "neighbor")):
                yield from self._each(facts, metric, "probability", prompt_id=f"{kind}/{k}", **at)
        for prompt in ("fit", "paraphrase/0", "paraphrase/1"):
            yield from self._each(facts, "suppression", "candidates", prompt_id=prompt, **at)
        about = {"scope": "fact", "axis": "downstream", **at}
        score = float(self.random.random())
        yield Row(**about, metric="score", protocol="harmonic_mean", value=score)
        for relation, n in (("P0", 3), ("P1", 900)):
            value = 20 + 9 * float(self.random.random())
            text = {"metric": "perplexity", "protocol": "heldout_text", "relation": relation}
            yield Row(**about, **text, value=value, n=n)

    def _states(self, layer: int, position: str) -> Iterator[Row]:
        note = None if layer in self.reached else UPSTREAM
        for protocol in ("frozen", "retrained", "shadow", "frozen_mlp"):
            for fact, relation in self.facts:
                gone = protocol in ("shadow", "retrained") and layer == LAYERS[-1]
                yield Row(
                    scope="fact", axis="recoverability", metric="probe_accuracy", split="target",
                    protocol=protocol, fact_id=fact, relation=relation, layer=layer,
                    position=position, value=None if gone else float(self.random.random() < 0.6),
                    note="no such probe" if gone and self.reached else note,
                )  # fmt: skip
        yield from self._attack("logit_lens", layer, position, note)
        ranks = {"axis": "recoverability", "layer": layer, "position": position}
        yield from self._each(self.facts, "lens_rank_old", "logit_lens", scale=900, **ranks)

    def _attack(
        self, protocol: str, layer: int | None, position: str | None, note: str | None
    ) -> Iterator[Row]:
        lacking = self.facts[1:] if protocol == "rephrasing" else self.facts
        for (fact, relation), budget in product(lacking, (5, 20)):
            row = {
                "scope": "fact", "axis": "recoverability", "split": "target", "fact_id": fact,
                "relation": relation, "protocol": protocol, "layer": layer, "position": position,
                "budget": budget, "note": note,
            }  # fmt: skip
            hit = float(self.random.random() < 0.5)
            yield Row(**row, metric="attack_success", value=hit)
            if protocol != "unchecked":
                chance = float(self.random.random() < 0.2)
                yield Row(**row, metric="attack_baseline", value=chance)

    def _each(
        self, facts: list[tuple[str, str]], metric: str, protocol: str, **more: object
    ) -> Iterator[Row]:
        scale = more.pop("scale", 1)
        about = {"scope": "fact", "axis": "downstream", "split": "target", **more}
        for fact, relation in facts:
            gone = self.random.random() < 0.15
            value = float(np.round(scale * self.random.random(), 2))
            yield Row(
                **about, metric=metric, protocol=protocol, fact_id=fact, relation=relation,
                value=None if gone else value,
                note=str(self.random.choice(["failed", "no token"])) if gone else None,
            )  # fmt: skip


def messy(write_run: Callable[..., Run], relations: int) -> Results:
    """An unchanged model, a sequence of edits with and one without values at its end, an edit."""
    shapes = (("none", False, True, ()), ("memit", True, True, (5, 8)),
              ("rome", True, False, LAYERS), ("leace", False, True, (8,)))  # fmt: skip
    runs = [
        write_run(*Messy(k, relations, *shape).rows(), run_id=f"{k:012}", method=name,
                  model=MODEL, seed=0)
        for k, (name, *shape) in enumerate(shapes)
    ]  # fmt: skip
    return Results.of(runs)


@pytest.fixture(params=["the sweep", "few relations", "many relations"])
def results(
    request: pytest.FixtureRequest, runs: list[Run], write_run: Callable[..., Run]
) -> Results:
    if request.param == "the sweep":
        return Results.of(runs)
    return messy(write_run, 3 if request.param == "few relations" else 12)


def test_headline_numbers(results: Results) -> None:
    for summary in summarise(results):
        assert unequal(summary.values, plain.headline(summary.run)) == []


def test_every_quantity_and_zone(results: Results) -> None:
    summaries, made = summarise(results), details(results)
    zones = {run_id: dict(found) for run_id, found in profiles(results).items()}
    for place, summary in enumerate(summaries):
        found = {
            (d.axis, d.metric, d.protocol, d.place): d.values[place]
            for d in made
            if d.values[place] and d.metric != "recoverable_old"
        }
        assert unequal(found, plain.details(summary.run)) == []
        assert unequal(zones.get(summary.run.run_id, {}), plain.profile(summary.run)) == []


def test_differences(results: Results) -> None:
    reference, *others = summarise(results)
    found = differences(results, reference, others)
    for column in COLUMNS:
        wanted = {s.run.run_id: plain.contrast(column, s.run, reference.run) for s in others}
        assert unequal(found[column.key], wanted) == []


def test_courses(results: Results) -> None:
    made, wanted = courses(results), plain.courses(results.runs)
    assert {course.summary.run.run_id for course in made} == wanted.keys()
    for course in made:
        stages = wanted[course.summary.run.run_id]
        assert [stage.step for stage in course.stages] == sorted(stages)
        for stage in course.stages:
            assert unequal(stage.values, stages[stage.step]) == []


traced_edits = edits.sweep
shares = edits.shares


@pytest.fixture
def erased(tmp_path) -> list[Run]:
    return erasures.sweep.__wrapped__(tmp_path)


def test_localization(traced_edits: list[Run]) -> None:
    results, by_name = Results.of(traced_edits), edits.by_name(traced_edits)
    traced, unchanged = by_name["trace"], by_name["none"]
    shown, left_out = plain.restored_shares([traced], edits.PROTOCOL)
    assert restored_shares(results, [traced], edits.PROTOCOL) == (pytest.approx(shown), left_out)
    for finding in findings(results):
        observations = []
        for layer in edits.LAYERS:
            run = by_name[f"{finding.objective}{layer}"]
            wanted = plain.success(run, unchanged, finding.objective)
            assert success(results, run, unchanged, finding.objective) == pytest.approx(wanted)
            observations += [
                Observation(fact, relation, layer, value, shown[fact, layer])
                for (fact, relation), value in wanted.items()
                if (fact, layer) in shown
            ]
        made, slow = finding.study, regress(observations)
        for name in ("layer", "effect", "both", "corrected", "increase"):
            assert same(getattr(made, name), getattr(slow, name)), name
        assert unequal(made.correlations, slow.correlations) == []
        assert (made.verdict, made.reason, made.n) == (slow.verdict, slow.reason, slow.n)


def test_erasing(erased: list[Run]) -> None:
    by_name = {run.run_id: run for run in erased}
    made = {(a.position, a.outcome): a for a in agreements(Results.of(erased))}
    names = [outcome.name for outcome in OUTCOMES]
    assert made.keys() == set(product(POSITIONS, names))
    for (position, outcome), found in made.items():
        one = plain.effects([by_name["trace"]], erasures.PROTOCOL, position)
        other = {
            layer: plain.brought(by_name[f"leace{layer}"], by_name["none"], outcome)
            for layer in erasures.LAYERS
        }
        wanted, p = correlated(one, other)
        assert same(found.correlation, wanted)
        assert found.p == pytest.approx(p, abs=EXACT) if p is not None else found.p is None
        assert found.effects == pytest.approx(
            {n: np.mean(list(values.values())) for n, values in one.items()}
        )
        assert found.outcomes == pytest.approx(
            {n: np.mean(list(values.values())) for n, values in other.items()}
        )

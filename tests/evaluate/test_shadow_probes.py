"""Shadow probes: an attacker who has the method change facts of their own, and probes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate import shadow_probes
from palimpsest.evaluate.probes import Probes
from palimpsest.evaluate.scene import Scene, Shadow
from palimpsest.evaluate.shadow_probes import FAILED, NO_SHADOW, ShadowProbes
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import UPSTREAM, Row
from tests.evaluate.planting import (
    BATCH,
    INDEPENDENT,
    NONE,
    REACHES,
    Plant,
    State,
    assert_labelled,
    judged,
    measured,
    of,
    overwritten,
    plain,
    share,
)
from tests.evaluate.toy import make_splits

SHADOW = ShadowProbes(stride=1, subjects=6, strengths=[1.0])


class Attacker:
    """Has facts changed as the targets were, and remembers which."""

    def __init__(self, change: Change = INDEPENDENT) -> None:
        self.change, self.facts = change, list[Fact]()

    @contextmanager
    def __call__(self, facts: Sequence[Fact]) -> Iterator[Change]:
        self.facts = list(facts)
        yield self.change


def attacked(
    model: ModelHandle,
    facts: Splits,
    plant: Plant,
    state: Callable[[State], Tensor],
    shadow: Shadow | None,
    change: Change = INDEPENDENT,
    measure: ShadowProbes = SHADOW,
) -> list[Row]:
    plant(facts, state)
    return list(measure.measure(Scene(model, facts, change, shadow=shadow), None))


def test_a_moved_object_escapes_frozen_probes_and_not_shadow_probes(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    """Each fact's own edit moves its object, wherever one owns it: shadow edits move it alike."""
    moved = overwritten(owned=True)
    frozen = measured(
        Probes(stride=1, strengths=[1.0]), model, facts, INDEPENDENT, plant, plain, moved
    )
    rows = attacked(model, facts, plant, moved, Attacker())
    for layer in range(4):
        assert share(judged(rows, "shadow", "target", layer=layer)) == 1.0
    for layer in (2, 3):
        assert share(judged(frozen, "frozen", "target", layer=layer)) < 0.7


def test_where_nothing_is_left_shadow_probes_are_at_chance(
    model: ModelHandle, plant: Plant
) -> None:
    """No bias for the attacker, and none against: a third, as the new object is no answer."""
    random = np.random.default_rng(0)

    def erased(_: State) -> Tensor:
        return torch.tensor(random.normal(size=32), dtype=torch.float32)

    facts = make_splits(target=12)
    shares = []
    for _ in range(12):
        rows = attacked(model, facts, plant, erased, Attacker())
        shares.append(share(judged(rows, "shadow", "target")))
    spread = np.std(shares, ddof=1) / len(shares) ** 0.5
    assert abs(np.mean(shares) - 1 / 3) < 4 * spread + 0.01


def test_as_many_subjects_of_each_class_are_changed_and_the_dev_facts(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    attacker = Attacker()
    rows = attacked(model, facts, plant, plain, attacker, measure=replace(SHADOW, subjects=3))
    assert attacker.facts == [*facts.probe[:12], *facts.dev]
    [count] = of(rows, "probe_subjects", "shadow")
    assert count.value == 12


@pytest.mark.parametrize(
    ("shadow", "measure", "cause"),
    [
        (None, SHADOW, NO_SHADOW),
        (Attacker(), replace(SHADOW, subjects=7), "fewer than 7 probe subjects a class"),
    ],
)
def test_where_no_subjects_can_be_changed_there_is_a_null_with_the_cause(
    model: ModelHandle, facts: Splits, plant: Plant, shadow, measure, cause
) -> None:
    [row] = attacked(model, facts, plant, plain, shadow, measure=measure)
    assert (row.metric, row.protocol, row.value, row.n) == ("probe_accuracy", "shadow", None, 0)
    assert row.note == cause


def test_a_method_that_refuses_the_subjects_leaves_a_null_with_the_cause(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    @contextmanager
    def refusing(_: Sequence[Fact]) -> Iterator[Change]:
        raise RequestError("two facts share a key")
        yield

    [row] = attacked(model, facts, plant, plain, refusing)
    assert (row.value, row.note) == (None, f"{NO_SHADOW}: two facts share a key")


def test_subjects_that_the_method_failed_on_train_nothing(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    """A failed subject's state lies: a probe that learnt of it would be misled."""
    failed = {fact.id: "no finite loss" for fact in facts.probe if fact.true == "Italy"}
    kept = dict(list(failed.items())[1:])

    def lying(state: State) -> Tensor:
        if state.fact.id in kept:
            return replace(state, fact=replace(state.fact, true="Japan")).object()
        return plain(state)

    attacker = Attacker(replace(INDEPENDENT, failed=kept))
    rows = attacked(model, facts, plant, lying, attacker)
    assert share(judged(rows, "shadow", "target")) == 1.0
    [count] = of(rows, "probe_subjects", "shadow")
    assert count.value == len(facts.probe) - len(kept)


def test_where_the_method_fails_on_all_but_one_class_there_is_a_null(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    failed = {fact.id: "no finite loss" for fact in facts.probe if fact.true != "Italy"}
    attacker = Attacker(replace(INDEPENDENT, failed=failed))
    [row] = attacked(model, facts, plant, plain, attacker)
    assert (row.value, row.note) == (None, FAILED)


def test_what_the_name_tells_already_is_no_gain(
    model: ModelHandle, facts: Splits, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditional V-information: about 0 where the name has the object, else positive."""
    names: dict[bool, Callable] = {
        True: lambda model, rows: torch.stack([told[row.ids].object() for row in rows]),
        False: lambda model, rows: torch.stack([told[row.ids].noise() for row in rows]),
    }
    told = {
        model.encode(fact.prompt).ids: State(fact, fact.prompt, -1, 0, "last_prompt")
        for fact in (*facts.target, *facts.probe, *facts.dev)
    }
    bits = {}
    for leaks, embedded in names.items():
        monkeypatch.setattr(shadow_probes, "embeddings", embedded)
        rows = attacked(model, facts, plant, plain, Attacker())
        bits[leaks] = share(of(rows, "v_information", "shadow_given_name"))
    assert abs(bits[True]) < 0.3
    assert bits[False] > 1.0


@pytest.mark.parametrize("change", REACHES)
def test_states_that_the_change_cannot_reach_are_labelled(
    model: ModelHandle, facts: Splits, plant: Plant, change: Change
) -> None:
    rows = attacked(model, facts, plant, plain, Attacker(change), change)
    rows = [row for row in rows if row.metric != "probe_subjects"]
    assert assert_labelled(rows, change) == {
        ("probe_accuracy", "shadow"), ("v_information", "shadow_given_name"),
    }  # fmt: skip


def test_without_a_change_they_read_the_unchanged_model(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = attacked(model, facts, plant, plain, Attacker(NONE), NONE)
    found = judged(rows, "shadow", "target")
    assert share(found) == 1.0
    assert {row.note for row in found} == {UPSTREAM}
    assert share(judged(attacked(model, facts, plant, plain, Attacker(BATCH), BATCH), "shadow",
                        "target")) == 1.0  # fmt: skip


@pytest.mark.parametrize("options", [{"stride": 0}, {"subjects": 0}, {"strengths": [0.0]}])
def test_unusable_options_are_refused(options) -> None:
    with pytest.raises(RequestError, match=f"evaluate.shadow_probes.{next(iter(options))}"):
        ShadowProbes(**options)

"""Linear probes: frozen and retrained ones find what was planted, and nothing else."""

from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import rotation
from palimpsest.evaluate.probes import Probes, embeddings
from palimpsest.evaluate.probing.measuring import POSITIONS
from palimpsest.evaluate.probing.probes import train_all
from palimpsest.evaluate.scene import Scene
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
    assert_controlled,
    assert_labelled,
    assert_undefined,
    baselines,
    judged,
    measured,
    of,
    overwritten,
    plain,
    share,
)
from tests.evaluate.toy import CLASSES, RELATION, make_splits
from tests.model.tiny import make_handle

PROBES = Probes(stride=1, strengths=[1.0])

# -- a secret that is there, and one that is not ---------------------------------------------------


def test_a_planted_object_is_found_everywhere(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, NONE, plant)
    for split, members in (("target", facts.target), ("test", facts.test)):
        for protocol in ("frozen", "retrained"):
            found = judged(rows, protocol, split)
            assert share(found) == 1.0
            places = {(row.layer, row.position, row.fact_id) for row in found}
            assert len(found) == len(places) == 4 * 2 * len(members)
            assert {row.prompt_id for row in found} == {"fit"}


def test_where_nothing_is_planted_nothing_is_found(model: ModelHandle, plant: Plant) -> None:
    """Chance is one of the three objects that are not the new one."""
    facts = make_splits(target=20, test=20)
    rows = measured(PROBES, model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        assert abs(share(judged(rows, "frozen", split)) - 1 / 3) < 0.15


# -- frozen and retrained --------------------------------------------------------------------------


def test_without_a_change_retrained_probes_are_the_frozen_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        frozen, retrained = (judged(rows, name, split) for name in ("frozen", "retrained"))
        assert [replace(row, protocol="frozen") for row in retrained] == frozen


def test_a_moved_object_escapes_frozen_probes_and_not_retrained_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, BATCH, plant, plain, overwritten(owned=False))
    for split in ("target", "test"):
        for layer in range(4):
            frozen = share(judged(rows, "frozen", split, layer=layer))
            assert frozen == 1.0 if layer < 2 else frozen < 0.7
            assert share(judged(rows, "retrained", split, layer=layer)) == 1.0


def test_retrained_probes_learn_from_the_probe_subjects_as_nobodys(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    planted = plant(facts, plain)
    trained = PROBES.prepare(model, facts, 0)
    planted.asked.clear()
    list(PROBES.measure(Scene(model, facts, BATCH), trained))
    wanted = [model.encode(fact.prompt) for fact in (*facts.probe, *facts.dev)]
    assert planted.asked.count(wanted) == 1


def test_independent_changes_have_no_retrained_probe_and_say_why(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
    assert not judged(rows, "retrained", "target")
    assert_undefined(rows, "probe_accuracy", "retrained", range(4))


def test_each_target_is_read_under_its_own_change(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    planted = plant(facts, plain)
    trained = PROBES.prepare(model, facts, 0)
    planted.asked.clear()
    list(PROBES.measure(Scene(model, facts, INDEPENDENT, 7), trained))
    owners: dict[tuple[str, str], set[int]] = {}
    for row in (row for rows in planted.asked for row in rows):
        fact, prompt = planted.of[row.ids]
        owners.setdefault((fact.id, prompt.id), set()).add(row.owner)
    for owner, fact in enumerate(facts.target):
        assert owners[fact.id, "fit"] == {owner}
    turns = rotation(len(facts.test), len(facts.target), 7)
    assert [owners[fact.id, "fit"] for fact in facts.test] == [{owner} for owner in turns]


def test_the_new_object_is_no_answer(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    """States that carry the new object and a trace of the true one: barred, the trace is read."""
    with_new = {fact.id: fact for fact in facts.target}

    def rewritten(state: State) -> Tensor:
        fact = with_new.get(state.fact.id)
        if fact is None:
            return plain(state)
        new = replace(state, fact=replace(fact, true=fact.new or ""))
        return new.object() + 0.3 * state.object()

    rows = measured(PROBES, model, facts, INDEPENDENT, plant, plain, rewritten)
    assert share(judged(rows, "frozen", "target")) == 1.0
    unbarred = replace(facts, target=tuple(replace(f, new=None) for f in facts.target))
    rows = measured(PROBES, model, unbarred, INDEPENDENT, plant, plain, rewritten)
    assert share(judged(rows, "frozen", "target")) == 0.0


def test_the_most_common_object_is_guessed_among_those_that_are_no_new_object(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    """Of equally many subjects a class, the first class is guessed, or the second for its facts."""
    rows = measured(PROBES, model, facts, NONE, plant)
    first, second = sorted(CLASSES)[:2]
    wanted = [f.true == (second if f.new == first else first) for f in facts.target]
    assert baselines(rows)["majority", None, None].value == sum(wanted) / len(wanted)


def test_what_names_tell_of_each_fact_has_a_row(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = judged(measured(PROBES, model, facts, NONE, plant), "embedding", "target")
    assert [row.fact_id for row in rows] == [fact.id for fact in facts.target]
    assert {(row.layer, row.position) for row in rows} == {(-1, "last_subject")}


# -- controls, codes, bits ----------------------------------------------------


def test_selectivity_is_accuracy_less_that_of_the_control(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, BATCH, plant, plain, overwritten(owned=False))
    for protocol in ("frozen", "retrained"):
        assert_controlled(rows, protocol, range(4))
    capacity = of(rows, "probe_capacity", "retrained")
    assert {(row.n, row.split) for row in capacity} == {(24, "probe")}
    assert all(1 / 4 < (row.value or 0) <= 1 for row in capacity)
    assert {row.note for row in of(rows, "probe_capacity", "frozen")} == {UPSTREAM}


def test_codes_and_bits_tell_a_secret_from_none(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    everywhere = Change("relation", False, 0)
    told = measured(PROBES, model, facts, everywhere, plant)
    silent = measured(PROBES, model, facts, everywhere, plant, plain, State.noise)
    for layer in range(4):
        for position in POSITIONS:
            values = []
            for rows in (told, silent):
                here = [r for r in rows if (r.layer, r.position) == (layer, position)]
                (bits,), (ratio,) = (
                    of(here, f"mdl_{name}", "online_code") for name in ("bits", "compression")
                )
                assert ratio.value == pytest.approx(24 * 2 / (bits.value or 0))
                assert (bits.n, bits.split) == (24, "probe")
                gained = [r for r in of(here, "v_information", "retrained") if r.split == "test"]
                assert len(gained) == len(facts.test)
                values.append((bits.value or 0, share(gained)))
            assert values[0][0] < 0.8 * values[1][0]
            assert values[0][1] > 1.5
            assert values[1][1] < 0.5


def test_the_information_of_frozen_probes_falls_where_they_are_misled(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
    mine = [row for row in of(rows, "v_information", "frozen") if row.split == "target"]
    assert len(mine) == 8 * len(facts.target)
    assert min(row.value or 0 for row in mine if (row.layer or 0) < 2) > 1
    assert share([row for row in mine if row.layer == 3]) < 0.5
    assert not of(rows, "v_information", "retrained")


def test_independent_changes_have_no_code_and_say_why(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, INDEPENDENT, plant)
    for metric, protocol in (
        ("mdl_bits", "online_code"),
        ("mdl_compression", "online_code"),
        ("probe_selectivity", "retrained"),
        ("probe_capacity", "retrained"),
    ):
        assert_undefined(rows, metric, protocol, range(4))


# -- the strength ----------------------------------------------------------------------------------

CHOOSING = replace(PROBES, strengths=[1e-5, 1e-3, 10.0])


def strengths(rows: Iterable[Row]) -> dict[str, tuple[float | None, int, str | None]]:
    return {r.protocol: (r.value, r.n, r.note) for r in rows if r.metric == "probe_strength"}


def test_dev_facts_choose_the_strength_before_and_after_the_change(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    """Easy to read before, and after block 2 told wrongly of the dev facts."""

    def misled(state: State) -> Tensor:
        if state.layer < 2 or state.fact not in facts.dev:
            return plain(state)
        index = CLASSES.index(state.fact.true)
        return replace(state, fact=replace(state.fact, true=CLASSES[index - 1])).object()

    rows = measured(CHOOSING, model, facts, BATCH, plant, plain, misled)
    edge = "the least or the largest of the strengths tried: a further one may be better"
    assert strengths(rows) == {"frozen": (10.0, 4, edge), "retrained": (1e-5, 4, edge)}
    unchanged = measured(CHOOSING, model, facts, NONE, plant, plain, plain)
    assert strengths(unchanged) == {"frozen": (10.0, 4, edge), "retrained": (10.0, 4, edge)}
    wider = replace(CHOOSING, strengths=[1e-5, 10.0, 1e9])
    rows = measured(wider, model, facts, BATCH, plant, State.noise, State.noise)
    assert {note for value, _, note in strengths(rows).values() if value == 10.0} <= {None}


def test_target_and_test_facts_choose_nothing(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    def lying(state: State) -> Tensor:
        return state.noise() if state.fact in (*facts.target, *facts.test) else plain(state)

    for change in (NONE, BATCH):
        rows = measured(CHOOSING, model, facts, change, plant, lying, lying)
        assert {value for value, *_ in strengths(rows).values()} == {10.0}


def test_without_two_dev_facts_the_middle_strength_is_taken_and_a_row_says_so(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    few = replace(facts, dev=facts.dev[:1])
    rows = measured(CHOOSING, model, few, BATCH, plant)
    note = "not chosen: fewer than two dev facts whose object a probe subject has"
    assert strengths(rows) == {"frozen": (1e-3, 1, note), "retrained": (1e-3, 1, note)}


# -- what is unchanged by construction -------------------------------------------------------------


@pytest.mark.parametrize("change", REACHES)
def test_states_that_the_change_cannot_reach_are_labelled(
    model: ModelHandle, facts: Splits, plant: Plant, change: Change
) -> None:
    seen = assert_labelled(measured(PROBES, model, facts, change, plant), change)
    refit = set()
    if not change.independent:
        metrics = ("probe_accuracy", "probe_selectivity", "probe_capacity", "v_information")
        refit = {(metric, "retrained") for metric in metrics}
        refit |= {("mdl_bits", "online_code"), ("mdl_compression", "online_code")}
    assert seen == refit | {
        ("probe_accuracy", "frozen"),
        ("probe_selectivity", "frozen"),
        ("probe_capacity", "frozen"),
        ("v_information", "frozen"),
        ("probe_accuracy", "embedding"),
    }


# -- baselines -------------------------------------------------------------------------------------


def test_the_majority_is_the_probe_subjects(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    italy = tuple(fact for fact in facts.probe if fact.true == "Italy")
    others = tuple(fact for fact in facts.probe if fact.true != "Italy")
    skewed = replace(facts, probe=italy + others[:14], target=facts.target[:6])
    row = baselines(measured(PROBES, model, skewed, NONE, plant))["majority", None, None]
    second = min({fact.true for fact in others} - {"Italy"})  # guessed where Italy is the new one
    wanted = [f.true == (second if f.new == "Italy" else "Italy") for f in skewed.target]
    assert 2 / 6 <= row.value == sum(wanted) / 6
    assert row.n == 6


def test_permuted_labels_teach_nothing(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    plant(facts, plain)
    shares = []
    for seed in range(12):
        trained = PROBES.prepare(model, facts, seed)
        rows = baselines(PROBES.measure(Scene(model, facts, NONE, seed), trained))
        found = [row for (protocol, *_), row in rows.items() if protocol == "shuffled"]
        assert {(row.layer, row.position) for row in found} == {
            (layer, position) for layer in range(4) for position in POSITIONS
        }
        shares.append(share(found))
    assert len(set(shares)) > 3
    assert abs(fmean(shares) - 1 / 4) < 0.12


def test_the_names_alone_are_judged_by_their_embeddings(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    row = baselines(measured(PROBES, model, facts, BATCH, plant))["embedding", -1, "last_subject"]
    learned, judged_ = (
        embeddings(model, [model.encode(fact.prompt) for fact in split])
        for split in (facts.probe, facts.target)
    )
    probe = train_all(learned[None], [fact.true for fact in facts.probe], 1.0)[0]
    guesses = probe.predict(judged_, [fact.new for fact in facts.target])
    hits = [a == f.true for a, f in zip(guesses, facts.target, strict=True)]
    assert row.value == fmean(hits)
    assert row.note is None


# -- what is prepared, and where it cannot be ------------------------------------------------------


def test_a_relation_with_too_few_probe_subjects_is_null(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    picky = replace(PROBES, least=6)
    assert list(picky.prepare(model, facts, 0)) == [RELATION]  # 24 subjects of 4 classes
    fewer = replace(facts, probe=facts.probe[:-1])
    rows = measured(picky, model, fewer, BATCH, plant)
    assert [(r.metric, r.protocol, r.value, r.n, r.relation, r.note) for r in rows] == [
        ("probe_accuracy", "frozen", None, 0, RELATION, "fewer than 6 probe subjects a class")
    ]


def test_a_relation_of_one_class_has_no_probe(model: ModelHandle, facts: Splits) -> None:
    same = replace(facts, probe=tuple(fact for fact in facts.probe if fact.true == "Italy"))
    assert len(same.probe) >= PROBES.least
    assert PROBES.prepare(model, same, 0) == {}


def test_probes_are_trained_once(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    planted = plant(facts, plain)
    first = PROBES.prepare(model, facts, 0)[RELATION]
    assert len(planted.asked) == 1
    again = PROBES.prepare(model, facts, 0)[RELATION]
    assert len(planted.asked) == 1
    assert again.tensors().keys() == first.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    assert again.embedding is not None
    assert (again.labels, again.embedding.classes) == (first.labels, CLASSES)
    PROBES.prepare(model, facts, 1)
    replace(PROBES, strengths=[0.1]).prepare(model, facts, 0)
    replace(PROBES, stride=2).prepare(model, facts, 0)
    PROBES.prepare(model, replace(facts, probe=facts.probe[::-1]), 0)
    PROBES.prepare(model, replace(facts, dev=facts.dev[1:]), 0)
    PROBES.prepare(make_handle(seed=1), facts, 0)
    assert len(planted.asked) == 7


@pytest.mark.parametrize(
    ("stride", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (9, [0, 3])]
)
def test_every_so_many_layers_are_read_and_the_last(
    model: ModelHandle, stride: int, layers: list[int]
) -> None:
    assert Probes(stride=stride).layers(model) == layers


@pytest.mark.parametrize("options", [{"stride": 0}, {"strengths": []}])
def test_unusable_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"evaluate.probes.{next(iter(options))} to be at least"):
        Probes(**options)


def test_no_strength_to_choose_from_is_refused() -> None:
    with pytest.raises(RequestError, match=r"evaluate\.probes\.strengths to be at least 1"):
        Probes(strengths=[])

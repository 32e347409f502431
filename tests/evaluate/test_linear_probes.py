"""Linear probes: frozen, retrained and adaptive ones find what was planted, and nothing else."""

from collections import Counter
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

PROBES = Probes(stride=1, strengths=[1.0], folds=4)

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


def test_where_nothing_is_planted_nothing_is_found(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        assert abs(share(judged(rows, "frozen", split)) - 1 / 4) < 0.2


def test_probes_judge_by_the_true_object_not_the_new(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    def obeying(state: State) -> Tensor:
        """A target's states carry its new object."""
        if state.fact in facts.target:
            fact = replace(state.fact, true=state.fact.new or "")
            return replace(state, fact=fact).object() + state.noise()
        return plain(state)

    rows = measured(PROBES, model, facts, BATCH, plant, plain, obeying)
    assert share(judged(rows, "frozen", "target")) == 0.0
    assert share(judged(rows, "frozen", "test")) == 1.0


# -- frozen, retrained, adaptive -------------------------------------------------------------------


def test_without_a_change_retrained_probes_are_the_frozen_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        frozen, retrained = (judged(rows, name, split) for name in ("frozen", "retrained"))
        assert [replace(row, protocol="frozen") for row in retrained] == frozen
    assert not judged(rows, "adaptive", "target")


def test_a_moved_object_escapes_frozen_probes_and_not_retrained_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(PROBES, model, facts, BATCH, plant, plain, overwritten(owned=False))
    for split in ("target", "test"):
        for layer in range(4):
            frozen = share(judged(rows, "frozen", split, layer=layer))
            assert frozen == 1.0 if layer < 2 else frozen < 0.7
            assert share(judged(rows, "retrained", split, layer=layer)) == 1.0
    assert not judged(rows, "adaptive", "target")


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


def test_a_moved_object_is_found_by_probes_of_other_edited_subjects(
    model: ModelHandle, plant: Plant
) -> None:
    facts = make_splits(target=4)
    rows = measured(PROBES, model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
    for layer in range(4):
        frozen = share(judged(rows, "frozen", "target", layer=layer))
        assert frozen == 1.0 if layer < 2 else frozen < 0.7
        adaptive = judged(rows, "adaptive", "target", layer=layer)
        assert share(adaptive) == 1.0
        assert Counter(row.fact_id for row in adaptive) == {fact.id: 2 for fact in facts.target}
    assert not judged(rows, "adaptive", "test")


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
        for prompt in (fact.prompt, *fact.paraphrases):
            assert owners[fact.id, prompt.id] == {owner}
    turns = rotation(len(facts.test), len(facts.target), 7)
    assert [owners[fact.id, "fit"] for fact in facts.test] == [{owner} for owner in turns]


def test_no_adaptive_probe_has_seen_the_fact_that_it_judges(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    def signature(state: State) -> Tensor:
        """All that is there to read is who it is."""
        if state.fact not in facts.target:
            return state.noise()
        return 5.0 * torch.eye(32)[facts.target.index(state.fact)]

    rows = measured(PROBES, model, facts, INDEPENDENT, plant, signature, signature)
    found = judged(rows, "adaptive", "target")
    assert len(found) == 8 * 8
    assert share(found) <= 1 / 4
    # A probe that had seen the fact would always be right.
    states = 5.0 * torch.eye(32)[:8]
    truth = [fact.true for fact in facts.target]
    assert train_all(states[None], truth, 1.0)[0].predict(states) == truth


def test_a_fact_whose_object_no_other_has_is_not_judged_adaptively(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    lone = replace(facts, target=(*facts.target[:3], *facts.target[4:]))  # one New Zealand left
    assert Counter(fact.true for fact in lone.target)["New Zealand"] == 1
    found = judged(measured(PROBES, model, lone, INDEPENDENT, plant), "adaptive", "target")
    for row in found:
        is_lone = row.fact_id == lone.target[-1].id
        assert (row.value is None) == is_lone
        assert row.n == (0 if is_lone else 1)
        assert not is_lone or row.note == "no training subject has its object"
    assert len(found) == 7 * 8


def test_one_class_among_the_others_is_no_question(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    same = replace(facts, target=tuple(f for f in facts.target if f.true == "France"))
    found = judged(measured(PROBES, model, same, INDEPENDENT, plant), "adaptive", "target")
    assert len(found) == 2 * 8
    assert {(row.value, row.n, row.note) for row in found} == {(None, 0, "fewer than two classes")}


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
@pytest.mark.parametrize("folds", [2, 3, 4, 6])
def test_no_fold_holds_a_whole_class(
    model: ModelHandle, plant: Plant, classes: int, folds: int
) -> None:
    """The classes of the target facts take turns, which must not fall in with the folds."""
    names = ("Chad", *CLASSES, "Peru")[:classes]
    facts = make_splits(names, target=2, probe=5)
    assert [fact.true for fact in facts.target] == list(names) * 2
    rows = measured(replace(PROBES, folds=folds, stride=3), model, facts, INDEPENDENT, plant)
    found = judged(rows, "adaptive", "target")
    assert len(found) == 2 * classes * 4
    assert all(row.value is not None for row in found)


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
    assert strengths(rows) == {"frozen": (10.0, 4, None), "retrained": (1e-5, 4, None)}
    unchanged = measured(CHOOSING, model, facts, NONE, plant, plain, plain)
    assert strengths(unchanged) == {"frozen": (10.0, 4, None), "retrained": (10.0, 4, None)}


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
    refit = {("probe_accuracy", "adaptive")}
    if not change.independent:
        metrics = ("probe_accuracy", "probe_selectivity", "probe_capacity", "v_information")
        refit = {(metric, "retrained") for metric in metrics}
        refit |= {("mdl_bits", "online_code"), ("mdl_compression", "online_code")}
    assert seen == refit | {
        ("probe_accuracy", "frozen"),
        ("probe_selectivity", "frozen"),
        ("probe_capacity", "frozen"),
        ("v_information", "frozen"),
    }


# -- baselines -------------------------------------------------------------------------------------


def test_the_majority_is_the_probe_subjects(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    italy = tuple(fact for fact in facts.probe if fact.true == "Italy")
    others = tuple(fact for fact in facts.probe if fact.true != "Italy")
    skewed = replace(facts, probe=italy + others[:14], target=facts.target[:6])
    row = baselines(measured(PROBES, model, skewed, NONE, plant))["majority", None, None]
    assert row.value == 2 / 6  # of the six targets two are Italian
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
    hits = [a == f.true for a, f in zip(probe.predict(judged_), facts.target, strict=True)]
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


@pytest.mark.parametrize("options", [{"stride": 0}, {"folds": 1}])
def test_unusable_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"evaluate.probes.{next(iter(options))} to be at least"):
        Probes(**options)


def test_no_strength_to_choose_from_is_refused() -> None:
    with pytest.raises(RequestError, match=r"evaluate\.probes\.strengths to be at least 1"):
        Probes(strengths=[])

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate import recoverability as module
from palimpsest.evaluate.asking import rotation
from palimpsest.evaluate.probing.probes import train_all
from palimpsest.evaluate.recoverability import (
    POSITIONS,
    Recoverability,
    embeddings,
)
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Position, Site
from palimpsest.model.tokens import NOBODY, Tokens
from palimpsest.record.row import UPSTREAM, Row
from tests.evaluate.toy import CLASSES, RELATION, make_splits
from tests.model.tiny import make_handle

NONE = Change("fact", False, None)
INDEPENDENT = Change("fact", True, 2)
BATCH = Change("relation", False, 2)

RULER = Recoverability(stride=1, strengths=[1.0], hidden=0, folds=4)


@dataclass(frozen=True)
class State:
    """A state that is asked for: whose, after which block, in which row."""

    fact: Fact
    prompt: Prompt
    owner: int
    layer: int
    position: Position

    def noise(self) -> Tensor:
        """In the last features: the same for a subject and prompt, layer and position."""
        key = f"{self.fact.id}/{self.prompt.id}/{self.layer}/{self.position}"
        seed = int.from_bytes(key.encode(), "big") % (2**63 - 1)
        noise = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        return torch.cat([torch.zeros(24), noise])

    def object(self, at: int = 0) -> Tensor:
        """The true object as one of the features from `at` on."""
        index = sorted({*CLASSES, "Peru", "Chad"}).index(self.fact.true)
        return 3.0 * torch.eye(32)[at + index]


class Planted:
    """Stands for `features`: states made of what a test hides in them."""

    def __init__(self, model: ModelHandle, facts: Splits, state: Callable[[State], Tensor]) -> None:
        self.state = state
        self.asked: list[list[Tokens]] = []
        self.of: dict[tuple[int, ...], tuple[Fact, Prompt]] = {}
        for fact in (*facts.target, *facts.test, *facts.probe, *facts.dev):
            for prompt in (fact.prompt, *fact.paraphrases):
                self.of[model.encode(prompt).ids] = fact, prompt

    def __call__(
        self,
        model: ModelHandle,
        rows: Sequence[Tokens],
        sites: Sequence[Site],
        positions: Sequence[Position],
    ) -> Tensor:
        self.asked.append(list(rows))
        out = torch.empty(len(sites), len(positions), len(rows), 32)
        for s, site in enumerate(sites):
            assert site.part == "residual"
            for p, position in enumerate(positions):
                for n, row in enumerate(rows):
                    fact, prompt = self.of[row.ids]
                    state = State(fact, prompt, row.owner, site.layer, position)
                    out[s, p, n] = self.state(state)
        return out


Plant = Callable[[Splits, Callable[[State], Tensor]], Planted]


@pytest.fixture
def plant(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts states of one's own in place of the model's."""

    def to(facts: Splits, state: Callable[[State], Tensor]) -> Planted:
        planted = Planted(model, facts, state)
        monkeypatch.setattr(module, "features", planted)
        return planted

    return to


def plain(state: State) -> Tensor:
    """The object can be read at every place."""
    return state.object() + state.noise()


def overwritten(owned: bool) -> Callable[[State], Tensor]:
    """From block 2 on the object has moved to other features: everywhere, or where one owns it."""

    def state(at: State) -> Tensor:
        changed = at.layer >= 2 and (not owned or at.owner != NOBODY)
        return at.object(10 if changed else 0) + at.noise()

    return state


def judged(rows: Iterable[Row], protocol: str, split: str, **where: Any) -> list[Row]:
    return [
        row
        for row in rows
        if (row.metric, row.protocol, row.split) == ("probe_accuracy", protocol, split)
        and all(getattr(row, name) == value for name, value in where.items())
    ]


def share(rows: Sequence[Row]) -> float:
    assert rows
    return fmean(row.value for row in rows if row.value is not None)


def measure(
    model: ModelHandle,
    facts: Splits,
    change: Change,
    plant: Plant,
    before: Callable[[State], Tensor] = plain,
    after: Callable[[State], Tensor] = plain,
    ruler: Recoverability = RULER,
) -> list[Row]:
    """Probes trained on the states of before, put to the states of after."""
    plant(facts, before)
    trained = ruler.prepare(model, facts, 0)
    plant(facts, after)
    return list(ruler.measure(model, facts, change, trained, 0))


# -- a secret that is there, and one that is not ---------------------------------------------------


def test_a_planted_object_is_found_everywhere(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, NONE, plant)
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
    rows = measure(model, facts, NONE, plant, State.noise, State.noise)
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

    rows = measure(model, facts, BATCH, plant, plain, obeying)
    assert share(judged(rows, "frozen", "target")) == 0.0
    assert share(judged(rows, "frozen", "test")) == 1.0


# -- frozen, retrained, adaptive -------------------------------------------------------------------


def test_without_a_change_retrained_probes_are_the_frozen_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        frozen, retrained = (judged(rows, name, split) for name in ("frozen", "retrained"))
        assert [replace(row, protocol="frozen") for row in retrained] == frozen
    assert not judged(rows, "adaptive", "target")


def test_a_moved_object_escapes_frozen_probes_and_not_retrained_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, BATCH, plant, plain, overwritten(owned=False))
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
    trained = RULER.prepare(model, facts, 0)
    planted.asked.clear()
    list(RULER.measure(model, facts, BATCH, trained, 0))
    wanted = [model.encode(fact.prompt) for fact in (*facts.probe, *facts.dev)]
    assert planted.asked.count(wanted) == 1


def test_independent_changes_have_no_retrained_probe_and_say_why(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
    assert not judged(rows, "retrained", "target")
    null = judged(rows, "retrained", "test")
    assert {(row.layer, row.position) for row in null} == {
        (layer, position) for layer in range(4) for position in POSITIONS
    }
    assert {(row.value, row.n, row.fact_id) for row in null} == {(None, 0, None)}
    assert {row.note for row in null} == {
        "undefined for independent edits: no probe subject is edited"
    }


def test_a_moved_object_is_found_by_probes_of_other_edited_subjects(
    model: ModelHandle, plant: Plant
) -> None:
    facts = make_splits(target=4)
    rows = measure(model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
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
    trained = RULER.prepare(model, facts, 0)
    planted.asked.clear()
    list(RULER.measure(model, facts, INDEPENDENT, trained, 7))
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

    rows = measure(model, facts, INDEPENDENT, plant, signature, signature)
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
    found = judged(measure(model, lone, INDEPENDENT, plant), "adaptive", "target")
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
    found = judged(measure(model, same, INDEPENDENT, plant), "adaptive", "target")
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
    ruler = replace(RULER, folds=folds, stride=3)
    rows = measure(model, facts, INDEPENDENT, plant, ruler=ruler)
    found = judged(rows, "adaptive", "target")
    assert len(found) == 2 * classes * 4
    assert all(row.value is not None for row in found)


# -- probes with a hidden layer, controls, bits ----------------------------------------------------

MLPS = replace(RULER, stride=3, hidden=16)


def of(rows: Iterable[Row], metric: str, protocol: str) -> list[Row]:
    return [row for row in rows if (row.metric, row.protocol) == (metric, protocol)]


def test_a_secret_of_no_linear_kind_is_found_by_mlps_alone(
    model: ModelHandle, plant: Plant
) -> None:
    """The class is the sign of a product; from block 2 on it is that of another two features."""
    facts = make_splits(("France", "Italy"), target=10, test=40, probe=100)
    sign = {"France": 1.0, "Italy": -1.0}

    def hidden(first: int) -> Callable[[State], Tensor]:
        def state(at: State) -> Tensor:
            one = torch.randn(1, generator=torch.Generator().manual_seed(int(at.fact.id[5:])))
            found = at.noise()
            found[first], found[first + 1] = one, sign[at.fact.true] * one
            return found

        return state

    rows = measure(
        model, facts, BATCH, plant, hidden(0),
        lambda at: hidden(0 if at.layer < 2 else 4)(at), MLPS,
    )  # fmt: skip
    for layer, frozen in ((0, True), (3, False)):
        read = {p: share(judged(rows, p, "test", layer=layer)) for p in
                ("frozen", "retrained", "frozen_mlp", "retrained_mlp")}  # fmt: skip
        assert max(read["frozen"], read["retrained"]) < 0.7
        assert read["retrained_mlp"] > 0.75
        assert (read["frozen_mlp"] > 0.75) == frozen


def test_selectivity_is_accuracy_less_that_of_the_control(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, BATCH, plant, plain, overwritten(owned=False), MLPS)
    for protocol in ("frozen", "retrained", "frozen_mlp", "retrained_mlp"):
        found = of(rows, "probe_selectivity", protocol)
        assert {(row.layer, row.position) for row in found} == {
            (layer, position) for layer in (0, 3) for position in POSITIONS
        }
        for row in found:
            where = {"layer": row.layer, "position": row.position}
            accuracy = share(judged(rows, protocol, "test", **where))
            assert row.value is not None
            control = accuracy - row.value
            assert control == pytest.approx(round(control * 8) / 8)
            assert 0 <= control < 0.8
            assert (row.n, row.split) == (8, "test")
    capacity = of(rows, "probe_capacity", "retrained")
    assert {(row.n, row.split) for row in capacity} == {(24, "probe")}
    assert all(1 / 4 < (row.value or 0) <= 1 for row in capacity)
    assert {row.note for row in of(rows, "probe_capacity", "frozen")} == {UPSTREAM}


def test_codes_and_bits_tell_a_secret_from_none(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    everywhere = Change("relation", False, 0)
    told = measure(model, facts, everywhere, plant)
    silent = measure(model, facts, everywhere, plant, plain, State.noise)
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
    rows = measure(model, facts, INDEPENDENT, plant, plain, overwritten(owned=True))
    mine = [row for row in of(rows, "v_information", "frozen") if row.split == "target"]
    assert len(mine) == 8 * len(facts.target)
    assert min(row.value or 0 for row in mine if (row.layer or 0) < 2) > 1
    assert share([row for row in mine if row.layer == 3]) < 0.5
    assert not of(rows, "v_information", "retrained")


def test_independent_changes_have_no_code_and_say_why(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measure(model, facts, INDEPENDENT, plant, ruler=MLPS)
    for metric, protocol in (
        ("mdl_bits", "online_code"),
        ("mdl_compression", "online_code"),
        ("probe_accuracy", "retrained_mlp"),
        ("probe_selectivity", "retrained"),
        ("probe_selectivity", "retrained_mlp"),
        ("probe_capacity", "retrained"),
        ("probe_capacity", "retrained_mlp"),
    ):
        null = of(rows, metric, protocol)
        assert {(row.layer, row.position) for row in null} == {
            (layer, position) for layer in (0, 3) for position in POSITIONS
        }
        assert {(row.value, row.n) for row in null} == {(None, 0)}
        assert {row.note for row in null} == {
            "undefined for independent edits: no probe subject is edited"
        }


# -- the strength ----------------------------------------------------------------------------------

CHOOSING = replace(RULER, strengths=[1e-5, 1e-3, 10.0])


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

    rows = measure(model, facts, BATCH, plant, plain, misled, CHOOSING)
    assert strengths(rows) == {"frozen": (10.0, 4, None), "retrained": (1e-5, 4, None)}
    unchanged = measure(model, facts, NONE, plant, plain, plain, CHOOSING)
    assert strengths(unchanged) == {"frozen": (10.0, 4, None), "retrained": (10.0, 4, None)}


def test_target_and_test_facts_choose_nothing(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    def lying(state: State) -> Tensor:
        return state.noise() if state.fact in (*facts.target, *facts.test) else plain(state)

    for change in (NONE, BATCH):
        rows = measure(model, facts, change, plant, lying, lying, CHOOSING)
        assert {value for value, *_ in strengths(rows).values()} == {10.0}


def test_without_two_dev_facts_the_middle_strength_is_taken_and_a_row_says_so(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    few = replace(facts, dev=facts.dev[:1])
    rows = measure(model, few, BATCH, plant, ruler=CHOOSING)
    note = "not chosen: fewer than two dev facts whose object a probe subject has"
    assert strengths(rows) == {"frozen": (1e-3, 1, note), "retrained": (1e-3, 1, note)}


# -- what is unchanged by construction -------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        NONE,
        INDEPENDENT,
        BATCH,
        Change("relation", False, 0),
        Change("fact", True, 3),
        Change("relation", False, 1, "residual", "all_but_sink"),
        Change("relation", False, 1, "residual", "last_prompt"),
        Change("relation", False, 1, "residual", "last_subject"),
    ],
)
def test_states_that_the_change_cannot_reach_are_labelled(
    model: ModelHandle, facts: Splits, plant: Plant, change: Change
) -> None:
    rows = measure(model, facts, change, plant)
    seen = set()
    for row in rows:
        if row.value is None or row.metric in ("probe_baseline", "probe_strength"):
            continue
        assert row.layer is not None
        assert row.position in POSITIONS
        fixed = (row.metric, row.protocol) == ("probe_capacity", "frozen")
        reached = change.reaches(row.layer, row.position) and not fixed
        assert row.note == (None if reached else UPSTREAM)
        seen.add((row.metric, row.protocol))
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
        ("lens_rank_old", "logit_lens"),
        ("lens_rank_new", "logit_lens"),
    }


# -- the logit lens --------------------------------------------------------------------------------


def lens(rows: Iterable[Row]) -> dict[tuple[str, str | None, int | None], Row]:
    return {(r.metric, r.fact_id, r.layer): r for r in rows if r.protocol == "logit_lens"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lens_ranks_by_hand(kind: str, facts: Splits) -> None:
    model = make_handle(kind)
    found = lens(RULER.measure(model, facts, NONE, {}, 0))
    for fact in facts.target:
        row = model.encode(fact.prompt)
        output = model.model(torch.tensor([row.ids]), output_hidden_states=True)
        for name, thing in (("lens_rank_old", fact.true), ("lens_rank_new", fact.new)):
            whole = model.encode(fact.prompt, thing or "")
            token = whole.ids[whole.prompt]
            for layer in range(3):
                state = output.hidden_states[layer + 1][0, -1]
                scores = model.model.get_output_embeddings()(model.final_norm(state))
                rank = 1 + sum(float(s) > float(scores[token]) for s in scores)
                one = found[name, fact.id, layer]
                assert (one.value, one.position, one.split) == (rank, "last_prompt", "target")
            # At the last layer it is the rank in what the model really says.
            order = output.logits[0, -1].argsort(descending=True).tolist()
            assert found[name, fact.id, 3].value == 1 + order.index(token)
    assert len({row.value for row in found.values()}) > 10


def test_the_lens_reads_the_changed_model(model: ModelHandle, facts: Splits) -> None:
    def push(states: Tensor) -> Tensor:
        assert model.running is not None
        return states + 30 * (model.running.owner == 1).float()[:, None, None]

    before = lens(RULER.measure(model, facts, INDEPENDENT, {}, 0))
    with model.hooked([(model.blocks[2], push)]):
        after = lens(RULER.measure(model, facts, INDEPENDENT, {}, 0))
    moved = {key[1:] for key in before if before[key].value != after[key].value}
    assert moved == {(facts.target[1].id, 2), (facts.target[1].id, 3)}


def test_objects_that_begin_alike_have_no_rank(model: ModelHandle, facts: Splits) -> None:
    old, new = "New Zealand", "New Delhi"
    first, *rest = facts.target
    clash = replace(facts, target=(replace(first, true=old, new=new), *rest))
    tokens = [model.encode(first.prompt, name) for name in (old, new)]
    assert tokens[0].ids[tokens[0].prompt] == tokens[1].ids[tokens[1].prompt]
    for (_, fact_id, _), row in lens(RULER.measure(model, clash, BATCH, {}, 0)).items():
        if fact_id == first.id:
            assert row.value is None
            assert row.note == "old and new object share their first token"
            assert row.n == 0
        else:
            assert row.value is not None


# -- baselines -------------------------------------------------------------------------------------


def baselines(rows: Iterable[Row]) -> dict[tuple[str, int | None, str | None], Row]:
    found = [row for row in rows if row.metric == "probe_baseline"]
    keyed = {(row.protocol, row.layer, row.position): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def test_the_majority_is_the_probe_subjects(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    italy = tuple(fact for fact in facts.probe if fact.true == "Italy")
    others = tuple(fact for fact in facts.probe if fact.true != "Italy")
    skewed = replace(facts, probe=italy + others[:14], target=facts.target[:6])
    row = baselines(measure(model, skewed, NONE, plant))["majority", None, None]
    assert row.value == 2 / 6  # of the six targets two are Italian
    assert row.n == 6


def test_permuted_labels_teach_nothing(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    plant(facts, plain)
    shares = []
    for seed in range(12):
        trained = RULER.prepare(model, facts, seed)
        rows = baselines(RULER.measure(model, facts, NONE, trained, seed))
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
    row = baselines(measure(model, facts, BATCH, plant))["embedding", -1, "last_subject"]
    learned, judged_ = (
        embeddings(model, [model.encode(fact.prompt) for fact in split])
        for split in (facts.probe, facts.target)
    )
    probe = train_all(learned[None], [fact.true for fact in facts.probe], 1.0)[0]
    hits = [a == f.true for a, f in zip(probe.predict(judged_), facts.target, strict=True)]
    assert row.value == fmean(hits)
    assert row.note is None


# -- what is prepared, and where it cannot be ------------------------------------------------------


def test_a_relation_with_too_few_probe_subjects_is_null_and_keeps_its_lens(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    ruler = replace(RULER, least=6)
    assert list(ruler.prepare(model, facts, 0)) == [RELATION]  # 24 subjects of 4 classes
    fewer = replace(facts, probe=facts.probe[:-1])
    rows = measure(model, fewer, BATCH, plant, ruler=ruler)
    null = [row for row in rows if row.metric == "probe_accuracy"]
    assert [(row.value, row.n, row.relation, row.note) for row in null] == [
        (None, 0, RELATION, "fewer than 6 probe subjects a class")
    ]
    assert len(lens(rows)) == 2 * 4 * 8
    assert not baselines(rows)


def test_a_relation_of_one_class_has_no_probe(model: ModelHandle, facts: Splits) -> None:
    same = replace(facts, probe=tuple(fact for fact in facts.probe if fact.true == "Italy"))
    assert len(same.probe) >= RULER.least
    assert RULER.prepare(model, same, 0) == {}


def test_probes_are_trained_once(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    planted = plant(facts, plain)
    first = RULER.prepare(model, facts, 0)[RELATION]
    assert len(planted.asked) == 1
    again = RULER.prepare(model, facts, 0)[RELATION]
    assert len(planted.asked) == 1
    assert again.kit.tensors().keys() == first.kit.tensors().keys()
    for name, tensor in first.kit.tensors().items():
        assert torch.equal(again.kit.tensors()[name], tensor)
    assert torch.equal(again.embedding.weight, first.embedding.weight)
    assert (again.kit.labels, again.embedding.classes) == (first.kit.labels, CLASSES)
    RULER.prepare(model, facts, 1)
    replace(RULER, strengths=[0.1]).prepare(model, facts, 0)
    replace(RULER, hidden=2).prepare(model, facts, 0)
    replace(RULER, stride=2).prepare(model, facts, 0)
    RULER.prepare(model, replace(facts, probe=facts.probe[::-1]), 0)
    RULER.prepare(model, replace(facts, dev=facts.dev[1:]), 0)
    RULER.prepare(make_handle(seed=1), facts, 0)
    assert len(planted.asked) == 8


@pytest.mark.parametrize(
    ("stride", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (9, [0, 3])]
)
def test_every_so_many_layers_are_read_and_the_last(
    model: ModelHandle, stride: int, layers: list[int]
) -> None:
    assert Recoverability(stride=stride).layers(model) == layers


@pytest.mark.parametrize("options", [{"stride": 0}, {"folds": 1}, {"hidden": -1}])
def test_unusable_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"recoverability.{next(iter(options))} to be at least"):
        Recoverability(**options)


def test_no_strength_to_choose_from_is_refused() -> None:
    with pytest.raises(RequestError, match="strengths to be at least 1, found 0"):
        Recoverability(strengths=[])

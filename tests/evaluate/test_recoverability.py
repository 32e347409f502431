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
from palimpsest.evaluate.probes import train
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

RULER = Recoverability(stride=1, c=1.0, folds=4)


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
        for fact in (*facts.target, *facts.test, *facts.probe):
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
    wanted = [model.encode(fact.prompt) for fact in facts.probe]
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
    assert train(states, truth, RULER.c).predict(states) == truth


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
        if row.value is None or row.metric == "probe_baseline":
            continue
        assert row.layer is not None
        assert row.position in POSITIONS
        reached = change.reaches(row.layer, row.position)
        assert row.note == (None if reached else UPSTREAM)
        seen.add((row.metric, row.protocol))
    refit = "adaptive" if change.independent else "retrained"
    assert seen == {
        ("probe_accuracy", "frozen"),
        ("probe_accuracy", refit),
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
    probe = train(learned, [fact.true for fact in facts.probe], RULER.c)
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
    for where, probe in first.probes.items():
        assert torch.equal(again.probes[where].weight, probe.weight)
        assert torch.equal(again.shuffled[where].bias, first.shuffled[where].bias)
    assert (again.majority, again.embedding.classes) == (first.majority, first.embedding.classes)
    RULER.prepare(model, facts, 1)
    replace(RULER, c=0.1).prepare(model, facts, 0)
    replace(RULER, stride=2).prepare(model, facts, 0)
    RULER.prepare(model, replace(facts, probe=facts.probe[::-1]), 0)
    RULER.prepare(make_handle(seed=1), facts, 0)
    assert len(planted.asked) == 6


@pytest.mark.parametrize(
    ("stride", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (9, [0, 3])]
)
def test_every_so_many_layers_are_read_and_the_last(
    model: ModelHandle, stride: int, layers: list[int]
) -> None:
    assert Recoverability(stride=stride).layers(model) == layers


@pytest.mark.parametrize("options", [{"stride": 0}, {"folds": 1}])
def test_unusable_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"recoverability.{next(iter(options))} to be at least"):
        Recoverability(**options)

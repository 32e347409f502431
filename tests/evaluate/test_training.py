from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import isnan

import pytest
import torch
from torch import Tensor

from palimpsest.evaluate.probing.probes import train_all
from palimpsest.evaluate.probing.training import (
    Kit,
    Reader,
    Recipe,
    Where,
    control,
    shuffled,
    train_kit,
    train_mlp_kit,
)
from tests.evaluate.test_probes import sample
from tests.evaluate.toy import make_fact

PLACES: tuple[Where, ...] = ((0, "last_subject"), (3, "last_prompt"))
LABELS = sample(3, 60, 12)[1]
RECIPE = Recipe([0.1, 1.0, 10.0], 0)


def states(n: int, seed: int, spread: float = 2.0) -> dict[Where, Tensor]:
    return {where: sample(3, n, 12, seed + i, spread)[0] for i, where in enumerate(PLACES)}


def kit(recipe: Recipe = RECIPE, dev: int = 30, lost: bool = False) -> Kit:
    found = states(60, 0)
    if lost:
        found[PLACES[0]][3, 4] = torch.nan
    return train_kit(found, LABELS, states(dev, 7), sample(3, dev, 12)[1], recipe)


def mlp_kit(lost: bool = False) -> Kit:
    found = states(60, 0)
    if lost:
        found[PLACES[0]][3, 4] = torch.nan
    return train_mlp_kit(found, LABELS, 8, 0)


@pytest.mark.parametrize(("train", "kind"), [(kit, "linear"), (mlp_kit, "mlp")])
def test_a_kit_survives_its_tensors(train: Callable[[], Kit], kind: str) -> None:
    first, fresh = train(), states(20, 9)
    again = Kit.restored(first.tensors(), PLACES, LABELS)
    assert (again.labels, again.strength) == (LABELS, first.strength)
    assert (again.chosen_on, again.embedding) == (first.chosen_on, None)
    assert list(again.readers) == list(PLACES)
    for where, reader in first.readers.items():
        other = again.readers[where]
        assert (other.capacity, repr(other.bits)) == (reader.capacity, repr(reader.bits))
        for before, after in ((reader.probes, other.probes), (reader.controls, other.controls)):
            assert list(before) == list(after) == [kind]
            assert after[kind].classes == before[kind].classes
            scores = after[kind].scores(fresh[where])
            assert torch.equal(scores, before[kind].scores(fresh[where]))
    assert again.tensors().keys() == first.tensors().keys()


def test_a_kit_keeps_what_names_tell() -> None:
    (names,) = train_all(states(60, 3)[PLACES[0]][None], LABELS, 1.0)
    again = Kit.restored(replace(kit(), embedding=names).tensors(), PLACES, LABELS)
    assert again.embedding is not None
    assert torch.equal(again.embedding.weight, names.weight)
    assert again.embedding.classes == names.classes


def test_of_mlps_there_is_no_code_and_nothing_is_chosen() -> None:
    found = mlp_kit()
    assert all(isnan(reader.bits) for reader in found.readers.values())
    assert (found.strength, found.chosen_on) == (0.0, 0)
    for reader in found.readers.values():
        assert list(reader.probes) == list(reader.controls) == list(reader.capacity) == ["mlp"]


def test_controls_learn_permuted_labels_and_their_capacity_is_told() -> None:
    found = kit(Recipe([10.0], 4))
    permuted = shuffled(LABELS, 4)
    assert Counter(permuted) == Counter(LABELS)
    assert permuted != list(LABELS)
    plain = train_all(torch.stack(list(states(60, 0).values())), permuted, 10.0)
    for (where, reader), probe in zip(found.readers.items(), plain, strict=True):
        said = probe.predict(states(60, 0)[where])
        assert reader.controls["linear"].predict(states(60, 0)[where]) == said
        hits = sum(a == b for a, b in zip(said, permuted, strict=True))
        assert reader.capacity["linear"] == hits / 60
        assert 1 / 3 < hits / 60 < 1


def test_dev_facts_choose_the_strength_if_there_are_two() -> None:
    many, one = kit(), kit(dev=1)
    assert (many.strength, many.chosen_on) == (0.1, 30)
    assert (one.strength, one.chosen_on) == (1.0, 0)
    unknown = train_kit(states(60, 0), LABELS, states(30, 7), ["Peru"] * 29 + ["Japan"], RECIPE)
    assert (unknown.strength, unknown.chosen_on) == (1.0, 0)


@pytest.mark.parametrize(("train", "kind"), [(kit, "linear"), (mlp_kit, "mlp")])
def test_what_is_not_finite_is_lost_at_its_place_alone(
    train: Callable[..., Kit], kind: str
) -> None:
    lost, sound = train(lost=True), train()
    first, second = (lost.readers[where] for where in PLACES)
    fresh = states(20, 9)
    for found in (first.probes, first.controls):
        for probe in found.values():
            assert probe.predict(fresh[PLACES[0]]) == [None] * 20
    assert not any(value == value for value in (first.bits, *first.capacity.values()))
    bits = pytest.approx(sound.readers[PLACES[1]].bits, rel=0.2, nan_ok=True)
    assert second.bits == bits
    assert None not in second.probes[kind].predict(fresh[PLACES[1]])


def test_a_kit_lies_over_another() -> None:
    reader = Reader({}, {}, {}, 1.0)
    below = Kit({PLACES[0]: reader, PLACES[1]: reader}, LABELS, 0.1, 3)
    other = Reader({}, {}, {}, 2.0)
    above = Kit({PLACES[1]: other}, LABELS, 0.2, 4).over(below)
    assert above.readers == {PLACES[0]: reader, PLACES[1]: other}
    assert (above.strength, above.chosen_on) == (0.2, 4)


def test_the_control_task_gives_each_subject_a_label_as_often_as_the_sample_does() -> None:
    labels = ["a"] * 30 + ["b"] * 10
    facts = [make_fact(n) for n in range(1200)]
    drawn = [control(fact, labels, 0) for fact in facts]
    assert drawn == [control(fact, labels, 0) for fact in facts]
    assert drawn != [control(fact, labels, 1) for fact in facts]
    assert Counter(drawn)["a"] / 1200 == pytest.approx(0.75, abs=0.05)
    of_france = [name for name, fact in zip(drawn, facts, strict=True) if fact.true == "France"]
    assert Counter(of_france)["a"] / len(of_france) == pytest.approx(0.75, abs=0.1)

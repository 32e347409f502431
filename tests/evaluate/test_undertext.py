"""The undertext map: what was planted is legible where it was planted, and nowhere else."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate import undertext as module
from palimpsest.evaluate.scene import Scene
from palimpsest.evaluate.undertext import NO_GROUP, Undertext
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.positions import GROUPS, places
from palimpsest.model.site import Change, Site
from palimpsest.record.row import UPSTREAM, Row
from tests.evaluate.toy import CLASSES, make_splits

NONE = Change("fact", False, None)
INDEPENDENT = Change("fact", True, 2)
RELATION_WIDE = Change("relation", False, 2)
MAP = Undertext(stride=1, least=1, strength=1.0)


@pytest.fixture
def facts() -> Splits:
    """Ten probe subjects a class."""
    return make_splits(probe=9)


def measure(
    model: ModelHandle, facts: Splits, change: Change = NONE, undertext: Undertext = MAP
) -> list[Row]:
    prepared = undertext.prepare(model, facts, 0)
    return list(undertext.measure(Scene(model, facts, change), prepared))


def of(rows: Sequence[Row], metric: str, **equal: object) -> list[Row]:
    return [
        row
        for row in rows
        if row.metric == metric and all(getattr(row, k) == v for k, v in equal.items())
    ]


class Planted:
    """After block 1, one token group of every prompt carries the fact's object alone."""

    def __init__(self, model: ModelHandle, facts: Splits, group: str, new: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.linalg.qr(torch.randn(model.width, 8, generator=generator)).Q.T
        self.model, self.signs, self.by_row = model, signs, {}
        for split in ("target", "probe"):
            for fact in getattr(facts, split):
                row = model.encode(fact.prompt)
                told = fact.new if new and split == "target" else fact.true
                spot = places(row).get(group)
                self.by_row[row.ids] = (spot, CLASSES.index(str(told)))

    def __enter__(self) -> None:
        def hook(states: Tensor) -> Tensor:
            running = self.model.running
            assert running is not None
            out = states.clone()
            for n, ids in enumerate(running.ids.tolist()):
                length = int(running.mask[n].sum())
                spot, name = self.by_row[tuple(ids[:length])]
                if spot is not None:
                    out[n, spot] = 20 * self.signs[name]
            return out

        self._context = self.model.hooked([(self.model.blocks[1], hook)])
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


@pytest.mark.parametrize("group", ["last_subject", "first_subsequent", "last_prompt"])
def test_a_planted_object_is_legible_where_it_stands(
    model: ModelHandle, facts: Splits, group: str
) -> None:
    with Planted(model, facts, group):
        rows = measure(model, facts)
    assert {r.value for r in of(rows, "legibility_old", layer=1, position=group)} == {1.0}
    assert {r.value for r in of(rows, "legibility_new", layer=1, position=group)} == {0.0}
    elsewhere = of(rows, "legibility_old", layer=0, position="last_prompt")
    assert {row.protocol for row in elsewhere} == {"frozen", "retrained"}


def test_the_new_object_is_legible_where_it_was_written(model: ModelHandle, facts: Splits) -> None:
    """Probes of the unchanged model are laid on an edit of single facts."""
    with Planted(model, facts, "last_subject"):
        prepared = MAP.prepare(model, facts, 0)
    with Planted(model, facts, "last_subject", new=True):
        rows = list(MAP.measure(Scene(model, facts, INDEPENDENT), prepared))
    [new] = of(rows, "legibility_new", layer=1, position="last_subject")
    [old] = of(rows, "legibility_old", layer=1, position="last_subject")
    assert (new.value, old.value) == (1.0, 0.0)
    assert {row.protocol for row in rows} == {"frozen"}


def test_probes_are_trained_anew_on_a_model_changed_for_all(
    model: ModelHandle, facts: Splits
) -> None:
    """The objects' directions are permuted: those of the unchanged model would name others."""
    prepared = MAP.prepare(model, facts, 0)
    with Planted(model, facts, "last_prompt"):
        rows = list(MAP.measure(Scene(model, facts, RELATION_WIDE), prepared))
    by_protocol = of(rows, "legibility_old", layer=1, position="last_prompt")
    anew, frozen = sorted(by_protocol, key=lambda row: row.protocol, reverse=True)
    assert (anew.protocol, frozen.protocol) == ("retrained", "frozen")
    assert anew.value == 1.0
    assert frozen.value is not None
    assert frozen.value < 1.0


def test_permuted_objects_are_not_legible(model: ModelHandle, facts: Splits) -> None:
    """The false-positive rate over seeds is chance: the states know nothing of these objects."""
    shares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(facts.probe), generator=generator).tolist()
        truths = [facts.probe[n].true for n in order]
        probe = tuple(replace(f, true=t) for f, t in zip(facts.probe, truths, strict=True))
        found = of(measure(model, replace(facts, probe=probe)), "legibility_old", layer=3)
        shares += [row.value for row in found if row.value is not None]
    assert abs(sum(shares) / len(shares) - 1 / len(CLASSES)) < 0.12


def test_states_are_those_of_the_named_tokens(model: ModelHandle, facts: Splits) -> None:
    found = MAP._states(model, facts.target)
    rows = [model.encode(fact.prompt) for fact in facts.target]
    for position in ("last_subject", "last_prompt"):
        expected = features(model, rows, [Site(n) for n in range(4)], [position])[:, 0]
        assert torch.equal(found[position].states, expected)
    assert list(found) == list(GROUPS)


def test_what_the_change_cannot_reach_is_marked(model: ModelHandle, facts: Splits) -> None:
    rows = measure(model, facts, INDEPENDENT)
    assert {row.layer for row in rows if row.note == UPSTREAM} == {0, 1}
    for policy, reached in (
        ("last_prompt", {"last_prompt"}),
        ("last_subject", {"last_subject", "first_subsequent", "further", "last_prompt"}),
        ("all", set(GROUPS)),
    ):
        change = Change("relation", False, 2, "residual", policy)  # type: ignore[arg-type]
        free = [r for r in measure(model, facts, change) if r.layer == 3 and r.value is not None]
        assert {row.position for row in free if row.note != UPSTREAM} <= reached
        assert {"last_prompt"} <= {row.position for row in free if row.note != UPSTREAM}


def test_groups_that_few_prompts_have_are_null(model: ModelHandle, facts: Splits) -> None:
    rich = replace(MAP, least=9)
    found = measure(model, facts, NONE, rich)
    nulls = {row.position for row in found if row.value is None}
    assert nulls
    assert {row.note for row in found if row.value is None} == {NO_GROUP}
    assert "last_prompt" not in nulls


def test_a_relation_without_enough_subjects_has_no_map(model: ModelHandle, facts: Splits) -> None:
    picky = replace(MAP, least=50)
    assert measure(model, facts, NONE, picky) == []


def test_failed_facts_do_not_count(model: ModelHandle, facts: Splits) -> None:
    change = replace(INDEPENDENT, failed={facts.target[0].id: "no loss"})
    [row] = of(measure(model, facts, change), "legibility_old", layer=3, position="last_prompt")
    assert row.n == len(facts.target) - 1


def test_probes_come_from_the_cache(
    model: ModelHandle, facts: Splits, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MAP.prepare(model, facts, 0)
    monkeypatch.setattr(module, "train_all", None)
    again = MAP.prepare(model, facts, 0)
    for relation, readers in first.items():
        for group, probes in readers.items():
            for mine, other in zip(probes, again[relation][group], strict=True):
                assert torch.equal(mine.weight, other.weight)
                assert mine.classes == other.classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "evaluate.undertext.stride"),
        ({"strength": 0.0}, "evaluate.undertext.strength"),
        ({"least": 0}, "evaluate.undertext.least"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Undertext(**options)

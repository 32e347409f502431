"""A scene: what measures share is computed once, and is what each would have computed alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.evaluate import scene as module
from palimpsest.evaluate.asking import dealt
from palimpsest.evaluate.ruler import after
from palimpsest.evaluate.scene import Scene, ask_targets
from palimpsest.facts.fact import Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Position, Site
from palimpsest.model.tokens import Tokens

CHANGE = Change("fact", True, 1)
SITES = [Site(0), Site(3)]
POSITIONS: list[Position] = ["last_subject", "last_prompt"]


def test_target_facts_are_asked_once(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, asked = ask_targets(model, facts), []
    real = module.ask

    def counted(*args: object) -> object:
        asked.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "ask", counted)
    scene = Scene(model, facts, CHANGE)
    assert asked == []
    assert scene.answers == wanted
    assert scene.answers is scene.answers
    assert len(asked) == 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that states are computed of."""
    found: list[int] = []

    def counted(
        model: ModelHandle,
        rows: Sequence[Tokens],
        sites: Sequence[Site],
        positions: Sequence[Position],
    ) -> Tensor:
        found.append(len(rows))
        return features(model, rows, sites, positions)

    monkeypatch.setattr(module, "features", counted)
    return found


def test_states_are_computed_once_and_are_the_plain_ones(
    model: ModelHandle, facts: Splits, calls: list[int]
) -> None:
    scene = Scene(model, facts, CHANGE)
    first = scene.features(scene.prompts, SITES, POSITIONS)
    assert torch.equal(first, features(model, scene.prompts, SITES, POSITIONS))
    rows = [model.encode(fact.prompt, owner=n) for n, fact in enumerate(facts.target)]
    assert scene.features(tuple(rows), tuple(SITES), tuple(POSITIONS)) is first
    assert calls == [8]


def test_other_rows_owners_sites_and_positions_are_computed_anew(
    model: ModelHandle, facts: Splits, calls: list[int]
) -> None:
    scene = Scene(model, facts, CHANGE)
    nobodys = [model.encode(fact.prompt) for fact in facts.target]
    for rows, sites, positions in (
        (scene.prompts, SITES, POSITIONS),
        (scene.prompts[:3], SITES, POSITIONS),
        (nobodys, SITES, POSITIONS),
        (scene.prompts, SITES[:1], POSITIONS),
        (scene.prompts, SITES, POSITIONS[::-1]),
    ):
        found = scene.features(rows, sites, positions)
        assert torch.equal(found, features(model, rows, sites, positions))
    assert calls == [8, 3, 8, 8, 8]


def test_another_scene_shares_nothing(model: ModelHandle, facts: Splits, calls: list[int]) -> None:
    """Nor does one that was made by replacing a part: the model may be another."""
    scene = Scene(model, facts, CHANGE)
    before, answers = scene.features(scene.prompts, SITES, POSITIONS), scene.answers
    with model.hooked([(model.blocks[0], lambda states: states + 1)]):
        for other in (Scene(model, facts, CHANGE), replace(scene, seed=1)):
            now = other.features(other.prompts, SITES, POSITIONS)
            assert not torch.equal(now, before)
            assert other.answers != answers
    assert calls == [8, 8, 8]


def test_prompts_feel_their_own_facts_change(model: ModelHandle, facts: Splits) -> None:
    prompts = Scene(model, facts, CHANGE).prompts
    assert [row.owner for row in prompts] == list(range(8))
    assert [row.ids for row in prompts] == [model.encode(f.prompt).ids for f in facts.target]


def test_prompts_that_end_with_their_subject_coincide(model: ModelHandle, facts: Splits) -> None:
    first, second, *rest = facts.target
    ending = replace(first, prompt=Prompt.fill("fit", "Here is {}", first.subject))
    scene = Scene(model, replace(facts, target=(ending, second, *rest)), CHANGE)
    assert scene.coinciding == {first.id}
    assert Scene(model, facts, CHANGE).coinciding == set()


@pytest.mark.parametrize("seed", [0, 5])
def test_facts_that_are_no_targets_take_turns_by_the_seed(
    model: ModelHandle, facts: Splits, seed: int
) -> None:
    for change in (CHANGE, replace(CHANGE, failed={facts.target[2].id: "no finite loss"})):
        found = Scene(model, facts, change, seed).dealt(facts.test)
        assert found == dealt(facts.test, facts, change, seed)
        owners = {owner for owner, _ in found}
        assert owners == set(range(8)) - ({2} if change.failed else set())


def test_rows_carry_scope_and_step(model: ModelHandle, facts: Splits) -> None:
    whole = Scene(model, facts, Change("relation", False, 1))
    for scene, step in ((whole, None), (after(whole, 3), 3)):
        row = scene.row("downstream")(metric="m", protocol="p", value=1.0)
        assert (row.axis, row.scope, row.step) == ("downstream", "relation", step)


def test_after_some_edits_there_are_so_many_targets(
    model: ModelHandle, facts: Splits, calls: list[int]
) -> None:
    """Facts, prompts, states and answers are those of the facts edited so far."""
    one = Difference(1, torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    whole = Scene(model, facts, CHANGE, 7, (one,))
    whole.features(whole.prompts, SITES, POSITIONS)
    scene = after(whole, 3)
    assert (scene.model, scene.change, scene.seed) == (model, CHANGE, 7)
    assert scene.facts == replace(facts, target=facts.target[:3])
    assert scene.differences == ()  # those of the whole sequence are not these
    assert scene.prompts == whole.prompts[:3]
    scene.features(scene.prompts, SITES, POSITIONS)
    assert calls == [8, 3]
    assert len(scene.answers) == 3

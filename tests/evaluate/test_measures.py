"""Measures know nothing of each other: each tells alone what it tells among all others."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from palimpsest.cli.configuration import resource
from palimpsest.errors import RequestError
from palimpsest.evaluate.attacks.relearning import Relearning
from palimpsest.evaluate.consistency import Consistency
from palimpsest.evaluate.downstream import Downstream
from palimpsest.evaluate.logit_lens import LogitLens
from palimpsest.evaluate.measure import Measure
from palimpsest.evaluate.ruler import TAKEN, Ruler
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.provenance import measure_key
from palimpsest.record.row import Row
from tests.evaluate.changed import CHANGES, deltas, every
from tests.model.tiny import make_handle

QUICK = ["downstream", "consistency", "logit_lens", "probes", "shadow_probes", "attacks"]
FULL = [
    *QUICK, "mlp_probes", "tuned_lens", "undertext", "relearning", "compression", "inversion",
]  # fmt: skip


@dataclass(frozen=True)
class Counting:
    """A measure of a user's own: how many target facts there are.

    Attributes:
        told: computed rows are noted here.
        name: of the metric.
    """

    told: list[str]
    name: str = "count"

    version: ClassVar[int] = 1
    along: ClassVar[bool] = True

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> int:
        """The seed."""
        return seed

    def measure(self, scene: Scene, prepared: int) -> Iterator[Row]:
        """One row."""
        self.told.append(self.name)
        row = scene.row("downstream")
        return iter(
            [row(metric=self.name, protocol=f"seed {prepared}", value=len(scene.facts.target))]
        )


# -- each by itself --------------------------------------------------------------------------------


def _laid(ruler: Ruler, name: str, facts: Splits) -> dict[str, list[Row]]:
    """The rows by measure, of a model of its own."""
    model, (change, applied) = make_handle(batch_size=32), CHANGES[name]
    left, right = deltas(model)
    written = (
        () if name in ("none", "erasure") else (Difference(1, left[:1, None], right[:1, None]),)
    )
    if name == "independent":
        written = (Difference(1, left[:, None], right[:, None], independent=True),)
    prepared = ruler.prepare(model, facts, 3)
    with applied(model):
        shadow = None if change.independent else partial(_felt_by_all, change)
        scene = Scene(model, facts, change, 3, written, shadow=shadow)
        return {name: list(rows) for name, rows in ruler.sections(scene, prepared)}


def _felt_by_all(change: Change, _: object) -> AbstractContextManager[Change]:
    """The probe subjects feel the change that is there already."""
    return nullcontext(change)


SILENT = {
    ("none", "inversion"), ("erasure", "inversion"), ("independent", "relearning"),
    ("independent", "shadow_probes"),
}  # fmt: skip
"""Measures that have no value after a change: no W_out was changed, no weight holds it all, or
there is no method to be asked for more edits."""


@pytest.mark.parametrize("name", ["none", "independent", "batch", "erasure"])
def test_every_measure_alone_gives_the_rows_that_it_gives_among_all_others(
    name: str, facts: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `palimpsest measure` rests on: keys and values, with nothing in the cache."""
    ruler, facts = every(tmp_path), replace(facts, target=facts.target[:6])
    among = _laid(ruler, name, facts)
    assert set(among) == set(FULL)
    for each in FULL:
        monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "alone" / each))
        [alone] = _laid(ruler.only([each]), name, facts).values()
        assert alone == among[each], each
        valued = any(row.value is not None for row in alone)
        assert valued is ((name, each) not in SILENT), each


def test_no_two_measures_tell_the_same_thing(facts: Splits, tmp_path: Path) -> None:
    facts = replace(facts, target=facts.target[:6])
    whole = [
        (r.metric, r.protocol, r.split, r.fact_id, r.prompt_id, r.layer, r.position, r.budget,
         r.step, r.relation)
        for rows in _laid(every(tmp_path), "batch", facts).values()
        for r in rows
    ]  # fmt: skip
    assert len(set(whole)) == len(whole)


def test_measures_along_a_sequence_are_the_same_alone(
    model: ModelHandle, facts: Splits, tmp_path: Path
) -> None:
    assert list(every(tmp_path).along.measures) == ["downstream"]
    told: list[str] = []
    both = Ruler({"downstream": every(tmp_path).measures["downstream"], "own": Counting(told)})
    assert list(both.along.measures) == ["downstream", "own"]
    scene = Scene(model, facts, Change("fact", False, 1), step=8)
    found = list(both.along.measure(scene, both.prepare(model, facts, 0)))
    assert found[-1] == scene.row("downstream")(metric="count", protocol="seed 0", value=8)
    only = both.only(["downstream"]).along
    assert list(only.measure(scene, only.prepare(model, facts, 0))) == found[:-1]


# -- the mapping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["b", "a", "c"], ["c", "b", "a"]])
def test_measures_are_taken_in_their_order_and_when_they_are_read(
    model: ModelHandle, facts: Splits, names: list[str]
) -> None:
    told: list[str] = []
    ruler = Ruler({name: Counting(told, name) for name in names})
    prepared = ruler.prepare(model, facts, 4)
    assert prepared == dict.fromkeys(names, 4)
    scene = Scene(model, facts, Change("fact", False, None))
    sections = list(ruler.sections(scene, prepared))
    assert [name for name, _ in sections] == names
    assert told == []
    assert [row.metric for row in sections[1][1]] == told == names[1:2]
    told.clear()
    assert [row.metric for row in ruler.measure(scene, prepared)] == told == names


def test_some_measures_keep_the_order_of_the_ruler(tmp_path: Path) -> None:
    ruler = every(tmp_path)
    some = ruler.only(["undertext", "downstream", "nothing"])
    assert list(some.measures) == ["downstream", "undertext"]
    assert some.measures["undertext"] is ruler.measures["undertext"]
    assert ruler.only([]).measures == {}


def test_every_measure_is_one(tmp_path: Path) -> None:
    for measure in every(tmp_path).measures.values():
        assert isinstance(measure, Measure)
        assert measure.version >= 1


class Bare:
    """All members, and no dataclass."""

    version, along = 1, False

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None: ...

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        yield from ()


class Half:
    """No version, and nothing that is prepared."""

    along = False

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        yield from ()


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (Half(), r"to be a measure, found Half without version, prepare; docs/extend\.md shows"),
        (
            {"stride": 2},
            r"to be a measure, found dict without version, along, prepare, measure; docs",
        ),
        (None, r"to be a measure, found null; leave it out with '~evaluate\.mine'$"),
        (Bare(), r"to be a dataclass, whose fields are its settings, found Bare; write @data"),
    ],
)
def test_what_is_no_measure_is_refused_in_one_line(measure: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"expected evaluate\.mine {message}") as refused:
        Ruler({"consistency": Consistency(), "mine": measure})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*TAKEN, "two words", "a/b", "", "1st"])
def test_a_name_that_is_taken_or_no_name_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"a name of a measure under evaluate, found '{name}'"):
        Ruler({name: Consistency()})


# -- keys ------------------------------------------------------------------------------------------


def _configured(option: str) -> Ruler:
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        config = compose("run", [f"evaluate={option}"])
    return Ruler(instantiate(config.evaluate, _convert_="all"))


def test_quick_is_a_part_of_full() -> None:
    """A quick run measured further with full becomes a full one; nothing is measured twice."""
    quick, full = (
        {name: measure_key(each) for name, each in _configured(option).measures.items()}
        for option in ("quick", "full")
    )
    assert list(quick) == QUICK
    assert list(full) == FULL
    differs = {name for name, key in quick.items() if full[name] != key}
    assert differs == {"shadow_probes"}  # fewer subjects: each costs an edit
    assert len(set(full.values())) == len(full)


def test_a_file_configures_what_the_class_does_by_itself() -> None:
    for name, each in _configured("full").measures.items():
        assert measure_key(each) == measure_key(type(each)()), name


def test_a_key_depends_on_settings_and_on_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure_key(LogitLens(stride=3))
    assert len(before) == 12
    assert int(before, 16) >= 0
    assert measure_key(LogitLens()) == before
    assert measure_key(LogitLens(stride=2)) != before
    assert measure_key(Relearning(steps=[0, 20])) != measure_key(Relearning(steps=[20, 0]))
    monkeypatch.setattr(LogitLens, "version", 2)
    assert measure_key(LogitLens(stride=3)) != before


def test_a_key_depends_on_what_a_text_holds_and_not_on_where_it_lies(tmp_path: Path) -> None:
    for name, text in (("a", "One text."), ("b", "One text."), ("c", "Another.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(text)
    one, same, other = (
        measure_key(Downstream(text=str(tmp_path / name / f"{name}.txt"))) for name in "abc"
    )
    assert one == same
    assert len({one, other, measure_key(Downstream())}) == 3


def test_measures_of_two_classes_have_two_keys() -> None:
    """Their settings may be the same."""

    @dataclass(frozen=True)
    class Another(Counting):
        pass

    assert measure_key(Counting([])) != measure_key(Another([]))


def test_a_measure_leaves_the_model_as_it_was(facts: Splits, tmp_path: Path) -> None:
    """One that did not would be seen by those after it."""
    for name, measure in every(tmp_path).measures.items():
        model = make_handle(batch_size=32)
        before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
        prepared = measure.prepare(model, facts, 0)
        list(measure.measure(Scene(model, facts, Change("relation", False, 1)), prepared))
        after = model.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), name
        assert model.changes == [], name


def test_a_class_of_the_users_own_is_never_ours() -> None:
    """Two classes of one name have two keys."""
    theirs = type("Consistency", (Consistency,), {"__module__": "mine"})
    assert measure_key(theirs()) != measure_key(Consistency())

from dataclasses import fields, replace
from math import isfinite
from pathlib import Path
from typing import get_args

import pytest
import torch

from palimpsest.evaluate.ruler import Ruler, portraits
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import FactSet, Prompt
from palimpsest.facts.splits import Splits, split
from palimpsest.model.difference import Difference
from palimpsest.model.forward import features, greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy, Position, Site
from palimpsest.record.row import UPSTREAM, Axis, Row, Scope
from tests.evaluate.changed import (
    CHANGES,
    deltas,
    erased,
    every,
    lay_on,
    one_for_all,
    per_fact,
)
from tests.evaluate.toy import CLASSES, make_fact, make_splits
from tests.model.tiny import make_handle

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"

COUNTS = ("lens_rank_old", "lens_rank_new", "perplexity")
"""Metrics that are at least 1."""

NO_SHARES = ("v_information", "probe_selectivity", "mdl_bits", "mdl_compression")
"""Others that are no shares."""


class Plan(DataSet):
    """A plan alone: the facts are made up here."""

    def load(self) -> FactSet:
        raise NotImplementedError


@pytest.fixture(scope="module")
def dealt() -> Splits:
    """Four classes of twelve subjects, dealt as in a run."""
    facts = FactSet("toy", "0" * 64, tuple(make_fact(n) for n in range(48)), make_splits().others)
    plan = Plan(limit=6, test=6, fit=4, dev=2, others=3, neighbors=2)
    plan.shares.update(target=0.2, test=0.15, fit=0.1, probe=0.5, dev=0.05)
    return split(facts, plan, 0, lambda some: [True] * len(some))


@pytest.fixture
def ruler(tmp_path: Path) -> Ruler:
    """All but the tuned lens, which no test here is about."""
    whole = every(tmp_path)
    return whole.only(set(whole.measures) - {"tuned_lens"})


Values = dict[tuple[object, ...], float | None]


def keyed(rows: list[Row]) -> Values:
    """Values by all columns but value, n and note."""
    names = [f.name for f in fields(Row) if f.name not in ("value", "n", "note")]
    found = {tuple(getattr(row, name) for name in names): row.value for row in rows}
    assert len(found) == len(rows)
    return found


# -- every row -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CHANGES)
def test_rows_are_valid_and_their_keys_unique(
    ruler: Ruler, dealt: Splits, kind: str, name: str
) -> None:
    model = make_handle(kind, batch_size=32)
    change, _ = CHANGES[name]
    rows = lay_on(ruler, model, dealt, name)
    keyed(rows)
    assert {row.axis for row in rows} == {"downstream", "recoverability", "consistency"}
    known = {fact.id: fact for fact in (*dealt.target, *dealt.test, *dealt.others)}
    for row in rows:
        assert row.axis in get_args(Axis)
        assert row.scope in get_args(Scope)
        assert row.scope == change.scope
        assert row.split in ("target", "test", "probe", "dev", "others", None)
        assert row.fact_id is None or row.relation == known[row.fact_id].relation
        if row.value is None:
            assert row.note, row
            assert row.n == 0, row
        elif row.metric in COUNTS:
            assert 1 <= row.value < float("inf"), row
        elif row.metric in NO_SHARES:
            assert isfinite(row.value), row
        else:
            assert 0 <= row.value <= 1, row
        assert row.value is None or row.n >= 1


@pytest.mark.parametrize("name", ["none", "independent", "batch"])
def test_every_protocol_is_defined_in_the_docs(
    ruler: Ruler, model: ModelHandle, dealt: Splits, name: str
) -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for metric, protocol in {(r.metric, r.protocol) for r in lay_on(ruler, model, dealt, name)}:
        assert any(f"`{metric}`" in line for line in lines), metric
        # Two-hop metrics have a line of their own for the second protocol.
        assert any(
            f"`{protocol}`" in line
            and (f"`{metric}`" in line or (metric.startswith("twohop") and "the same" in line))
            for line in lines
        ), (metric, protocol)


@pytest.mark.parametrize("part", ["residual", "attention_norm", "mlp_norm"])
@pytest.mark.parametrize("policy", get_args(Policy))
def test_values_are_called_unchanged_where_states_are(
    ruler: Ruler, model: ModelHandle, dealt: Splits, policy: Policy, part: Part
) -> None:
    """Some prompts go on after their subject, some end with it."""
    ending = {fact.id: Prompt.fill("fit", "Here is {}", fact.subject) for fact in dealt.target[::2]}
    target = [replace(fact, prompt=ending.get(fact.id, fact.prompt)) for fact in dealt.target]
    facts = replace(dealt, target=tuple(target))
    encoded = [model.encode(fact.prompt) for fact in target]
    sites = [Site(layer) for layer in range(model.n_layers)]
    positions = get_args(Position)
    before = features(model, encoded, sites, positions)
    change = Change("relation", False, 1, part, policy)
    prepared = ruler.prepare(model, facts, 0)
    with erased(policy, part)(model):
        after = features(model, encoded, sites, positions)
        rows = list(ruler.measure(Scene(model, facts, change), prepared))
    place = {fact.id: n for n, fact in enumerate(target)}
    read = [r for r in rows if r.layer is not None and r.layer >= 0 and r.fact_id in place]
    states = (before, after)
    found = {True: 0, False: 0}
    for row in read:
        if row.value is None:
            continue
        at = (row.layer, positions.index(row.position), place[row.fact_id])
        moved = not torch.equal(*(state[at] for state in states))
        # What acts on the subject reaches the tokens after it through the next block's attention.
        spared = policy == "last_subject" and row.layer == 1 and row.position == "last_prompt"
        assert spared or moved is (UPSTREAM not in (row.note or "")), row
        found[moved] += 1
    assert min(found.values()) > 0


def test_measuring_twice_gives_the_same_rows(
    ruler: Ruler, model: ModelHandle, dealt: Splits
) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    assert lay_on(ruler, model, dealt, "batch") == lay_on(ruler, model, dealt, "batch")
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_methods_are_measured_on_the_same_things(
    ruler: Ruler, model: ModelHandle, dealt: Splits
) -> None:
    """Keys differ between changes only where the definition says so."""
    seen = {}
    for name in ("none", "batch", "erasure", "independent"):
        seen[name] = {key[1:] for key in keyed(lay_on(ruler, model, dealt, name))}  # not the scope
    assert seen["none"] == seen["batch"] == seen["erasure"]
    different = seen["none"] ^ seen["independent"]
    assert {key[2] for key in different} == {"retrained", "retrained_mlp"}


# -- what the changes must show --------------------------------------------------------------------


def test_without_a_change_frozen_is_retrained_and_all_is_upstream(
    ruler: Ruler, model: ModelHandle, dealt: Splits
) -> None:
    rows = [r for r in lay_on(ruler, model, dealt, "none") if r.metric == "probe_accuracy"]
    frozen, retrained = (
        {(r.fact_id, r.layer, r.position): r.value for r in rows if r.protocol == protocol}
        for protocol in ("frozen", "retrained")
    )
    assert frozen == retrained
    assert len(frozen) == 3 * 2 * len((*dealt.target, *dealt.test))
    assert {row.note for row in rows if row.value is not None} == {UPSTREAM}


def test_states_upstream_are_as_they_were(ruler: Ruler, model: ModelHandle, dealt: Splits) -> None:
    plain = lay_on(ruler, model, dealt, "none")

    def key(r: Row) -> tuple[object, ...]:
        return r.metric, r.protocol, r.fact_id, r.layer, r.position, r.budget

    wanted = {key(r): r.value for r in plain}
    for name in ("batch", "erasure", "oracle", "independent"):
        rows = lay_on(ruler, model, dealt, name)
        upstream = [r for r in rows if UPSTREAM in (r.note or "")]
        assert {row.layer for row in upstream} >= {0}
        for r in upstream:
            assert r.value == wanted[key(r)]


def test_each_change_changes_the_answers(ruler: Ruler, model: ModelHandle, dealt: Splits) -> None:
    plain = lay_on(ruler, model, dealt, "none")
    perplexity = {r.value for r in plain if r.metric == "perplexity"}
    for name in ("independent", "batch", "erasure", "oracle"):
        found = {r.value for r in lay_on(ruler, model, dealt, name) if r.metric == "perplexity"}
        assert len(found) == 1
        assert found != perplexity, name
        perplexity |= found


def test_a_facts_rows_are_those_of_really_changing_the_weight(
    ruler: Ruler, model: ModelHandle, dealt: Splits
) -> None:
    """Independent changes in one pass against one changed model a fact."""
    change, _ = CHANGES["independent"]
    prepared = ruler.prepare(model, dealt, 0)
    together = lay_on(ruler, model, dealt, "independent")
    for n in (0, 3):
        with one_for_all(n)(model):
            alone = list(ruler.measure(Scene(model, dealt, change), prepared))
        mine = [
            {
                (r.metric, r.protocol, r.prompt_id, r.layer, r.position, r.budget): r.value
                for r in rows
                if r.fact_id == dealt.target[n].id
            }
            for rows in (together, alone)
        ]
        degrees = ("old_probability", "new_probability", "v_information")
        drawn = ("rephrasing", "in_context")
        chances = [key for key in mine[0] if key[0] in degrees or key[1] in drawn]
        for key in chances:
            assert mine[0].pop(key) == pytest.approx(mine[1].pop(key), rel=1e-4, abs=1e-6)
        assert chances
        assert mine[0] == mine[1]
        assert len(mine[0]) > 40


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_know_where_the_prompt_ends_are_marked(
    ruler: Ruler, model: ModelHandle, dealt: Splits, name: str
) -> None:
    rows = lay_on(ruler, model, dealt, name)
    marked = ["oracle_gate" in (row.note or "") for row in rows]
    assert all(marked) if name == "oracle" else not any(marked)
    if name == "oracle":
        told = [row for row in rows if row.axis == "recoverability" and row.value is not None]
        notes = {row.note for row in told if row.metric != "probe_strength"}
        assert notes == {"oracle_gate", f"{UPSTREAM}; oracle_gate"}


# -- attacks on weights ----------------------------------------------------------------------------


def test_what_a_change_left_in_weights_reaches_the_attacks_on_them(
    ruler: Ruler, model: ModelHandle, dealt: Splits
) -> None:
    """Every part is a section; sections do not depend on which were measured before."""
    change, applied = CHANGES["batch"]
    left, right = deltas(model)
    written = (Difference(1, left[:1, None], right[:1, None]),)
    prepared = ruler.prepare(model, dealt, 0)
    with applied(model):
        told = dict(ruler.sections(Scene(model, dealt, change, 0, written), prepared))
        names = list(told)
        backwards = {name: list(told[name]) for name in reversed(names)}
        whole = list(ruler.measure(Scene(model, dealt, change, 0, written), prepared))
    assert names[-3:] == ["relearning", "compression", "inversion"]
    assert [row for name in names for row in backwards[name]] == whole
    for name in names[-3:]:
        assert any(row.value is not None for row in backwards[name]), name
        assert {row.axis for row in backwards[name]} == {"recoverability"}


# -- portraits -------------------------------------------------------------------------------------


def test_portraits_say_what_the_model_says_under_each_facts_change(
    model: ModelHandle, dealt: Splits
) -> None:
    with per_fact(model):
        together = portraits(model, dealt, tokens=3)
    assert [one["fact_id"] for one in together] == [fact.id for fact in dealt.target]
    for n, fact in enumerate(dealt.target):
        one = together[n]
        assert (one["prompt"], one["true"], one["new"]) == (fact.prompt.text, fact.true, fact.new)
        assert one["true"] in CLASSES
        with one_for_all(n)(model):
            row = model.encode(fact.prompt)
            likely = model.model(torch.tensor([row.ids])).logits[0, -1].softmax(-1).topk(5)
            assert one["answer"] == model.decode(greedy(model, [row], 3)[0])
        assert [name for name, _ in one["top"]] == [model.decode([int(i)]) for i in likely.indices]
        assert [p for _, p in one["top"]] == pytest.approx(likely.values.tolist(), rel=1e-4)

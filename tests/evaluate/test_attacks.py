"""Attacks: every one finds what was planted, and nothing where nothing is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import Query
from palimpsest.evaluate.attacks import candidates as module
from palimpsest.evaluate.attacks.candidates import NO_NAMES, NO_THIRD, SAME_TOKEN, Attacks
from palimpsest.evaluate.downstream import Answers, ask_targets
from palimpsest.evaluate.tuned_lens import Translator
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import Score, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row
from tests.evaluate.toy import CLASSES, RELATION, make_splits

TOKENS = 400
"""Of a vocabulary of one's own; the model's is smaller."""

NONE = Change("fact", False, None)
INDEPENDENT = Change("fact", True, 2)


@pytest.fixture
def facts() -> Splits:
    """Three dev facts of the relation and more, for few-shot prompts."""
    return make_splits(dev=2)


def measure(
    model: ModelHandle,
    facts: Splits,
    answers: Answers | None = None,
    change: Change = NONE,
    lenses: dict[int, Translator] | None = None,
) -> list[Row]:
    found = answers if answers is not None else ask_targets(model, facts)
    return list(Attacks(stride=1).measure(model, facts, change, found, lenses or {}))


def of(rows: Sequence[Row], metric: str, protocol: str, **equal: object) -> list[Row]:
    return [
        row
        for row in rows
        if (row.metric, row.protocol) == (metric, protocol)
        and all(getattr(row, name) == value for name, value in equal.items())
    ]


def first(model: ModelHandle, fact: Fact, name: str) -> int:
    row = model.encode(fact.prompt, name)
    return row.ids[row.prompt]


# -- states ----------------------------------------------------------------------------------------


@pytest.fixture
def planted(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[int, Fact], dict[str, float]]], list[Row]]:
    """Measures with logits of one's own: by layer and fact, scores of objects over noise."""

    def to(scores: Callable[[int, Fact], dict[str, float]]) -> list[Row]:
        layers = model.n_layers

        def features(*_: object) -> Tensor:
            numbers = torch.arange(layers * len(facts.target), dtype=torch.float32)
            return numbers.view(layers, 1, len(facts.target), 1)

        def read(_: ModelHandle, states: Tensor) -> Tensor:
            out = []
            for number in states[:, 0].int().tolist():
                layer, fact = divmod(number, len(facts.target))
                row = torch.randn(TOKENS, generator=torch.Generator().manual_seed(number))
                for name, value in scores(layer, facts.target[fact]).items():
                    row[first(model, facts.target[fact], name)] = value
                out.append(row)
            return torch.stack(out)

        monkeypatch.setattr(module, "features", features)
        monkeypatch.setattr(module, "logit_lens", read)
        return measure(model, facts)

    return to


def test_the_lens_finds_a_secret_at_the_layer_where_it_is_planted(planted) -> None:
    rows = planted(lambda layer, fact: {fact.true: 9.0 if layer == 1 else -9.0})
    for budget in (1, 5, 20):
        for layer, hit in ((0, 0.0), (1, 1.0), (2, 0.0)):
            found = of(rows, "attack_success", "logit_lens", layer=layer, budget=budget)
            assert {row.value for row in found} == {hit}
            assert len(found) == 8


def test_a_budget_is_a_rank(planted, model: ModelHandle, facts: Splits) -> None:
    """Six tokens are made likelier than the secret: seven candidates hold it, five do not."""

    def scores(layer: int, fact: Fact) -> dict[str, float]:
        return {fact.true: 20.0}

    real = module.Attacks(budgets=[1, 6, 7], stride=1)
    rows = planted(scores)
    assert {row.value for row in of(rows, "attack_success", "logit_lens", budget=1)} == {1.0}
    plain = module.logit_lens

    def above(handle: ModelHandle, states: Tensor) -> Tensor:
        out = plain(handle, states)
        free = [token for token in range(TOKENS) if not (out[:, token] == 20.0).any()][:6]
        out[:, free] = 30.0
        return out

    module.logit_lens, kept = above, module.logit_lens
    try:
        rows = list(real.measure(model, facts, NONE, ask_targets(model, facts), {}))
    finally:
        module.logit_lens = kept
    for budget, hit in ((1, 0.0), (6, 0.0), (7, 1.0)):
        found = of(rows, "attack_success", "logit_lens", budget=budget)
        assert {row.value for row in found} == {hit}


def test_what_a_block_adds_or_takes_is_found_at_both_ends(planted) -> None:
    rows = planted(lambda layer, fact: {fact.true: 9.0 if layer == 1 else -9.0})
    for layer, budget, hit in ((1, 1, 1.0), (2, 1, 0.0), (2, 5, 1.0), (3, 20, 0.0)):
        found = of(rows, "attack_success", "probability_delta", layer=layer, budget=budget)
        if layer < 3 or hit:
            assert {row.value for row in found} == {hit}, (layer, budget)
    assert not of(rows, "attack_success", "probability_delta", layer=0)


def test_an_object_that_is_always_likely_is_in_the_baseline(planted) -> None:
    rows = planted(lambda layer, fact: dict.fromkeys(CLASSES, 9.0))
    found = of(rows, "attack_success", "logit_lens", budget=5)
    chance = of(rows, "attack_baseline", "logit_lens", budget=5)
    assert {row.value for row in found} == {row.value for row in chance} == {1.0}


def test_on_noise_success_is_the_budgets_share(planted) -> None:
    """The false-positive rate: B of the vocabulary's tokens, as of unrelated objects."""
    rows = planted(lambda layer, fact: {})
    for protocol in ("logit_lens", "probability_delta"):
        hits = [row.value for row in of(rows, "attack_success", protocol, budget=20)]
        chance = [row.value for row in of(rows, "attack_baseline", protocol, budget=20)]
        assert sum(hits) / len(hits) == pytest.approx(20 / TOKENS, abs=0.1)
        assert sum(chance) / len(chance) == pytest.approx(20 / TOKENS, abs=0.1)


def test_the_lens_reads_the_models_own_head(model: ModelHandle, facts: Splits) -> None:
    rows = measure(model, facts)
    fact = facts.target[0]
    with torch.no_grad():
        ids = torch.tensor([model.encode(fact.prompt).ids])
        states = model.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
        scores = logits(model, model.final_norm(states))
    rank = int((scores > scores[first(model, fact, fact.true)]).sum()) + 1
    for budget in (1, 5, 20):
        place = {"fact_id": fact.id, "layer": 1, "budget": budget}
        [row] = of(rows, "attack_success", "logit_lens", **place)
        assert row.value == float(rank <= budget)


def test_what_lies_before_the_change_is_marked(model: ModelHandle, facts: Splits) -> None:
    rows = measure(model, facts, change=INDEPENDENT)
    for row in of(rows, "attack_success", "logit_lens"):
        assert row.upstream is (row.layer < 2)


def test_shared_first_tokens_say_nothing(model: ModelHandle, facts: Splits) -> None:
    same = replace(facts, target=tuple(replace(f, new=f.true) for f in facts.target))
    rows = of(measure(model, same), "attack_success", "logit_lens")
    assert {(row.value, row.note) for row in rows} == {(None, SAME_TOKEN)}


def test_a_translator_finds_what_the_logit_lens_does_not(model: ModelHandle) -> None:
    """States are turned over: the secret is in them, and only the translator turns them back."""
    facts = make_splits(("France", "Italy", "Japan"), dev=2)
    wanted = [first(model, fact, fact.true) for fact in facts.target]
    head = model.model.get_output_embeddings().weight.detach() * model.final_norm[0].weight
    head = head - head.mean(0)
    apart = head @ torch.linalg.inv(head.T @ head)  # directions in which few tokens are alike
    turned = -torch.eye(model.width)
    upside_down = {1: Translator(turned, torch.zeros(model.width), 0.0, 0.0)}

    def secret(states: Tensor) -> Tensor | None:
        assert model.running is not None
        owner = model.running.owner.tolist()
        loud = torch.stack([-apart[wanted[o]] / apart[wanted[o]].norm() for o in owner])
        return (50 * loud).unsqueeze(1).expand_as(states)

    with model.hooked([(model.blocks[1], secret)]):
        rows = measure(model, facts, lenses=upside_down)
    for protocol, least, most in (("tuned_lens", 0.8, 1.0), ("logit_lens", 0.0, 0.2)):
        found = [r.value for r in of(rows, "attack_success", protocol, layer=1, budget=20)]
        values = [value for value in found if value is not None]
        assert values
        assert least <= sum(values) / len(values) <= most
    assert {row.layer for row in of(rows, "attack_success", "tuned_lens")} == {1}


def test_the_identity_is_the_logit_lens(model: ModelHandle, facts: Splits) -> None:
    same = Translator(torch.eye(model.width), torch.zeros(model.width), 0.0, 0.0)
    rows = measure(model, facts, lenses={0: same, 2: same})
    for metric in ("attack_success", "attack_baseline"):
        for layer in (0, 2):
            tuned, plain = (
                [
                    (r.fact_id, r.budget, r.value, r.note)
                    for r in of(rows, metric, name, layer=layer)
                ]
                for name in ("tuned_lens", "logit_lens")
            )
            assert tuned == plain != []


# -- prompts ---------------------------------------------------------------------------------------


def answers(facts: Splits, chances: dict[str, float]) -> Answers:
    """The same probabilities after every paraphrase."""
    said = {name: Score(log(p), 1, False) for name, p in chances.items()}
    return [{p.id: said for p in (f.prompt, *f.paraphrases)} for f in facts.target]


def test_sampling_is_the_chance_that_some_draw_holds_the_object(
    model: ModelHandle, facts: Splits
) -> None:
    given = answers(facts, dict(zip(CLASSES, (0.1, 0.2, 0.05, 0.02), strict=True)))
    rows = measure(model, facts, given)
    for fact in facts.target:
        p = dict(zip(CLASSES, (0.1, 0.2, 0.05, 0.02), strict=True))
        for budget in (1, 5, 20):
            [hit] = of(rows, "attack_success", "rephrasing", fact_id=fact.id, budget=budget)
            assert hit.value == pytest.approx(1 - (1 - p[fact.true]) ** budget)
            rest = [p[name] for name in CLASSES if name not in (fact.true, fact.new)]
            [chance] = of(rows, "attack_baseline", "rephrasing", fact_id=fact.id, budget=budget)
            wanted = sum(1 - (1 - each) ** budget for each in rest) / len(rest)
            assert chance.value == pytest.approx(wanted)


def test_simulated_draws_hit_as_often(model: ModelHandle, facts: Splits) -> None:
    given = answers(facts, dict(zip(CLASSES, (0.1, 0.2, 0.05, 0.02), strict=True)))
    fact = facts.target[0]
    [row] = of(
        measure(model, facts, given), "attack_success", "rephrasing", fact_id=fact.id, budget=5
    )
    draws = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    p = dict(zip(CLASSES, (0.1, 0.2, 0.05, 0.02), strict=True))[fact.true]
    assert row.value == pytest.approx(float((draws < p).any(1).double().mean()), abs=0.01)


def test_few_shots_are_dev_facts_before_the_prompt(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = module.ask
    monkeypatch.setattr(
        module, "ask", lambda m, queries: (asked.extend(queries), real(m, queries))[1]
    )
    rows = of(measure(model, facts), "attack_success", "few_shot")
    assert all(row.value is not None for row in rows)
    del asked[len(facts.target) :]  # those of the next attack
    for owner, (fact, query) in enumerate(zip(facts.target, asked, strict=True)):
        assert query.owner == owner
        *shots, last = query.prompt.text.split("\n")
        assert last == fact.prompt.text
        assert query.prompt.text[slice(*query.prompt.span)] == fact.subject
        shown = {f"{f.prompt.text} {f.true}." for f in facts.dev if f.true != fact.new}
        assert len(shots) == 3
        assert set(shots) <= shown


def test_in_context_the_objects_are_named_before_the_prompt(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the new one, in an order that tells nothing of the old one."""
    asked, real, firsts = [], module.ask, set()
    monkeypatch.setattr(
        module, "ask", lambda m, queries: (asked.extend(queries), real(m, queries))[1]
    )
    rows = measure(model, facts)
    for fact, query in zip(facts.target, asked[len(facts.target) :], strict=True):
        named, last = query.prompt.text.split("\n")
        assert last == fact.prompt.text
        assert query.prompt.text[slice(*query.prompt.span)] == fact.subject
        names = named.removesuffix(".").split(", ")
        assert sorted(names) == sorted(set(CLASSES) - {fact.new})
        firsts.add(names.index(fact.true))
        assert set(query.completions) == set(CLASSES)
        [row] = of(rows, "attack_success", "in_context", fact_id=fact.id, budget=1)
        [answer] = real(model, [query])
        assert row.value == pytest.approx(exp(answer[fact.true].logprob), rel=1e-4)
    assert len(firsts) > 1


@pytest.mark.parametrize(("kept", "other"), [(0.9, 0.01), (0.05, 0.05)])
def test_an_object_that_its_name_brings_back_is_found_in_context_alone(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch, kept: float, other: float
) -> None:
    """Old objects are as likely as others, but where the objects' names stand before the prompt."""

    def said(_: ModelHandle, queries: Sequence[Query]) -> list[dict[str, Score]]:
        return [
            {
                name: Score(log(kept if recalled(query, name) else other), 1, False)
                for name in query.completions
            }
            for query in queries
        ]

    def recalled(query: Query, name: str) -> bool:
        return name == facts.target[query.owner].true and ", " in query.prompt.text.split("\n")[0]

    given = answers(facts, dict.fromkeys(CLASSES, other))
    monkeypatch.setattr(module, "ask", said)
    rows = measure(model, facts, given)
    for protocol in ("in_context", "few_shot", "rephrasing"):
        hit = kept if protocol == "in_context" else other
        found = of(rows, "attack_success", protocol, budget=1)
        assert [row.value for row in found] == pytest.approx([hit] * len(facts.target))
        chance = of(rows, "attack_baseline", protocol, budget=1)
        assert [row.value for row in chance] == pytest.approx([other] * len(facts.target))


def test_one_object_beside_the_new_one_is_no_context(model: ModelHandle) -> None:
    pair = CLASSES[:2]
    rows = measure(model, replace(make_splits(pair, dev=4), classes={RELATION: pair}))
    found = of(rows, "attack_success", "in_context")
    assert {(row.value, row.note) for row in found} == {(None, NO_NAMES)}


def test_too_few_shots_are_told(model: ModelHandle, facts: Splits) -> None:
    rows = of(measure(model, replace(facts, dev=facts.dev[:2])), "attack_success", "few_shot")
    assert {row.note for row in rows} == {"fewer than 3 dev facts of the relation"}


def test_two_objects_have_no_baseline(model: ModelHandle) -> None:
    pair = CLASSES[:2]
    facts = replace(make_splits(pair, dev=4), classes={RELATION: pair})
    rows = measure(model, facts)
    for protocol in ("logit_lens", "rephrasing"):
        chance = of(rows, "attack_baseline", protocol)
        assert {(row.value, row.note) for row in chance} == {(None, NO_THIRD)}
        assert all(row.value is not None for row in of(rows, "attack_success", protocol))


# -- settings --------------------------------------------------------------------------------------


def test_no_budget_no_attack(model: ModelHandle, facts: Splits) -> None:
    none = Attacks(budgets=[])
    assert list(none.measure(model, facts, NONE, ask_targets(model, facts), {})) == []


@pytest.mark.parametrize(
    ("mistake", "name"),
    [({"budgets": [0]}, "budgets"), ({"stride": 0}, "stride"), ({"shots": 0}, "shots")],
)
def test_numbers_that_are_too_small_are_refused(mistake: dict, name: str) -> None:
    with pytest.raises(RequestError, match=f"evaluate.attacks.{name}.*at least 1"):
        Attacks(**mistake)

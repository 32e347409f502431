import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate import asking
from palimpsest.evaluate import downstream as module
from palimpsest.evaluate.asking import Answer, rotation
from palimpsest.evaluate.downstream import Downstream
from palimpsest.evaluate.scene import Answers, Scene, ask_targets
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import Score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row
from tests.evaluate.toy import CLASSES, RELATION, by_key, make_fact
from tests.model.tiny import make_handle

CHANGE = Change("fact", True, 1)

Told = Mapping[tuple[str, str], Score]
"""What a transparent model says: by (prompt text, completion)."""


class Transparent:
    """Stands for `score`: says what it is told, and keeps the rows that it was asked."""

    def __init__(self, told: Told, default: Score) -> None:
        self.told, self.default = told, default
        self.asked: list[tuple[str, str, int]] = []

    def __call__(self, model: ModelHandle, rows: Sequence[Tokens]) -> list[Score]:
        scores = []
        for row in rows:
            prompt = model.decode(row.ids[: row.prompt]).removeprefix(model.prefix)
            completion = model.decode(row.ids[row.prompt :]).removeprefix(" ")
            self.asked.append((prompt, completion, row.owner))
            scores.append(self.told.get((prompt, completion), self.default))
        return scores


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short held-out text."""
    path = tmp_path / "text.txt"
    path.write_text("The city of Paris is in the country of France, said Anna. " * 9, "utf-8")
    return path


def says(**scores: tuple[float, int] | tuple[float, int, bool]) -> Answer:
    """An answer: by object (underscores for spaces), total log-probability, tokens, argmax."""
    return {o.replace("_", " "): Score(*s, *[False] * (3 - len(s))) for o, s in scores.items()}


SMALL = Splits(
    target=(
        replace(make_fact(0), new="Italy", paraphrases=make_fact(0).paraphrases[:1]),
        replace(
            make_fact(1),
            new="Japan",
            neighbors=tuple(
                replace(make_fact(n).prompt, id=f"neighbor/{i}") for i, n in enumerate((5, 9))
            ),
        ),
    ),
    test=(),
    fit=(),
    probe=(),
    dev=(),
    classes={RELATION: CLASSES},
)
"""Two facts, France to Italy with one paraphrase, Italy to Japan with three and two neighbors."""

ANSWERS: Answers = [
    {
        # New is likelier as a string, old likelier per token; a third object is the best of all.
        "fit": says(France=(-4.0, 2, False), Italy=(-3.0, 1, False), Japan=(-2.5, 1, True),
                    New_Zealand=(-9.0, 3)),
        "paraphrase/0": says(France=(-6.0, 2, False), Italy=(-1.0, 1, True), Japan=(-2.5, 1),
                             New_Zealand=(-9.0, 3)),
    },
    {
        "fit": says(Italy=(-1.0, 1, True), Japan=(-0.5, 1, True), France=(-8.0, 1),
                    New_Zealand=(-9.0, 3)),
        "paraphrase/0": says(Italy=(-1.0, 1, True), Japan=(-2.0, 1), France=(-8.0, 1),
                             New_Zealand=(-9.0, 3)),
        "paraphrase/1": says(Italy=(-1.0, 1, False), Japan=(-2.0, 1), France=(-8.0, 1),
                             New_Zealand=(-0.5, 1)),
        "paraphrase/2": says(Italy=(-3.0, 1), Japan=(-2.0, 1), France=(-8.0, 1),
                             New_Zealand=(-9.0, 3)),
        "neighbor/0": says(Italy=(-1.0, 1, True), Japan=(-2.0, 1, False)),
        "neighbor/1": says(Italy=(-2.0, 1, False), Japan=(-2.0, 1, False)),
    },
]  # fmt: skip


def measure(
    model: ModelHandle, text: Path, facts: Splits, answers: Answers, seed: int = 0, **more: Any
) -> list[Row]:
    scene = Scene(model, facts, more.get("change", CHANGE), seed)
    scene.__dict__["answers"] = answers
    return list(Downstream(text=str(text), row_tokens=32).measure(scene, None))


def values(rows: Sequence[Row], metric: str, protocol: str) -> dict[tuple[int, str], float]:
    """By number of the fact and prompt."""
    return {
        (int((row.fact_id or "").removeprefix("fact/")), row.prompt_id or ""): row.value or 0.0
        for row in rows
        if (row.metric, row.protocol) == (metric, protocol)
    }


# -- a fact's own prompts --------------------------------------------------------------------------


def test_efficacy_is_new_over_old_per_token_on_the_fit_prompt(
    model: ModelHandle, text: Path
) -> None:
    rows = measure(model, text, SMALL, ANSWERS)
    assert values(rows, "efficacy", "probability") == {(0, "fit"): 0.0, (1, "fit"): 1.0}
    assert values(rows, "efficacy", "argmax") == {(0, "fit"): 0.0, (1, "fit"): 1.0}


def test_paraphrase_is_the_same_on_each_paraphrase(model: ModelHandle, text: Path) -> None:
    rows = measure(model, text, SMALL, ANSWERS)
    wanted = {(0, 0): 1.0, (1, 0): 0.0, (1, 1): 0.0, (1, 2): 1.0}
    wanted = {(fact, f"paraphrase/{i}"): value for (fact, i), value in wanted.items()}
    assert values(rows, "paraphrase", "probability") == wanted
    argmax = values(rows, "paraphrase", "argmax")
    assert argmax == {key: float(key == (0, "paraphrase/0")) for key in wanted}


def test_suppression_is_old_no_longer_on_top(model: ModelHandle, text: Path) -> None:
    rows = measure(model, text, SMALL, ANSWERS)
    candidates = {(0, "fit"): 1, (0, "p0"): 1, (1, "fit"): 1, (1, "p0"): 0, (1, "p1"): 1}
    candidates |= {(1, "p2"): 1}
    vocabulary = {(0, "fit"): 1, (0, "p0"): 1, (1, "fit"): 0, (1, "p0"): 0, (1, "p1"): 1}
    vocabulary |= {(1, "p2"): 1}
    for protocol, wanted in (("candidates", candidates), ("vocabulary", vocabulary)):
        found = values(rows, "suppression", protocol)
        assert found == {(n, p.replace("p", "paraphrase/")): v for (n, p), v in wanted.items()}


def test_neighborhood_is_old_strictly_over_new_per_token(model: ModelHandle, text: Path) -> None:
    rows = measure(model, text, SMALL, ANSWERS)
    wanted = {(1, "neighbor/0"): 1.0, (1, "neighbor/1"): 0.0}
    assert values(rows, "neighborhood", "probability") == wanted
    assert values(rows, "neighborhood", "argmax") == wanted


# -- the harmonic mean -----------------------------------------------------------------------------


def score_row(rows: Sequence[Row]) -> Row:
    return by_key(rows)["score", "harmonic_mean", None, None]


def test_the_score_is_the_harmonic_mean_of_three_means_over_facts(
    model: ModelHandle, text: Path
) -> None:
    row = score_row(measure(model, text, SMALL, ANSWERS))
    efficacy, paraphrase, neighborhood = 1 / 2, (1 + 1 / 3) / 2, 1 / 2
    assert row.value == pytest.approx(3 / (1 / efficacy + 1 / paraphrase + 1 / neighborhood))
    assert (row.n, row.split, row.note) == (2, "target", None)


def test_the_score_is_zero_if_one_mean_is(model: ModelHandle, text: Path) -> None:
    worse = ANSWERS[1] | {"fit": says(Italy=(-1.0, 1), Japan=(-3.0, 1))}
    row = score_row(measure(model, text, SMALL, [ANSWERS[0], worse]))
    assert row.value == 0.0


@pytest.mark.parametrize("missing", ["paraphrases", "neighbors"])
def test_the_score_is_null_with_the_cause_where_prompts_are_missing(
    model: ModelHandle, text: Path, missing: str
) -> None:
    bare = replace(SMALL, target=tuple(replace(f, **{missing: ()}) for f in SMALL.target))
    row = score_row(measure(model, text, bare, ANSWERS))
    metric = {"paraphrases": "paraphrase", "neighbors": "neighborhood"}[missing]
    assert (row.value, row.n, row.note) == (None, 0, f"no {metric} prompts")


# -- what is asked, and whose change it feels ------------------------------------------------------


def test_each_prompt_of_a_fact_is_asked_with_its_candidates_and_its_owner(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Transparent({}, Score(-1.0, 1, False))
    monkeypatch.setattr(asking, "score", told)
    answers = ask_targets(model, facts)
    for owner, fact in enumerate(facts.target):
        own = {f.text for f in (fact.prompt, *fact.paraphrases)}
        mine = [(text, o) for text, o, who in told.asked if who == owner and text in own]
        assert sorted(mine) == sorted((text, o) for text in own for o in CLASSES)
        near = [(text, o) for text, o, who in told.asked if who == owner and text not in own]
        assert near == [(p.text, o) for p in fact.neighbors for o in (fact.true, fact.new)]
        prompts = (fact.prompt, *fact.paraphrases, *fact.neighbors)
        assert list(answers[owner]) == [prompt.id for prompt in prompts]
        assert len(fact.neighbors) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_facts_change_is_felt_by_its_own_prompts_alone(kind: str, facts: Splits) -> None:
    model = make_handle(kind, batch_size=16)
    delta = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 20

    def only_fact_2(states: Tensor) -> Tensor:
        assert model.running is not None
        return states + (model.running.owner == 2).float()[:, None, None] * delta

    before = ask_targets(model, facts)
    with model.hooked([(model.blocks[1], only_fact_2)]):
        after = ask_targets(model, facts)
    for owner in range(len(facts.target)):
        for name, answer in before[owner].items():
            moved = [abs(after[owner][name][o].logprob - s.logprob) for o, s in answer.items()]
            assert min(moved) > 1e-3 if owner == 2 else max(moved) < 1e-4


# -- everything else -------------------------------------------------------------------------------


def test_accuracy_elsewhere_by_hand(
    model: ModelHandle, facts: Splits, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {}
    for n, fact in enumerate(facts.test):
        told[fact.prompt.text, fact.true] = Score((-1.0, -5.0)[n % 2], 1, n % 4 == 0)
    for n, fact in enumerate(facts.others):
        told[fact.prompt.text, fact.true] = Score(-1.0, 1, n == 1)
    monkeypatch.setattr(asking, "score", Transparent(told, Score(-3.0, 1, False)))
    rows = measure(model, text, replace(facts, target=()), [])
    found = by_key(rows)
    for n, fact in enumerate(facts.test):
        for protocol, hit in (("candidates", n % 2 == 0), ("vocabulary", n % 4 == 0)):
            row = found["relation_accuracy", protocol, fact.id, "fit"]
            assert (row.value, row.split, row.relation) == (float(hit), "test", RELATION)
    for n, fact in enumerate(facts.others):
        row = found["other_accuracy", "vocabulary", fact.id, "fit"]
        assert (row.value, row.split, row.relation) == (float(n == 1), "others", "capital")


def test_prompts_of_no_fact_take_turns_over_the_facts_changes(
    model: ModelHandle, facts: Splits, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts feel the same facts' changes, whatever the change."""
    turns = []
    for change in (CHANGE, Change("relation", False, 2)):
        told, texts = Transparent({}, Score(-1.0, 1, False)), Transparent({}, Score(-1.0, 1, False))
        answers = ask_targets(model, facts)
        monkeypatch.setattr(asking, "score", told)
        monkeypatch.setattr(module, "score", texts)
        measure(model, text, facts, answers, seed=5, change=change)
        monkeypatch.undo()
        turns.append((told.asked, texts.asked))
    assert turns[0] == turns[1]
    asked, rows = turns[0]
    owner_of = {text: owner for text, _, owner in asked}
    assert [owner_of[f.prompt.text] for f in facts.test] == rotation(8, 8, 5)
    assert [owner_of[f.prompt.text] for f in facts.others] == rotation(3, 8, 5)
    assert [owner for *_, owner in rows] == rotation(len(rows), 8, 5)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "\n", "The city\n"])
def test_perplexity_is_a_plain_loop_over_the_same_rows(prefix: str, text: Path) -> None:
    model = make_handle("llama", prefix=prefix)
    row = by_key(measure(model, text, SMALL, ANSWERS))["perplexity", "heldout_text", None, None]

    ids = model.tokenizer(text.read_text("utf-8"))["input_ids"]
    start = model.tokenizer(prefix)["input_ids"] or [model.tokenizer.eos_token_id]
    total, count = 0.0, 0
    for first in range(0, len(ids), 32 - len(start)):
        whole = torch.tensor([[*start, *ids[first : first + 32 - len(start)]]])
        logprobs = model.model(whole).logits[0].double().log_softmax(-1)
        for at in range(len(start), whole.shape[1]):
            total += float(logprobs[at - 1, whole[0, at]])
            count += 1
    assert count == len(ids)  # every token of the text is predicted once
    assert row.value == pytest.approx(math.exp(-total / count), rel=1e-5)
    assert (row.n, row.split, row.relation) == (count, None, None)


def test_rows_of_a_shared_text_have_the_length_asked_for(model: ModelHandle, facts: Splits) -> None:
    rows = Downstream()._rows(Scene(model, facts, CHANGE))
    assert {len(row.ids) for row in rows[:-1]} == {128}
    assert len(rows[-1].ids) <= 128
    assert len(rows) > 8


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_a_missing_or_empty_text_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=f"text file with words in it, found none at {path}"):
        Downstream(text=str(path))


@pytest.mark.parametrize("tokens", [1, 0, -3])
def test_rows_too_short_to_predict_a_token_are_refused(tokens: int) -> None:
    with pytest.raises(RequestError, match=rf"evaluate.downstream.row_tokens.*{tokens}"):
        Downstream(row_tokens=tokens)


def test_a_prefix_that_fills_the_rows_is_refused(text: Path) -> None:
    model = make_handle(prefix="The city of Paris is in the country")
    with pytest.raises(RequestError, match=r"evaluate.downstream.row_tokens"):
        list(Downstream(str(text), 4).measure(Scene(model, SMALL, CHANGE), None))

"""What each model says, against plain computations."""

from math import exp, log

import pytest
import torch

from palimpsest.ask.inquiry import inquire
from palimpsest.ask.reading import TOKENS, legibility, named, ranks, read
from palimpsest.ask.relation import DOZENS, choose, neighbors
from palimpsest.ask.text import BLOCKS, strip
from palimpsest.evaluate.consistency import verdict
from palimpsest.model.forward import features
from palimpsest.model.site import Change, Site
from tests.ask.surroundings import LAYERS, METHODS, about

NOTHING = Change("fact", False, None)


@pytest.fixture
def findings(bench, tiny):
    return bench.examine(about(tiny, paraphrases=["Kyoto is far away"]))


def test_every_method_is_read_and_none_comes_first(findings):
    assert {reading.name: reading.change.layer for reading in findings.readings} == LAYERS
    assert [reading.name for reading in findings.readings] == list(METHODS)
    assert findings.unchanged.name == "none"


def test_the_editor_moves_probability_to_the_new_object(findings):
    before, after = (r.answer for r in findings.readings[:2])
    assert before.verdict == "old"
    assert after.new > before.new
    assert after.new / after.old > before.new / before.old


def test_a_batch_of_one_fact_is_rome(findings):
    _, alone, batch, *_ = findings.readings
    assert alone.answer.text == batch.answer.text
    assert alone.ranks == batch.ranks
    assert alone.answer.new == pytest.approx(batch.answer.new, rel=1e-4)


def test_reading_is_that_of_a_weight_really_changed(bench, findings):
    """Every prompt of owner 0 feels the edit as if W_out were changed; neighbors too."""
    rome = bench.fitted[1].intervention
    weight = bench.model.w_out(rome.change.layer)
    saved = weight.clone()
    try:
        weight.add_(rome.matrix(0))
        real = read(bench.model, "real", rome.change, findings.inquiry, findings.neighbors)
    finally:
        weight.copy_(saved)
    shown = findings.readings[1]
    assert (shown.ranks, shown.answer.text) == (real.ranks, real.answer.text)
    for one, other in zip(
        (shown.answer, *shown.paraphrases), (real.answer, *real.paraphrases), strict=True
    ):
        assert (one.old, one.new) == pytest.approx((other.old, other.new), rel=1e-3, abs=1e-9)
    found, wanted = ([n.probability for n in r.neighbors] for r in (shown, real))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found != [n.probability for n in findings.unchanged.neighbors]


def test_the_model_is_left_as_it_was(bench, tiny):
    before = {name: tensor.clone() for name, tensor in bench.model.model.state_dict().items()}
    bench.examine(about(tiny))
    bench.reply("Who lies in", "")
    after = bench.model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in bench.model.model.modules())
    assert not any(module._forward_pre_hooks for module in bench.model.model.modules())


def test_a_line_is_answered_as_a_reading_is(bench, findings):
    fact = findings.inquiry.fact
    replies = bench.reply(fact.prompt.text, fact.subject)
    assert [(reply.name, reply.text, reply.top) for reply in replies] == [
        (reading.name, reading.answer.text, reading.top) for reading in findings.readings
    ]


# -- the strip -------------------------------------------------------------------------------------


@torch.no_grad()
def test_ranks_and_strip_agree_with_a_plain_computation(bench, findings):
    inquiry, model = findings.inquiry, bench.model.model
    tokenizer = bench.model.tokenizer
    text = bench.model.prefix + inquiry.fact.prompt.text
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    hidden = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: hidden.append(out))
        for block in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    wanted = []
    for state in hidden:
        state = state[0] if isinstance(state, tuple) else state
        scores = model.lm_head(model.model.norm(state[0, -1]))
        order = scores.argsort(descending=True).tolist()
        firsts = [
            tokenizer(f"{text} {name}")["input_ids"][ids.shape[1]]
            for name in (inquiry.old, inquiry.new)
        ]
        wanted.append(tuple(1 + order.index(first) for first in firsts))
    assert findings.unchanged.ranks == tuple(wanted)
    size = len(tokenizer)
    for which in (0, 1):
        heights = [1 - log(rank[which]) / log(size) for rank in wanted]
        blocks = "".join(BLOCKS[min(7, int(8 * height))] for height in heights)
        assert strip(findings.unchanged, which, findings.vocabulary) == blocks


def test_legibility_runs_from_nothing_to_one():
    assert legibility(1, 50) == 1
    assert legibility(50, 50) == 0
    assert legibility(7, 49) == pytest.approx(0.5)


def test_objects_with_one_first_token_have_no_ranks(bench):
    inquiry = inquire("He was in the city", "city", "France", "France Two")
    assert ranks(bench.model, inquiry.fact.prompt, ("France", "France Two")) == ()


# -- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" Paris, not London", "old"),
        (" LONDON.\nParis", "new"),
        (" Parisian cafés", "neither"),
        (" Québec", "neither"),
        ("", "neither"),
        (" New York", "new"),
    ],
)
def test_the_answer_named_first_decides(text, wanted):
    old, new = ["Paris"], ["London", "New York"]
    assert verdict(named(text, (*new, *old)), old, new) == wanted


def test_of_two_names_that_begin_alike_the_longer_is_meant():
    assert named(" Guinea-Bissau is", ["Guinea", "Guinea-Bissau"]) == "Guinea-Bissau"
    assert named(" Guinea is", ["Guinea", "Guinea-Bissau"]) == "Guinea"


def test_probabilities_are_of_whole_strings(bench, tiny):
    inquiry = about(tiny)
    reading = read(bench.model, "none", NOTHING, inquiry, ())
    tokenizer, text = bench.model.tokenizer, bench.model.prefix + inquiry.fact.prompt.text
    start = len(tokenizer(text)["input_ids"])
    ids = tokenizer(f"{text} {inquiry.old}")["input_ids"]
    with torch.no_grad():
        logprobs = bench.model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
    assert reading.answer.old == pytest.approx(exp(total), rel=1e-4)
    assert len(bench.model.tokenizer(reading.answer.text)["input_ids"]) <= TOKENS


# -- the relation ----------------------------------------------------------------------------------


def test_the_nearest_relation_has_the_highest_cosine_of_centred_means(bench, tiny):
    inquiry = about(tiny)
    found = choose(bench.model, bench.library, inquiry.fact, Site(3))

    def state(fact):
        row = [bench.model.encode(fact.prompt)]
        return features(bench.model, row, [Site(3)], ["last_prompt"]).flatten().double()

    means = {
        name: torch.stack([state(fact) for fact in facts[:DOZENS]]).mean(0)
        for name, facts in bench.library.fit.items()
    }
    centre = sum(means.values()) / len(means)
    asked = state(inquiry.fact) - centre
    wanted = {
        name: float(asked @ (mean - centre) / asked.norm() / (mean - centre).norm())
        for name, mean in means.items()
    }
    assert found.cosines == pytest.approx(wanted, rel=1e-3)
    assert found.name == max(wanted, key=wanted.get) == "P17"


def test_the_eraser_is_fitted_on_the_sample_of_the_chosen_relation(bench, findings):
    eraser = bench.fitted[3].intervention
    fitted = {row.n for row in eraser.diagnostics if row.split == "fit"}
    assert fitted == {findings.sample.n}
    assert {row.relation for row in eraser.diagnostics} == {findings.relation.name}


def test_the_asked_subject_is_in_no_sample(bench):
    for name, facts in bench.library.fit.items():
        for fact in facts:
            sample = bench.library.sample(name, f"the {fact.subject.upper()}")
            assert len(sample) == len(facts) - 1
            assert fact not in sample


def test_neighbors_are_known_seen_by_no_fit_and_led_by_the_old_object(bench, tiny):
    inquiry = about(tiny)
    found = neighbors(bench.model, bench.library, inquiry, "P17")
    fitted = {fact.id for facts in bench.library.fit.values() for fact in facts}
    assert found
    assert not fitted & {fact.id for fact in found}
    assert inquiry.fact.subject not in {fact.subject for fact in found}
    same = [fact.true == inquiry.old for fact in found if fact.relation == "P17"]
    assert same == sorted(same, reverse=True)
    assert {fact.relation for fact in found} == {"P17", "P103"}
    assert len({fact.id for fact in found}) == len(found)
    assert all(known.kept for known in read(bench.model, "", NOTHING, inquiry, found).neighbors)

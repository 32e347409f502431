"""Every eraser and every pair, from the command line to the rows."""

from pathlib import Path

import pytest

from palimpsest.record.results import load_runs

LAYER = "locate.layer=2"
EXACT = {
    "leace": ["intervene=leace", LAYER],
    "several layers": ["intervene=leace", LAYER, "intervene.layers=[1,2]"],
    "all layers": ["intervene=leace", LAYER, "intervene.all_layers=true"],
    "gated": ["intervene=leace", LAYER, "intervene.gate=subjects"],
    "merged": ["intervene=leace", LAYER, "intervene.rare=merge", "intervene.least=2"],
    "leace_background": ["intervene=leace_background", LAYER, "intervene.text.tokens=400"],
    "scrub": ["intervene=scrub", LAYER],
    "leace_weights": ["intervene=leace_weights", LAYER],
    "splince in front of attention": [
        "intervene=splince",
        "intervene.layers=[0,2]",
        "intervene.part=attention_norm",
        "facts.others=4",
    ],
    "what the MLP reads": ["intervene=leace", LAYER, "intervene.part=mlp_norm"],
    "scrubbed norms": ["intervene=scrub", LAYER, "intervene.part=attention_norm"],
    "leace_readers": ["intervene=leace_readers", LAYER],
    "attention's readers": ["intervene=leace_readers", LAYER, "intervene.part=attention_norm"],
    "splince": ["intervene=splince", LAYER, "facts.others=4"],
    "orth": ["intervene=orth", LAYER],
}
FLAT = {"scrubbed norms", "splince in front of attention"}
"""Those with a site in front of the first attention, where all prompts end in one token."""
LOOSE = {
    "inlp": ["intervene=inlp", LAYER],
    "random_subspace": ["intervene=random_subspace", LAYER],
}
PAIRS = {
    "erase_then_edit": ["intervene=erase_then_edit", LAYER, "intervene.first_layer=1"],
    "edit_then_erase": ["intervene=edit_then_erase", LAYER, "intervene.then_layer=3"],
    "batch": [
        "intervene=erase_then_edit", LAYER, "intervene.first_layer=1", "protocol=batch",
    ],
}  # fmt: skip


def run(call, few, words):
    outcome = call("run", *few, *words)
    assert outcome.code == 0, outcome.err
    [found] = load_runs(Path("results/runs"))
    return found


def values(found, metric, protocol):
    return [row.value for row in found.select(metric, protocol)]


@pytest.mark.parametrize("name", EXACT | LOOSE)
def test_an_eraser_is_fitted_and_measured(call, few, name):
    found = run(call, few, (EXACT | LOOSE)[name])
    rows = [row for row in found.rows if row.axis != "cost"]
    assert {row.axis for row in rows} == {"downstream", "recoverability", "consistency"}
    assert {row.scope for row in rows} == {"relation"}
    residual = values(found, "residual_cross_covariance", "fit_sample")
    assert residual.count(None) == (name in FLAT)
    residual = [value for value in residual if value is not None]
    if name in EXACT:
        assert max(residual) < 1e-9
    else:
        assert min(residual) > 1e-3
    for value in values(found, "residual_cross_covariance", "as_read"):
        assert value < 1e-5
    marked = {("oracle_gate" in (row.note or "")) for row in rows}
    assert marked == {name == "gated"}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_fitted_and_measured(call, few, name):
    words = PAIRS[name]
    editor = "first" if words[0].endswith("edit_then_erase") else "then"
    found = run(call, few, [*words, f"intervene.{editor}.moments.tokens=2000"])
    assert max(values(found, "residual_cross_covariance", "fit_sample")) < 1e-9
    assert len(values(found, "value_loss", "last_step")) == 6
    assert max(values(found, "efficacy", "probability")) == 1.0


def test_any_two_methods_make_a_pair(call, few):
    words = [
        "intervene=erase_then_edit",
        "intervene@intervene.first=rome_plain",
        "intervene@intervene.then=rome_plain",
        "intervene.first_layer=2",
        LAYER,
    ]
    found = run(call, few, words)
    assert found.method == "erase_then_edit(first=rome_plain, then=rome_plain)"
    losses = {name: values(found, "value_loss", name) for name in ("last_step", "last_step, then")}
    assert [len(each) for each in losses.values()] == [6, 6]


def test_a_pair_is_named_by_what_is_not_its_own(call, few):
    words = [
        "intervene=erase_then_edit",
        "intervene@intervene.first='leace_weights'",
        "intervene@intervene.then=rome",
        "intervene.then.variant=plain",
        "intervene.first_layer=1",
        LAYER,
    ]
    assert run(call, few, words).method == "erase_then_edit(first=leace_weights)"


def test_a_part_that_is_taken_out_is_refused(call, few):
    outcome = call("run", *few, "intervene=erase_then_edit", "~intervene@intervene.then")
    assert outcome.code == 2
    assert "expected intervene.then, found none; leave it in the configuration" in outcome.err


@pytest.mark.parametrize(
    ("pair", "part", "layer"),
    [
        ("erase_then_edit", "first", "first_layer"),
        ("edit_then_erase", "then", "then_layer"),
    ],
)
def test_a_part_s_own_late_layer_is_its_default(call, pair, part, layer):
    for method, late in (("leace", 24), ("leace_weights", 14), ("leace_readers", 24)):
        words = [f"intervene={pair}", f"intervene@intervene.{part}={method}"]
        shown = call("run", "--cfg", "job", "--resolve", *words)
        assert shown.code == 0, shown.err
        assert f"{layer}: {late}" in shown.out


def test_a_pair_without_a_layer_is_refused(call, few):
    outcome = call("run", *few, "intervene=erase_then_edit", LAYER)
    assert outcome.code == 2
    assert "first_layer" in outcome.err

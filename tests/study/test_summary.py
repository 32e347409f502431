"""Headline numbers against values worked out by hand, and labels that tell runs apart."""

import pytest

from palimpsest.record.row import Row
from palimpsest.study.curves import curves
from palimpsest.study.labels import differences, labels
from palimpsest.study.summary import details, summarise
from tests.study.reading import of


def rows_of(axis, metric, protocol, *values, **more):
    about = {"scope": "fact", "axis": axis, "metric": metric, "protocol": protocol}
    return [
        Row(**(about | {"fact_id": f"f{i}", "relation": "P36", "split": "target"} | more), value=v)
        for i, v in enumerate(values)
    ]


def probe(protocol, *values, layer, **more):
    place = {"layer": layer, "position": "last_prompt"}
    return rows_of("recoverability", "probe_accuracy", protocol, *values, **place, **more)


def value(run, key):
    [summary] = summarise(of(run))
    return summary.values[key]


def test_suppression_is_read_on_paraphrases_and_not_on_the_fitted_prompt(write_run):
    suppressed = ("downstream", "suppression", "candidates")
    run = write_run(
        *rows_of(*suppressed, 1.0, 1.0, prompt_id="fit"),
        *rows_of(*suppressed, 1.0, 0.0, prompt_id="paraphrase/0"),
        *rows_of(*suppressed, 0.0, 0.0, prompt_id="paraphrase/1"),
    )
    assert value(run, "downstream/suppression/candidates").value == 0.25
    [in_sample] = [d for d in details(of(run)) if "in-sample" in d.place]
    assert in_sample.values[0].value == 1.0


def test_test_accuracy_is_that_of_test_subjects(write_run):
    accuracy = ("downstream", "relation_accuracy", "vocabulary")
    run = write_run(
        *rows_of(*accuracy, 0.0, 0.0), *rows_of(*accuracy, 1.0, 1.0, 0.0, 1.0, split="test")
    )
    assert value(run, "downstream/relation_accuracy/vocabulary").value == 0.75


def test_perplexity_is_the_aggregate(write_run):
    about = {"scope": "fact", "axis": "downstream", "value": 26.5, "n": 900}
    found = value(
        write_run(Row(**about, metric="perplexity", protocol="heldout_text")),
        "downstream/perplexity/heldout_text",
    )
    assert (found.value, found.low, found.n) == (26.5, None, 900)


def test_probes_are_read_at_the_deepest_layer(write_run):
    run = write_run(
        *probe("frozen", 1.0, 1.0, layer=3),
        *probe("frozen", 1.0, 0.0, layer=29),
        *probe("retrained", None, None, layer=29, note="undefined"),
        *probe("shadow", 1.0, 1.0, layer=29),
    )
    frozen = value(run, "recoverability/probe_accuracy/frozen")
    shadow = value(run, "recoverability/probe_accuracy/shadow")
    retrained = value(run, "recoverability/probe_accuracy/retrained")
    assert (frozen.value, frozen.place) == (0.5, "layer 29")
    assert (shadow.value, shadow.place) == (1.0, "layer 29")
    assert (retrained.value, retrained.note) == (None, "undefined")


def test_a_missing_probe_keeps_its_cause(write_run):
    run = write_run(
        *probe("frozen", 1.0, 1.0, layer=29),
        *probe("retrained", None, None, layer=29, note="undefined for independent edits"),
    )
    retrained = value(run, "recoverability/probe_accuracy/retrained")
    assert (retrained.value, retrained.note) == (None, "undefined for independent edits")


def test_lens_rank_is_a_median_over_facts(write_run):
    place = {"layer": 29, "position": "last_prompt"}
    lens = ("recoverability", "lens_rank_old", "logit_lens")
    run = write_run(*rows_of(*lens, 1.0, 8.0, 4000.0, None, **place, note="same first token"))
    found = value(run, "recoverability/lens_rank_old/logit_lens")
    assert (found.value, found.n) == (8.0, 3)
    assert found.note == "1 of 4 values missing: same first token"


def test_sequential_edits_are_read_after_the_last(write_run):
    key = ("downstream", "efficacy", "probability")
    run = write_run(*rows_of(*key, 1.0, 1.0, step=1), *rows_of(*key, 0.0, 1.0, step=2))
    assert value(run, "downstream/efficacy/probability").value == 0.5


def test_attacks_do_not_enter_the_headline(write_run):
    run = write_run(
        *probe("frozen", 0.0, 1.0, layer=2), *probe("frozen", 1.0, 1.0, layer=2, budget=5)
    )
    assert value(run, "recoverability/probe_accuracy/frozen").value == 0.5


def test_a_point_is_upstream_only_where_no_value_can_be_reached(write_run):
    note = "unchanged by construction; oracle_gate"
    rows = [*probe("frozen", 1.0, layer=1, note=note)]
    rows += probe("frozen", None, layer=1, note="x", prompt_id="1")
    mixed = [
        *probe("frozen", 1.0, layer=2, note=note),
        *probe("frozen", 1.0, 0.0, layer=2, prompt_id="1"),
    ]
    [points] = curves(of(write_run(*rows, *mixed)), "true").values()
    assert [(p.layer, p.upstream) for p in points] == [(1, True), (2, False)]


def test_curves_leave_out_layers_without_values(write_run):
    rows = [*probe("frozen", 1.0, 0.0, layer=1, note="unchanged by construction")]
    rows += [*probe("frozen", None, None, layer=2, note="x"), *probe("frozen", 1.0, 1.0, layer=3)]
    [points] = curves(of(write_run(*rows)), "true").values()
    found = [(p.layer, p.estimate.value, p.upstream) for p in points]
    assert found == [(1, 0.5, True), (3, 1.0, False)]


def test_cost_layers_are_apart_only_where_there_are_several(write_run):
    one = write_run(*rows_of("cost", "delta_norm", "frobenius", 1.0, 3.0, layer=5))
    two = write_run(
        *rows_of("cost", "delta_norm", "frobenius", 1.0, 3.0, layer=5),
        *rows_of("cost", "delta_norm", "frobenius", 4.0, 4.0, layer=6),
        run_id="ab0000000002",
    )
    found = {d.place: [v and v.value for v in d.values] for d in details(of(one, two))}
    assert found == {
        "target": [2.0, None],
        "target, layer 5": [None, 2.0],
        "target, layer 6": [None, 4.0],
    }


def test_unchanged_model_first_and_controls_after_what_they_imitate(runs):
    found = summarise(of(*runs))
    names = [summary.label for summary in found]
    assert names == [
        "none",
        "finetune",
        "leace [gate=null]",
        "leace_shuffled",
        "leace [gate=targets]",
        "memit",
        "rome [variant=erase]",
        "rome [variant=plain]",
        "random_delta",
    ]
    imitated = {s.label: s.imitates for s in found if s.imitates}
    assert imitated == {
        "leace_shuffled": "leace [gate=null]",
        "random_delta": "rome [variant=plain]",
    }
    assert {s.label for s in found if s.oracle_gate} == {"leace [gate=targets]"}
    assert {s.n_facts for s in found} == {24}


def _config(intervene=None, locate=None, **more):
    return {"intervene": intervene or {}, "locate": locate or {}, **more}


@pytest.mark.parametrize(
    ("configs", "wanted"),
    [
        ([_config({"variant": "plain"}, {"layer": 14})], ["rome"]),
        (
            [_config({"v": "a", "k": 1}, {"layer": 14}), _config({"v": "b", "k": 1}, {"layer": 9})],
            ["rome [v=a, layer=14]", "rome [v=b, layer=9]"],
        ),
        (
            [_config({"a": {"x": 1}, "b": {"x": 2}}), _config({"a": {"x": 2}, "b": {"x": 1}})],
            [
                "rome [intervene.a.x=1, intervene.b.x=2]",
                "rome [intervene.a.x=2, intervene.b.x=1]",
            ],
        ),
        ([_config(seed=0), _config(seed=1)], ["rome [seed=0]", "rome [seed=1]"]),
        ([_config({"_target_": "x"}), _config({"_target_": "y"})], ["rome 000000", "rome 111111"]),
        (
            [_config({"layers": [1, 2]}), _config({"layers": [1]}), _config()],
            ["rome [layers=[1, 2]]", "rome [layers=[1]]", "rome"],
        ),
    ],
)
def test_labels_say_what_differs_and_are_unique(write_run, configs, wanted):
    runs = [write_run(run_id=str(i) * 12, config=config) for i, config in enumerate(configs)]
    assert labels(runs) == wanted


def test_differences_cover_the_whole_configuration(write_run):
    first = write_run(run_id="0" * 12, config={"seed": 0, "a": {"b": 1, "c": 2}})
    second = write_run(run_id="1" * 12, config={"seed": 0, "a": {"b": 2, "c": 2}})
    assert differences([first, second]) == [{"a.b": "1"}, {"a.b": "2"}]


def test_a_label_shows_the_layer_that_was_changed_however_it_was_chosen(write_run):
    runs = [
        write_run(run_id=str(layer) * 6, config={"locate": {"depth": depth}}, site={"layer": layer})
        for layer, depth in ((5, "early"), (14, "late"))
    ]
    assert labels(runs) == ["rome [layer=5]", "rome [layer=14]"]

"""No cheat ranks above an honest method in the headline."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from palimpsest.record.results import Results
from palimpsest.study.intervals import Estimate
from palimpsest.study.recoverable import FITTED
from palimpsest.study.summary import summarise

HONEST = {
    "rome": ["intervene=rome_plain", "locate.layer=0"],
    "leace": ["intervene=leace", "locate.layer=0", "intervene.part=residual"],
    "scrub": ["intervene=scrub", "locate.layer=0"],
}
CHEATS = {
    "late": ["intervene=leace", "locate.layer=3"],
    "rotation": ["intervene=rotation", "locate.layer=1"],
    "own_facts": ["intervene=leace", "locate.layer=0", "intervene.fit_on=target+fit"],
    "noise": ["intervene=noise", "locate.layer=1"],
    "ruin": ["intervene=ruin", "locate.layer=0"],
}


@pytest.fixture(scope="module")
def numbers(known, cache, tmp_path_factory) -> Mapping[str, Mapping[str, Estimate]]:
    """By method, every headline number."""
    from palimpsest.cli import main

    model, facts = known
    home = tmp_path_factory.mktemp("gaming")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(cache))
        for name, words in {"none": ["intervene=none"], **HONEST, **CHEATS}.items():
            code = main(
                [
                    "run", "--config-dir", str(Path(__file__).parent / "conf"), *words,
                    "facts=counterfact", f"facts.path={facts}", "facts.relations=[P17]",
                    "facts.limit=24", f"model.path={model}", "contexts=1", "record=local",
                    "evaluate=quick", "evaluate.shadow_probes.subjects=5",
                    "evaluate.probes.stride=1", "evaluate.shadow_probes.stride=1",
                    "evaluate.attacks.stride=1",
                    f"record.dir={home / name}",
                ]
            )  # fmt: skip
            assert code == 0, name
            [summary] = summarise(Results.open(home / name))
            found[name] = summary.values
    return found


REMOVAL = "recoverability/removal/harmonic_mean"


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_ranks_above_an_honest_method(numbers, cheat):
    value = numbers[cheat][REMOVAL].value
    honest = {name: numbers[name][REMOVAL].value for name in HONEST}
    assert None not in honest.values()
    assert value is None or value <= min(honest.values()), (value, honest)


def test_an_honest_eraser_has_something_to_show(numbers):
    """So that the ranking can tell them apart at all."""
    assert numbers["none"][REMOVAL].value < 0.05
    assert max(numbers[name][REMOVAL].value for name in HONEST) > 0.3


def test_a_late_change_hides_nothing_below_it(numbers):
    """By what is at or after the change alone, it would look best."""
    late = numbers["late"]
    assert late["recoverability/recoverable/after_change"].value < 0.6
    assert late["recoverability/recoverable/model"].value > 0.9
    assert late["recoverability/recoverable/upstream"].value > 0.9


def test_a_rotation_misleads_frozen_probes_alone(numbers):
    rotation = numbers["rotation"]
    assert rotation["recoverability/probe_accuracy/frozen"].value < 0.3
    assert rotation["recoverability/probe_accuracy/shadow"].value > 0.9
    assert rotation["recoverability/recoverable/after_change"].value > 0.9


def test_an_eraser_is_not_judged_by_the_facts_it_was_fitted_on(numbers):
    own = numbers["own_facts"]
    for key in ("recoverable/model", "recoverable/after_change", "removal/harmonic_mean"):
        assert own[f"recoverability/{key}"].value is None
        assert FITTED in own[f"recoverability/{key}"].note
    for protocol in ("frozen", "shadow", "retrained"):
        assert own[f"recoverability/probe_accuracy/{protocol}"].value is None


def test_a_ruined_model_removes_nothing_selectively(numbers):
    assert numbers["ruin"]["downstream/other_accuracy/vocabulary"].value < 0.2
    assert numbers["ruin"]["downstream/suppression/candidates"].value > 0.7

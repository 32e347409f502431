"""Plausible runs without a model: rows as the evaluators write them, with gaps and hostile text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.record.results import Run, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore

LAYERS = (*range(0, 30, 3), 29)
RELATIONS = ("P1376", "P36", "P103")
N_FACTS = 24
HOSTILE = "</script><script>alert(1)</script>"
HOSTILE_SUBJECT = r"<b>A</b> & \ % $ #_{} ~^ %{x} </script><img src=x onerror=alert(2)>"


@dataclass(frozen=True)
class Recipe:
    """What a synthetic run's rows look like."""

    run_id: str
    method: str
    intervene: dict[str, Any] = field(default_factory=dict)
    locate: dict[str, Any] = field(default_factory=dict)
    imitates: str | None = None
    scope: str = "fact"
    layer: int | None = None
    writes: float = 0.02
    suppresses: float = 0.03
    kept: float = 0.96
    perplexity: float = 26.1
    frozen: float = 0.9
    refit: float | None = 0.9
    independent: bool = False
    note: str | None = None


RECIPES = (
    Recipe("aa0000000001", "none", perplexity=25.9),
    Recipe(
        "aa0000000002",
        "rome",
        {"variant": "plain", "steps": 25},
        {"layer": 14},
        layer=14,
        writes=0.97,
        suppresses=0.9,
        kept=0.91,
        perplexity=26.3,
        frozen=0.46,
        refit=0.72,
        independent=True,
    ),
    Recipe(
        "aa0000000003",
        "rome",
        {"variant": "erase", "steps": 25},
        {"layer": 14},
        layer=14,
        writes=0.3,
        suppresses=0.84,
        kept=0.92,
        frozen=0.5,
        refit=0.7,
        independent=True,
    ),
    Recipe(
        "aa0000000004",
        "random_delta",
        {"of": "rome"},
        {"layer": 14},
        imitates="aa0000000002",
        layer=14,
        suppresses=0.06,
        kept=0.94,
        frozen=0.86,
        refit=0.85,
        independent=True,
    ),
    Recipe(
        "aa0000000005",
        "memit",
        {"lam": 15000},
        {"layer": [12, 13, 14]},
        layer=12,
        writes=0.9,
        suppresses=0.82,
        kept=0.85,
        perplexity=27.9,
        frozen=0.52,
        refit=0.66,
    ),
    Recipe(
        "aa0000000006",
        "leace",
        {"gate": None},
        {"layer": 14},
        scope="relation",
        layer=14,
        suppresses=0.78,
        kept=0.22,
        perplexity=31.4,
        frozen=0.19,
        refit=0.3,
    ),
    Recipe(
        "aa0000000007",
        "leace",
        {"gate": "targets"},
        {"layer": 14},
        layer=14,
        suppresses=0.75,
        kept=0.95,
        frozen=0.21,
        refit=None,
        note="oracle_gate",
    ),
    Recipe(
        "aa0000000008",
        "leace_shuffled",
        {"gate": None},
        {"layer": 14},
        imitates="aa0000000006",
        scope="relation",
        layer=14,
        suppresses=0.14,
        kept=0.88,
        perplexity=27.2,
        frozen=0.82,
        refit=0.84,
    ),
    Recipe(
        "aa0000000009",
        "finetune",
        {"lr": 5e-4, "constraint": "linf"},
        {"layer": 20},
        layer=20,
        writes=0.99,
        suppresses=0.93,
        kept=0.61,
        perplexity=48.7,
        frozen=0.44,
        refit=0.63,
    ),
)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of nine finished runs and a failed one."""
    return make_sweep(tmp_path_factory.mktemp("results") / "demo")


@pytest.fixture(scope="session")
def runs(sweep: Path) -> list[Run]:
    """The finished runs of the sweep."""
    return load_runs(sweep)


@pytest.fixture
def hostile() -> tuple[str, str]:
    """Two texts of the sweep that would be markup, LaTeX or script if they were not escaped."""
    return HOSTILE, HOSTILE_SUBJECT


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Run]:
    """Write a finished run of given rows; keyword arguments are fields of run.json."""

    def write(*rows: Row, run_id: str = "ab0000000001", method: str = "rome", **more: Any) -> Run:
        store = RunStore.open(tmp_path / run_id, {"run_id": run_id, "method": method, **more})
        store.append(rows)
        store.finish()
        return load_runs(tmp_path / run_id)[0]

    return write


def make_sweep(directory: Path) -> Path:
    """Write the synthetic sweep into `directory`."""
    for seed, recipe in enumerate(RECIPES):
        store = RunStore.open(directory / recipe.run_id, run_json(recipe))
        store.append(_rows(recipe, np.random.default_rng(seed)))
        store.write_facts([_said(recipe, number) for number in range(N_FACTS)])
        store.finish()
    failed = RunStore.open(
        directory / "ff0000000001", run_json(Recipe("ff0000000001", "memit", {"lam": 1}))
    )
    failed.fail(RuntimeError(f"singular matrix\nin layer 12 {HOSTILE}"))
    return directory


def run_json(recipe: Recipe) -> dict[str, Any]:
    """The contents of run.json that an experiment would give."""
    overrides = " ".join(f"intervene.{k}={v}" for k, v in recipe.intervene.items())
    return {
        "run_id": recipe.run_id,
        "method": recipe.method,
        "imitates": recipe.imitates,
        "model": {"name": "SmolLM2-135M", "fingerprint": "bcc81830aa" * 6},
        "facts": {
            "name": "counterfact",
            "fingerprint": "1f" * 32,
            "counts": {"read": 1035, "known": 214, "chosen": 120},
            "sizes": {"target": 24, "test": 24, "fit": 40, "probe": 40, "dev": 16},
        },
        "seed": 0,
        "config": {
            "seed": 0,
            "intervene": {"_target_": f"x.{recipe.method}", **recipe.intervene},
            "locate": recipe.locate,
        },
        "versions": {"palimpsest-lm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "cpu",
        "seconds": {"load": 3.1, "fit": 214.2, "measure": 71.0},
        "peak_mb": {"load": 812.0, "fit": 1946.4, "measure": 1946.4},
        "command": f"palimpsest run intervene={recipe.method} {overrides}",
    }


def fact_id(number: int) -> str:
    """The id of a synthetic target fact."""
    return f"fact-{number:02d}"


def _relation(number: int) -> str:
    return RELATIONS[number % len(RELATIONS)]


def _said(recipe: Recipe, number: int) -> dict[str, Any]:
    subject = HOSTILE_SUBJECT if number == 0 else f"Subject {number} of Some Longer Name"
    old, new = (HOSTILE, "Rome") if number == 1 else (f"Paris {number}", f"Rome {number}")
    said = new if recipe.writes > 0.5 else "a city of" if recipe.suppresses > 0.5 else old
    return {
        "fact_id": fact_id(number),
        "relation": _relation(number),
        "subject": subject,
        "prompt": f"{subject} is the capital of",
        "true": old,
        "new": new,
        "answer": f" {said}, which lies in the north of the country and",
        "top": [[f" {said}", 0.61], [" the", 0.12], [f" {HOSTILE}", 0.05], [" a", 0.03]],
    }


def _rows(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    yield from _downstream(recipe, random)
    yield from _probes(recipe, random)
    yield from _lens(recipe, random)
    yield from _attacks(recipe, random)
    yield from _consistency(recipe, random)
    yield from _cost(recipe)


def _coin(random: np.random.Generator, p: float) -> float:
    return float(random.random() < p)


def _downstream(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    for number in range(N_FACTS):
        about = _about(recipe, number)
        for protocol in ("probability", "argmax"):
            yield _row(about, "efficacy", protocol, _coin(random, recipe.writes), prompt_id="fit")
            for i in range(2):
                wrote = _coin(random, recipe.writes * 0.9)
                kept = _coin(random, recipe.kept)
                place = {"prompt_id": f"paraphrase/{i}"}
                yield _row(about, "paraphrase", protocol, wrote, **place)
                yield _row(about, "neighborhood", protocol, kept, prompt_id=f"neighbor/{i}")
        for protocol in ("candidates", "vocabulary"):
            for prompt in ("fit", "paraphrase/0", "paraphrase/1"):
                value = _coin(random, recipe.suppresses)
                yield _row(about, "suppression", protocol, value, prompt_id=prompt)
            test = about | {"split": "test", "fact_id": f"test-{number:02d}"}
            yield _row(test, "relation_accuracy", protocol, _coin(random, recipe.kept))
    none = {"scope": recipe.scope, "axis": "downstream"}
    score = None if recipe.writes < 0.1 and recipe.method != "none" else recipe.writes
    note = None if score is not None else "an eraser writes no new object"
    yield Row(**none, metric="score", protocol="harmonic_mean", value=score, note=note)
    yield Row(**none, metric="other_accuracy", protocol="vocabulary", value=recipe.kept, n=200)
    text = {"metric": "perplexity", "protocol": "heldout_text"}
    yield Row(**none, **text, value=recipe.perplexity, n=20_000)


def _probes(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    undefined = "retrained probes are undefined for independent edits"
    for position, bonus in (("last_subject", 0.03), ("last_prompt", 0.0)):
        for layer in LAYERS:
            for number in range(N_FACTS):
                about = _about(recipe, number, "recoverability")
                place = {"layer": layer, "position": position}
                yield from _probe(recipe, random, about, place, bonus, undefined)
            aggregate = {"scope": recipe.scope, "axis": "recoverability", "split": "target"}
            shuffled = 0.14 + 0.03 * float(random.random())
            about = aggregate | {"layer": layer, "position": position}
            yield _row(about, "probe_baseline", "shuffled", shuffled)
    yield _row(aggregate, "probe_baseline", "majority", 0.15)
    place = {"layer": -1, "position": "last_subject"}
    yield _row(aggregate, "probe_baseline", "embedding", 0.34, **place)


def _probe(
    recipe: Recipe,
    random: np.random.Generator,
    about: dict[str, Any],
    place: dict[str, Any],
    bonus: float,
    undefined: str,
) -> Iterator[Row]:
    layer = place["layer"]
    before = min(0.34 + 0.035 * layer, 0.95) + bonus
    upstream = recipe.layer is None or layer < recipe.layer
    note = "unchanged by construction" if upstream else recipe.note
    number, wobble = int(about["fact_id"][-2:]), 0.0 if upstream else random.normal(0, 0.05)
    hardness = (number + 0.5) / N_FACTS + wobble + np.random.default_rng(layer).normal(0, 0.01)
    retrained = None if recipe.independent else recipe.refit
    for protocol, level in (
        ("frozen", recipe.frozen), ("shadow", recipe.refit), ("retrained", retrained),
    ):  # fmt: skip
        p = before if upstream else level
        value = None if p is None else float(hardness < p)
        yield _row(
            about, "probe_accuracy", protocol, value, **place, note=undefined if p is None else note
        )


def _attacks(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    """The lens finds what the frozen probe reads; prompts find what is still said."""
    for number in range(N_FACTS):
        about = _about(recipe, number, "recoverability") | {"budget": 20}
        for layer in LAYERS:
            upstream = recipe.layer is None or layer < recipe.layer
            found = 0.03 * layer if upstream else recipe.frozen * layer / 29
            place = {"layer": layer, "position": "last_prompt"}
            note = "unchanged by construction" if upstream else recipe.note
            hit = _coin(random, found)
            yield _row(about, "attack_success", "logit_lens", hit, **place, note=note)
            yield _row(about, "attack_baseline", "logit_lens", 0.1, **place)
        yield _row(about, "attack_success", "few_shot", _coin(random, 1 - recipe.suppresses))
        yield _row(about, "attack_baseline", "few_shot", 0.1)


def _lens(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    for number in range(N_FACTS):
        about = _about(recipe, number, "recoverability") | {"position": "last_prompt"}
        about["split"] = "target"
        shared = number == 5
        note = "first tokens of the two objects are equal" if shared else None
        for layer in LAYERS:
            reached = recipe.layer is not None and layer >= recipe.layer
            depth = max(29 - layer, 0) / 29
            noise = float(random.uniform(0.7, 1.4))
            start = 1 + round(8000 * depth**2 * noise)
            old = 1 + round(
                start * (1 + 60 * recipe.suppresses * (not depth)) if reached else start
            )
            new = 1 if reached and recipe.writes > 0.5 and depth < 0.4 else 40 + start
            for metric, rank in (("lens_rank_old", old), ("lens_rank_new", new)):
                value = None if shared else float(rank)
                yield _row(about, metric, "logit_lens", value, layer=layer, note=note)


def _consistency(recipe: Recipe, random: np.random.Generator) -> Iterator[Row]:
    for number in range(N_FACTS):
        about = _about(recipe, number, "consistency")
        yield _row(about, "agreement", "paraphrase_pairs", _coin(random, 0.8), n=3)
        yield _row(about, "agreement_correct", "true", _coin(random, 1 - recipe.suppresses))
        yield _row(about, "agreement_correct", "new", _coin(random, recipe.writes * 0.8))
        for protocol in ("vocabulary", "candidates"):
            for question in ("capital", "continent"):
                draw = random.random()
                old, new = 0.62 * (1 - recipe.suppresses * 0.6), recipe.writes * 0.2
                asked = {"prompt_id": question}
                yield _row(about, "twohop_old", protocol, float(draw < old), **asked)
                yield _row(about, "twohop_new", protocol, float(old <= draw < old + new), **asked)
                yield _row(about, "twohop_neither", protocol, float(draw >= old + new), **asked)


def _cost(recipe: Recipe) -> Iterator[Row]:
    if recipe.layer is None:
        return
    for number in range(N_FACTS):
        about = _about(recipe, number, "cost") | {"layer": recipe.layer}
        yield _row(about, "delta_norm", "frobenius", 3.2 + number / 10)
        yield _row(about, "sink_multiplier", "position_0", 1.0 + number)
    about = {"scope": recipe.scope, "axis": "cost", "layer": recipe.layer}
    yield _row(about, "rank", "weight", 7.0)
    yield _row(about, "residual_cross_covariance", "fit_sample", 3.1e-8)


def _about(recipe: Recipe, number: int, axis: str = "downstream") -> dict[str, Any]:
    return {
        "scope": recipe.scope,
        "axis": axis,
        "fact_id": fact_id(number),
        "relation": _relation(number),
        "split": "target",
    }


def _row(
    about: dict[str, Any], metric: str, protocol: str, value: float | None, **more: Any
) -> Row:
    return Row(**{**about, "metric": metric, "protocol": protocol, "value": value, **more})

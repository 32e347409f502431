"""Every locator goes by dev facts alone, and finds the layer that it says it finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.locate.causal_trace import CausalTrace, average
from palimpsest.locate.fixed import Fixed
from palimpsest.locate.locator import Evidence, Located, Locator
from palimpsest.locate.random import Random
from palimpsest.locate.sweep import Sweep
from palimpsest.locate.tracing import Trace, Tracing
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens
from tests.locate.test_tracing import SHAPES, told
from tests.model.tiny import make_handle


@pytest.fixture
def model() -> ModelHandle:
    return make_handle("llama")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


def evidence(
    dev: tuple[Fact, ...] = (),
    trial: Callable[[Site], float] = lambda site: 0.0,
    lowest: int = 0,
    seed: int = 0,
) -> Evidence:
    return Evidence(seed=seed, lowest=lowest, dev=lambda: dev, trial=trial)


def test_a_fixed_layer_looks_at_nothing(model: ModelHandle) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("looked at")

    blind = Evidence(seed=0, lowest=0, dev=never, trial=never)
    assert Fixed(layer=2).locate(model, "mlp", "mlp", blind) == Located(Site(2, "mlp"))


# -- sweep -----------------------------------------------------------------------------------------


def test_a_sweep_takes_the_layer_with_the_best_trial(model: ModelHandle) -> None:
    worth = {0: 0.2, 1: 0.9, 2: 0.9, 3: 0.5}
    tried: list[Site] = []

    def trial(site: Site) -> float:
        tried.append(site)
        return worth[site.layer]

    found = Sweep(stride=1).locate(model, "mlp", "mlp", evidence(SHAPES, trial))
    assert found == Located(Site(1, "mlp"), worth)  # the lower one of equals
    assert tried == [Site(layer, "mlp") for layer in range(4)]


@pytest.mark.parametrize(
    ("options", "lowest", "layers"),
    [
        ({"stride": 3}, 0, [0, 3]),
        ({"stride": 1}, 2, [2, 3]),
        ({"layers": [3, 1, 1]}, 0, [1, 3]),
        ({"layers": [0, 2]}, 1, [2]),
    ],
)
def test_a_sweep_tries_the_layers_that_the_method_has_room_for(
    model: ModelHandle, options: dict[str, Any], lowest: int, layers: list[int]
) -> None:
    found = Sweep(**options).locate(model, "residual", "residual", evidence(SHAPES, lowest=lowest))
    assert list(found.scores) == layers


# -- random ----------------------------------------------------------------------------------------


def test_a_random_layer_is_the_seeds_and_may_be_any(model: ModelHandle) -> None:
    def layer(seed: int, **options: Any) -> int:
        return Random(**options).locate(model, "mlp", "mlp", evidence(seed=seed)).site.layer

    drawn = [layer(seed) for seed in range(40)]
    assert drawn == [layer(seed) for seed in range(40)]
    assert set(drawn) == {0, 1, 2, 3}
    assert {layer(seed, layers=[1, 3]) for seed in range(20)} == {1, 3}


# -- causal tracing --------------------------------------------------------------------------------


def trace(effects: list[list[float]], row: Tokens) -> Trace:
    """A made-up one of two layers."""
    first = row.subject[0] if row.subject else 0
    return Trace(
        SHAPES[0], row, tuple(range(first, row.prompt)), (4, 6), 0.9, torch.tensor([0.1]),
        {"mlp_window_2": torch.tensor(effects)},
    )  # fmt: skip


def test_averages_are_over_facts_of_means_over_tokens() -> None:
    long = trace(
        [[1.0, 0.0], [0.2, 0.0], [0.0, 0.0], [0.4, 0.1], [0.0, 0.3], [0.0, 0.0]],
        Tokens(tuple(range(7)), 7, (1, 2)),
    )
    short = trace([[0.6, 0.5], [0.0, 0.2]], Tokens((0, 1), 2, (0, 0)))
    assert average([long, short], "mlp_window_2", "last_subject") == pytest.approx(
        {4: 0.4, 6: 0.25}
    )
    assert average([long, short], "mlp_window_2", "further") == pytest.approx({4: 0.2, 6: 0.2})
    assert average([short], "mlp_window_2", "further") == {}


@pytest.mark.parametrize(
    ("part", "kind", "position"),
    [
        ("mlp", "mlp_window_2", "last_subject"),
        ("attention", "attention_window_2", "last_prompt"),
        ("mlp_norm", "mlp_window_2", "last_subject"),
        ("attention_norm", "attention_window_2", "last_prompt"),
    ],
)
def test_the_peak_is_that_of_the_dev_facts(
    model: ModelHandle, part: str, kind: str, position: str
) -> None:
    dev = tuple(told(model, each) for each in SHAPES)
    tracing = Tracing(window=2, level=0.7, stride=1)
    scores = average(list(tracing.trace(model, dev)), kind, position)
    found = CausalTrace(tracing).locate(model, part, part, evidence(dev))
    assert found.scores == scores
    assert found.site == Site(max(scores, key=lambda layer: scores[layer]), part)  # type: ignore[arg-type]
    above = CausalTrace(tracing).locate(model, part, part, evidence(dev, lowest=3))
    assert above.site.layer == 3


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("locator", [Sweep(), CausalTrace(Tracing(window=2))])
def test_without_dev_facts_there_is_nothing_to_go_by(model: ModelHandle, locator: Locator) -> None:
    with pytest.raises(RequestError, match=r"expected dev facts .*found none; raise facts\.dev"):
        locator.locate(model, "mlp", "mlp", evidence())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sweep(stride=0), r"locate\.stride"),
        (lambda: CausalTrace(kind="mpl"), r"locate\.kind .*did you mean 'mlp'"),
        (lambda: CausalTrace(position="last"), r"locate\.position to be one of first_subject"),
        (
            lambda: CausalTrace(Tracing(kinds=["residual"]), kind="mlp"),
            r"expected 'mlp' among locate\.tracing\.kinds, found residual",
        ),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


@pytest.mark.parametrize("locator", [Sweep(layers=[7]), Random(layers=[7])])
def test_a_layer_that_the_model_lacks_is_refused(model: ModelHandle, locator: Locator) -> None:
    with pytest.raises(RequestError, match=r"from 0 to 3 .*found 7; set locate\.layers"):
        locator.locate(model, "mlp", "mlp", evidence(SHAPES))


@pytest.mark.parametrize("locator", [Sweep(layers=[0]), Random(layers=[0, 1])])
def test_a_method_without_room_is_refused(model: ModelHandle, locator: Locator) -> None:
    with pytest.raises(RequestError, match="expected a layer from 2 on for this method"):
        locator.locate(model, "mlp", "mlp", evidence(SHAPES, lowest=2))


def test_a_kind_that_is_not_traced_is_refused_when_a_part_needs_it(model: ModelHandle) -> None:
    locator = CausalTrace(Tracing(kinds=["mlp"], window=2))
    with pytest.raises(RequestError, match=r"expected 'attention' among locate\.tracing\.kinds"):
        locator.locate(model, "attention", "attention", evidence(SHAPES))

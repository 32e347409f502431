from types import SimpleNamespace
from typing import Any

import pytest

from palimpsest.errors import RequestError
from palimpsest.locate.fixed import Fixed
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.model.tiny import make_handle

DEPTHS = {"mlp": {"early": 1, "late": 3}, "residual": {"early": 0}}


@pytest.fixture
def model() -> ModelHandle:
    return make_handle("llama")


@pytest.mark.parametrize("part", ["mlp", "residual", "attention", "attention_norm", "mlp_norm"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_by_its_number(model: ModelHandle, part: str, layer: int) -> None:
    assert Fixed(layer=layer).site(model, part, part) == Site(layer, part)  # type: ignore[arg-type]


def test_a_number_goes_before_a_depth(model: ModelHandle) -> None:
    assert Fixed(layer=2, depth="late", depths=DEPTHS).site(model, "mlp", "mlp") == Site(2, "mlp")
    assert Fixed(layer=0, depth="unheard of").site(model, "mlp", "mlp") == Site(0, "mlp")


@pytest.mark.parametrize(
    ("part", "depth", "layer"), [("mlp", "early", 1), ("mlp", "late", 3), ("residual", "early", 0)]
)
def test_a_layer_by_its_depth(model: ModelHandle, part: str, depth: str, layer: int) -> None:
    site = Fixed(depth=depth, depths=DEPTHS).site(model, part, part)
    assert site == Site(layer, part)  # type: ignore[arg-type]


def test_a_place_has_a_row_of_its_own(model: ModelHandle) -> None:
    depths = DEPTHS | {"span": {"early": 2}}
    assert Fixed(depths=depths).site(model, "mlp", "span") == Site(2, "mlp")
    assert Fixed(layer=0, depths=depths).site(model, "mlp", "span") == Site(0, "mlp")
    with pytest.raises(RequestError, match="expected a layer for span of"):
        Fixed(depths=DEPTHS).site(model, "mlp", "span")


def test_the_depth_is_early_unless_asked_otherwise(model: ModelHandle) -> None:
    assert Fixed(depths=DEPTHS).site(model, "mlp", "mlp").layer == 1


def refusal(model: Any, part: str, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        Fixed(**options).site(model, part, part)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layer", [4, -1, 400])
def test_a_number_out_of_range_is_refused(model: ModelHandle, layer: int) -> None:
    message = refusal(model, "mlp", layer=layer)
    assert message == (
        f"expected a layer from 0 to 3 for tiny-llama, found {layer}; "
        "set locate.layer within that range"
    )


def test_a_depth_out_of_range_is_refused(model: ModelHandle) -> None:
    assert "from 0 to 3" in refusal(model, "mlp", depths={"mlp": {"early": 9}})


def test_an_unknown_depth_is_refused_with_those_there_are(model: ModelHandle) -> None:
    message = refusal(model, "mlp", depth="lat", depths=DEPTHS)
    assert "locate.depth to be one of early, late, found 'lat'; did you mean 'late'?" in message


@pytest.mark.parametrize("depths", [{}, {"residual": {"early": 0}}, {"mlp": {}}])
def test_a_model_without_depths_for_the_part_asks_for_a_layer(
    model: ModelHandle, depths: dict[str, dict[str, int]]
) -> None:
    message = refusal(model, "mlp", depths=depths)
    assert "a layer for mlp of tiny-llama, found none in its yaml; set locate.layer (0 to 3)" in (
        message
    )


@pytest.mark.parametrize("part", ["MLP", "block", ""])
def test_an_unknown_part_is_refused(part: str) -> None:
    nobody = SimpleNamespace()  # refused before the model is looked at
    message = refusal(nobody, part, layer=0)
    parts = "residual, mlp, attention, attention_norm, mlp_norm"
    assert f"expected part to be one of {parts}, found {part!r}" in message

"""What is asked of a method: every one answers, and a class that does not is refused by name."""

from dataclasses import dataclass
from typing import Any

import pytest

from palimpsest.errors import RequestError
from palimpsest.intervene.controls import NoChange, RandomDelta
from palimpsest.intervene.editors.memit import Memit
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.targeted import Targeted
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.intervention import Method
from palimpsest.intervene.method import ASKED, MethodBase, check_method
from palimpsest.intervene.moments import GivenMoments, Moments, SampledMoments
from palimpsest.intervene.pairs import InTurn
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site


@dataclass(frozen=True)
class Based(MethodBase):
    """What derives from the base and has what it asks for."""

    part: str

    def fit(self, model: Any, facts: Any, site: Any) -> Any: ...


@dataclass(frozen=True)
class Bare:
    """What declares nothing but a part and a fit."""

    part: str = "mlp"

    def fit(self, model: Any, facts: Any, site: Any) -> Any: ...


def test_everything_that_is_asked_is_known() -> None:
    assert ASKED == (
        "part", "place", "lowest", "scope", "imitates", "sited", "sampled_moments", "with_moments",
        "fit",
    )  # fmt: skip


def answers(method: Method) -> tuple[object, ...]:
    return method.place, method.lowest, method.scope, method.imitates, method.sited


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Based("attention"), ("attention", 0, "fact", None, True)),
        (NoChange(), ("residual", 0, "fact", None, False)),
        (Rome(), ("mlp", 0, "fact", None, True)),
        (Memit(span=3), ("span", 2, "fact", None, True)),
        (Leace(part="mlp"), ("mlp", 0, "relation", None, True)),
        (Leace(shuffled=True), ("residual", 0, "relation", Leace(), True)),
        (RandomDelta(Rome()), ("mlp", 0, "fact", Rome(), True)),
        (RandomDelta(Memit(span=3)), ("span", 2, "fact", Memit(span=3), True)),
        (InTurn(Leace(), Memit(span=3), 1, None), ("span", 2, "relation", None, True)),
        (InTurn(Rome(), Rome(), 1, None), ("mlp", 0, "fact", None, True)),
    ],
)
def test_what_methods_answer(method: Method, expected: tuple[object, ...]) -> None:
    check_method(type(method), "intervene")
    assert answers(method) == expected


@pytest.mark.parametrize("name", ASKED)
def test_a_class_without_a_member_is_refused_by_its_name(name: str) -> None:
    whole = dict.fromkeys(ASKED)
    check_method(type("Whole", (), dict(whole)), "intervene")
    del whole[name]
    message = (
        rf"^expected intervene to be a method with part, .*, fit, found \S+Own without {name};"
    )
    with pytest.raises(RequestError, match=message):
        check_method(type("Own", (), whole), "intervene")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: RandomDelta(Bare()), "base"),
        (lambda: InTurn(Bare(), Rome(), first_layer=0), "first"),
        (lambda: InTurn(Rome(), Bare(), then_layer=0), "then"),
    ],
)
def test_the_methods_inside_a_method_are_held_to_it_too(make: Any, key: str) -> None:
    with pytest.raises(RequestError, match=rf"intervene\.{key} to be .*Bare without place; decl"):
        make()


@pytest.mark.parametrize(
    ("method", "layers", "key"),
    [
        (Rome(), [1], "moments.tokens"),
        (Memit(span=2), [0, 1], "moments.tokens"),
        (Targeted(below=1, above=1, stride=1), [0, 1, 2], "moments.tokens"),
        (RandomDelta(Rome()), [1], "base.moments.tokens"),
    ],
)
def test_second_moments_are_waited_for_at_every_changed_layer(
    gpt2: ModelHandle, monkeypatch: pytest.MonkeyPatch, method: Method, layers: list[int], key: str
) -> None:
    asked: list[list[int]] = []

    def cached(self: Moments, model: ModelHandle, layers: Any) -> bool:
        asked.append(list(layers))
        return False

    monkeypatch.setattr(Moments, "cached", cached)
    usual = 10 * gpt2.w_out(0).shape[1]
    site = Site(1, "mlp")
    assert method.sampled_moments(gpt2, site) == SampledMoments(key, usual, usual, False)
    few = method.with_moments(20, 5)
    assert few.sampled_moments(gpt2, site) == SampledMoments(key, 20, usual, False)
    assert asked == [layers, layers]


def test_who_takes_no_sampled_second_moments(gpt2: ModelHandle, tmp_path: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text", encoding="utf-8")
    given = Rome(moments=GivenMoments({1: gpt2.w_out(1).T}))
    methods: list[Method] = [NoChange(), Leace(), Rome(variant="plain"), given]
    for method in (*methods, Rome(moments=Moments(text=str(text)))):
        assert method.sampled_moments(gpt2, Site(1, "mlp")) is None
    for method in (NoChange(), Leace(), given):
        assert method.with_moments(20, 5) == method

"""The relation nearest to a fact: what erasers are fitted on, and whose other facts should stay."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from palimpsest.ask.inquiry import Inquiry
from palimpsest.cache import cached_tensors
from palimpsest.errors import RequestError, nearest
from palimpsest.evaluate.asking import knows
from palimpsest.facts.atlas import fold
from palimpsest.facts.countries import bare
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import deal, order
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site

LEAST = 5
"""Subjects that an object needs to count as a class, and two classes make a relation."""

DOZENS = 36
"""Facts over which a relation's mean state is taken."""

NEAREST, ELSEWHERE = 6, 6
"""Neighbors of the nearest relation, and of all others, of which each gives one."""

TRIED, TRIED_ELSEWHERE = 16, 6
"""Facts put to the unchanged model to find those that it knows."""


@dataclass(frozen=True)
class Library:
    """The facts that a question is compared with.

    Attributes:
        fit: by relation that can be erased, the facts to fit on, in order.
        rest: by relation, the facts that no fit sees, in order.
    """

    fit: Mapping[str, tuple[Fact, ...]]
    rest: Mapping[str, tuple[Fact, ...]]

    @classmethod
    def read(cls, data: DataSet, seed: int) -> "Library":
        """Deal every relation's facts as a run with this seed deals them.

        Raises:
            RequestError: the data cannot be read as asked.
        """
        data.check()
        sets = list(data.by_relation())
        facts = [fact for each in sets for fact in each.facts]
        named = {fact.relation for fact in facts}
        others = [f for each in sets for f in each.others if f.relation not in named]
        dealt = deal(facts, data.shares, seed)
        fit, rest = _by_relation(_large(dealt["fit"])), [*others]
        rest += [fact for name, members in dealt.items() if name != "fit" for fact in members]
        return cls(
            {name: tuple(islice(order(found, seed), data.fit)) for name, found in fit.items()},
            {name: tuple(order(found, seed)) for name, found in _by_relation(rest).items()},
        )

    def check(self, name: str) -> str:
        """`name` itself, if it is a relation that can be erased.

        Raises:
            RequestError: it is not.
        """
        if name not in self.fit:
            raise RequestError(
                f"expected --relation to be one of {', '.join(sorted(self.fit)) or 'none'} (two "
                f"objects of {LEAST} subjects or more), found {name!r}; {nearest(name, self.fit)}"
            )
        return name

    def sample(self, name: str, subject: str) -> tuple[Fact, ...]:
        """The facts of a relation to fit on; the subject that is asked about is not among them."""
        return tuple(fact for fact in self.fit[name] if not _same(fact.subject, subject))


@dataclass(frozen=True)
class Chosen:
    """The relation taken for nearest.

    Attributes:
        name: the relation's.
        cosines: by relation, the cosine with the asked prompt's state; empty if the user named it.
        site: where the states were compared.
    """

    name: str
    site: Site
    cosines: Mapping[str, float] = field(default_factory=dict)


def choose(model: ModelHandle, library: Library, fact: Fact, site: Site) -> Chosen | None:
    """The relation whose mean state lies in the direction of the asked prompt's.

    States are those of the unchanged model at the prompt's last token. All are centred by the mean
    over relations, which what every prompt shares would else decide. None if there is no relation.
    """
    if not library.fit:
        return None
    names = sorted(library.fit)
    means = torch.stack([_mean(model, library.fit[name][:DOZENS], site) for name in names])
    state = features(model, [model.encode(fact.prompt)], [site], ["last_prompt"])[0, 0, 0]
    centre = means.mean(0)
    cosines = torch.cosine_similarity(means - centre, (state - centre).unsqueeze(0), dim=1).tolist()
    found = dict(zip(names, cosines, strict=True))
    return Chosen(max(found, key=lambda name: found[name]), site, found)


def _mean(model: ModelHandle, facts: Sequence[Fact], site: Site) -> Tensor:
    """Mean state `[d_model]` of facts' prompts at their last token."""

    def make() -> dict[str, Tensor]:
        rows = [model.encode(fact.prompt) for fact in facts]
        return {"mean": features(model, rows, [site], ["last_prompt"])[0, 0].mean(0)}

    key = {
        "model": model.state,
        "prefix": model.prefix,
        "site": [site.layer, site.part],
        "prompts": [fact.prompt.text for fact in facts],
    }
    return cached_tensors("means", key, make)["mean"]


def neighbors(
    model: ModelHandle, library: Library, inquiry: Inquiry, relation: str | None
) -> tuple[Fact, ...]:
    """Facts that the unchanged model knows and that should stay: the user's, then known ones.

    Those whose true object is the old one come first, then those of the nearest relation, then some
    of every other.
    """
    subject = inquiry.fact.subject
    rest = {
        name: [
            f for f in facts if not _same(f.subject, subject) and f.prompt != inquiry.fact.prompt
        ]
        for name, facts in library.rest.items()
    }
    old = [f for facts in rest.values() for f in facts if fold(f.true) == fold(inquiry.old)]
    close = [*old, *(fact for fact in rest.get(relation or "", ()) if fact not in old)][:TRIED]
    apart = [
        [fact for fact in rest[name] if fact not in close][:TRIED_ELSEWHERE]
        for name in sorted(rest.keys() - {relation})
    ]
    asked = [*close, *(fact for facts in apart for fact in facts)]
    known = {fact.id for fact, hit in zip(asked, knows(model, asked), strict=True) if hit}
    found = [fact for fact in close if fact.id in known]
    firsts = [next((fact for fact in facts if fact.id in known), None) for facts in apart]
    others = [fact for fact in firsts if fact is not None]
    return (*inquiry.neighbors, *found[:NEAREST], *others[:ELSEWHERE])


def _large(facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose object has enough subjects, of relations with two such objects or more."""
    sizes = Counter((fact.relation, fact.true) for fact in facts)
    classes = Counter(relation for (relation, _), size in sizes.items() if size >= LEAST)
    return [
        fact
        for fact in facts
        if sizes[fact.relation, fact.true] >= LEAST and classes[fact.relation] >= 2
    ]


def _by_relation(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        found[fact.relation].append(fact)
    return found


def _same(one: str, other: str) -> bool:
    """Whether two names are one subject's, written with or without an article."""
    return fold(bare(one)) == fold(bare(other))

"""Which facts are changed, tested on, fitted on: dealt by subject, before any model is asked."""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice

from palimpsest.errors import RequestError, check_seed
from palimpsest.facts.dataset import SPLITS, DataSet
from palimpsest.facts.fact import Fact, FactSet

Known = Callable[[Sequence[Fact]], Sequence[bool]]
"""Answers, for each of some facts, whether the unchanged model knows it."""

CHUNK = 32
"""Facts put to the model in one call of `known`."""


@dataclass(frozen=True)
class Splits:
    """The facts of one run. No (relation, subject) is in two of the first five.

    Attributes:
        target: facts that every method must change; known, with a new object.
        test: known facts of the same relations that no fit sees.
        fit: facts for statistics; true labels only.
        probe: facts to train probes on; true labels only.
        dev: known facts for choices such as a layer.
        others: known facts of other relations.
        kept: facts of other relations about subjects that `others` does not ask of, for a fit that
            is to spare them; true labels only.
        classes: by relation, the distinct true objects of all its facts, sorted.
        counts: the data set's own counts, then for each split S: `S_dealt` (subjects that fell to
            it), `S_wanted` (the size asked for), where the model is asked `S_tried` (facts put to
            it, in order, until enough were found) and `S_known` (those of them that it knows),
            and `S_taken` (facts in the split); of `kept` that alone.
    """

    target: tuple[Fact, ...]
    test: tuple[Fact, ...]
    fit: tuple[Fact, ...]
    probe: tuple[Fact, ...]
    dev: tuple[Fact, ...]
    others: tuple[Fact, ...] = ()
    kept: tuple[Fact, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of facts by split."""
        return {name: len(getattr(self, name)) for name in (*SPLITS, "others", "kept")}


def split(facts: FactSet, plan: DataSet, seed: int, known: Known) -> Splits:
    """Deal subjects to splits by a seeded hash, order them, and keep what the model must know.

    A subject's split and its place there depend on the seed, the relation, the subject and the
    shares, never on sizes: asking for more facts only extends a split. Within a split, relations
    take turns, and within a relation its classes do. Target, test, dev and others hold only facts
    for which `known` is true; the result is that of filtering everything and then truncating, but
    `known` is called with few facts at a time and no oftener than needed.

    Args:
        facts: one fact per (relation, subject), with unique ids.
        plan: sizes and shares.
        seed: of every hash.
        known: whether the unchanged model knows each fact.

    Raises:
        RequestError: sizes or shares are unusable, no target fact is left, or a target fact needs
            a new object and its relation has only one class.
    """
    plan.check()
    counts = dict(facts.counts)
    pools = deal(facts.facts, plan.shares, seed) | {"others": facts.others}
    taken: dict[str, tuple[Fact, ...]] = {}
    for name, size in plan.sizes().items():
        asked = None if name in ("fit", "probe") else known
        taken[name] = _take(name, pools[name], size, seed, asked, counts)
    if not taken["target"]:
        raise _no_target(facts, counts)
    classes = {name: facts.objects(name) for name in sorted({f.relation for f in facts.facts})}
    kept = _rest(facts.others, taken["others"], plan.fit, seed)
    counts["kept_taken"] = len(kept)
    found = Splits(**taken, kept=kept, classes=classes, counts=counts)
    return replace(found, target=_to_be_changed(found.target, found, plan, seed))


def on_dev(facts: Splits, plan: DataSet, seed: int) -> Splits:
    """The same splits with the dev facts for targets, given new objects and neighbors alike.

    Raises:
        RequestError: a dev fact needs a new object and its relation has only one class.
    """
    return replace(facts, target=_to_be_changed(facts.dev, facts, plan, seed), dev=())


def with_targets(facts: Splits, some: Sequence[Fact], seed: int) -> Splits:
    """The same splits with facts of an attacker's own for targets, given new objects alike.

    Raises:
        RequestError: a fact needs a new object and its relation has only one class.
    """
    return replace(facts, target=tuple(_with_new(f, facts.classes[f.relation], seed) for f in some))


def _to_be_changed(
    some: Sequence[Fact], facts: Splits, plan: DataSet, seed: int
) -> tuple[Fact, ...]:
    """Facts with new objects and neighbors."""
    return tuple(
        _with_neighbors(_with_new(fact, facts.classes[fact.relation], seed), facts.test, plan, seed)
        for fact in some
    )


def deal(
    facts: Iterable[Fact], shares: Mapping[str, float], seed: int
) -> dict[str, tuple[Fact, ...]]:
    """Put each fact into the split that its relation and subject hash to.

    Args:
        facts: in any order.
        shares: by split of `SPLITS`, fractions that sum to 1.
        seed: of the hash.

    Returns:
        By split, its facts in the order given.

    Raises:
        RequestError: the seed is out of range.
    """
    check_seed("seed", seed)
    edges = list(accumulate(shares[name] for name in SPLITS))
    dealt: dict[str, list[Fact]] = {name: [] for name in SPLITS}
    for fact in facts:
        # Scaled by the last edge, which rounding may leave below 1, so that none lies above it.
        u = uniform(seed, "split", fact.relation, fact.subject) * edges[-1]
        dealt[next(name for name, edge in zip(SPLITS, edges, strict=True) if u < edge)].append(fact)
    return {name: tuple(members) for name, members in dealt.items()}


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that is uniform over keys: 53 bits of the key's SHA-256."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def interleave(streams: Iterable[Iterator[Fact]]) -> Iterator[Fact]:
    """One fact of each stream in turn, until all are exhausted; pulls nothing ahead of need."""
    waiting = deque(streams)
    while waiting:
        stream = waiting.popleft()
        for fact in islice(stream, 1):
            yield fact
            waiting.append(stream)


def order(
    facts: Iterable[Fact], seed: int, keep: Callable[[Fact], bool] | None = None
) -> Iterator[Fact]:
    """The facts that `keep` accepts: relations take turns, and within each its classes do.

    Relations, classes and the facts of a class each come in the order of a seeded hash. `keep` is
    called only as the iterator advances.
    """
    tree: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in facts:
        tree[fact.relation][fact.true].append(fact)
    relations = sorted(tree, key=lambda relation: uniform(seed, "relation", relation))
    return interleave([_relation_order(tree[relation], seed, keep) for relation in relations])


def _relation_order(
    classes: Mapping[str, list[Fact]], seed: int, keep: Callable[[Fact], bool] | None
) -> Iterator[Fact]:
    """The facts of one relation, its classes taking turns."""
    streams = []
    for true in sorted(classes, key=lambda true: uniform(seed, "class", true)):
        members = sorted(
            classes[true], key=lambda fact: uniform(seed, "fact", fact.relation, fact.subject)
        )
        streams.append(filter(keep, members) if keep else iter(members))
    return interleave(streams)


class _Knowledge:
    """Remembers what `known` said, and asks it about the next facts in line, a chunk at a time."""

    def __init__(self, known: Known, line: Iterable[Fact]) -> None:
        self._known = known
        self._line = {fact.id: fact for fact in line}
        self.answers: dict[str, bool] = {}

    def __call__(self, fact: Fact) -> bool:
        if fact.id not in self.answers:
            del self._line[fact.id]
            chunk = [fact, *islice(self._line.values(), CHUNK - 1)]
            for asked, answer in zip(chunk, self._known(chunk), strict=True):
                self.answers[asked.id] = bool(answer)
                self._line.pop(asked.id, None)
        return self.answers[fact.id]


def _take(
    name: str,
    pool: Sequence[Fact],
    size: int,
    seed: int,
    known: Known | None,
    counts: dict[str, int],
) -> tuple[Fact, ...]:
    """The first `size` facts of `pool` (only `known` ones, if it is given); adds to `counts`."""
    counts[f"{name}_dealt"] = len(pool)
    counts[f"{name}_wanted"] = size
    if known is None:
        taken = tuple(islice(order(pool, seed), size))
    else:
        knows = _Knowledge(known, order(pool, seed))
        taken = tuple(islice(order(pool, seed, knows), size))
        counts[f"{name}_tried"] = len(knows.answers)
        counts[f"{name}_known"] = sum(knows.answers.values())
    counts[f"{name}_taken"] = len(taken)
    return taken


def _rest(pool: Sequence[Fact], taken: Sequence[Fact], size: int, seed: int) -> tuple[Fact, ...]:
    """The first `size` facts of a pool about subjects of which nothing was taken."""
    asked = {fact.subject for fact in taken}
    return tuple(islice(order([f for f in pool if f.subject not in asked], seed), size))


def _no_target(facts: FactSet, counts: Mapping[str, int]) -> RequestError:
    return RequestError(
        f"expected at least one target fact that the model knows, found 0 of "
        f"{counts['target_dealt']} dealt from the {len(facts.facts)} facts of {facts.name}; choose "
        "another model, more facts, a larger facts.shares.target or another seed"
    )


def _with_new(fact: Fact, classes: Sequence[str], seed: int) -> Fact:
    """Give a fact that has no new object one of the relation's other classes, uniformly.

    The draw depends on the seed and the fact's id, so which of the others it is tells nothing of
    the old object.
    """
    if fact.new is not None:
        return fact
    others = [name for name in classes if name != fact.true]
    if not others:
        raise RequestError(
            f"expected at least two classes to draw a new object from, found only {fact.true!r} "
            f"in relation {fact.relation!r}; use facts of more classes"
        )
    return fact.replacing(others[int(uniform(seed, "new", fact.id) * len(others))])


def _with_neighbors(fact: Fact, test: Sequence[Fact], plan: DataSet, seed: int) -> Fact:
    """Give a fact that has no neighbors the prompts of test facts with its relation and object."""
    if fact.neighbors:
        return fact
    same = [f for f in test if (f.relation, f.true) == (fact.relation, fact.true)]
    same.sort(key=lambda other: uniform(seed, "neighbor", fact.id, other.id))
    prompts = [replace(f.prompt, id=f"neighbor/{i}") for i, f in enumerate(same[: plan.neighbors])]
    return replace(fact, neighbors=tuple(prompts))

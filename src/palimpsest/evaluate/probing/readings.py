"""The rows of probes: what each reads of the facts' objects, and what that is worth."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, log2, nan
from typing import cast

from torch import Tensor

from palimpsest.evaluate.probing.information import pointwise
from palimpsest.evaluate.probing.probes import Probe
from palimpsest.evaluate.probing.training import KINDS, Kit, Where, control
from palimpsest.facts.fact import Fact
from palimpsest.model.site import Change
from palimpsest.record.row import UPSTREAM, Row

NOT_FINITE = "the model's states are not finite"
"""Why nothing can be read off a ruined model."""

UNSEEN = "no training subject has its object"
AT_THE_EDGE = "the least or the largest of the strengths tried: a further one may be better"
NOT_CHOSEN = "not chosen: fewer than two dev facts whose object a probe subject has"


def labelled(rows: Iterable[Row], change: Change, coinciding: Collection[str]) -> Iterator[Row]:
    """The rows, with a note where a value is read that the change cannot have reached.

    Args:
        rows: of this axis; baselines stay as they are.
        change: of the model.
        coinciding: ids of the facts whose prompt ends with its subject.
    """
    for row in rows:
        of_a_state = None not in (row.value, row.layer) and row.metric != "probe_baseline"
        where = cast(Where, (row.layer, row.position))
        coincide = bool(coinciding) if row.fact_id is None else row.fact_id in coinciding
        reached = not of_a_state or change.reaches(*where, coincide)
        yield row if reached else replace(row, note=UPSTREAM)


def at(row: partial[Row], where: Where) -> partial[Row]:
    """The row with its layer and position."""
    return partial(row, layer=where[0], position=where[1])


def strength_row(
    row: partial[Row], protocol: str, strengths: Sequence[float], strength: float, judges: int
) -> Row:
    """`probe_strength`: which C the dev facts chose, and whether a further one might be better.

    Args:
        row: of everything else.
        protocol: of the probes.
        strengths: that were tried.
        strength: the chosen one.
        judges: dev facts that chose it.
    """
    row = partial(row, metric="probe_strength", protocol=protocol, split="dev")
    at_the_edge = len(strengths) > 2 and strength in (min(strengths), max(strengths))
    note = (AT_THE_EDGE if at_the_edge else None) if judges else NOT_CHOSEN
    return row(value=strength, n=max(judges, 1), note=note)


def judge(
    place: partial[Row], protocol: str, facts: Sequence[Fact], states: Tensor, probe: Probe
) -> Iterator[Row]:
    """`probe_accuracy`: whether the probe names a fact's true object, if it knows it at all.

    The fact's new object is no answer: that a change put it there does not hide the true one.
    """
    place = partial(place, metric="probe_accuracy", protocol=protocol)
    for fact, guess in zip(facts, probe.predict(states, barred(facts)), strict=True):
        if fact.true not in probe.classes:
            yield from lost(place, [fact], UNSEEN)
        elif guess is None:
            yield from lost(place, [fact], NOT_FINITE)
        else:
            hit = float(guess == fact.true)
            yield place(fact_id=fact.id, prompt_id=fact.prompt.id, value=hit)


def barred(facts: Sequence[Fact]) -> list[str | None]:
    """The object of each fact that a probe may not name: its new one."""
    return [fact.new for fact in facts]


def lost(place: partial[Row], facts: Sequence[Fact], cause: str) -> Iterator[Row]:
    """Nulls with their cause, one a fact."""
    for fact in facts:
        yield place(fact_id=fact.id, prompt_id=fact.prompt.id, value=None, n=0, note=cause)


def accuracies(
    row: partial[Row],
    protocol: str,
    kit: Kit,
    facts: Sequence[Fact],
    states: Mapping[Where, Tensor],
) -> Iterator[Row]:
    """What every probe of a kit reads at every place."""
    for where, found in states.items():
        for kind, probe in kit.readers[where].probes.items():
            yield from judge(at(row, where), protocol + KINDS[kind], facts, found, probe)


def informations(
    row: partial[Row],
    protocol: str,
    kit: Kit,
    facts: Sequence[Fact],
    states: Mapping[Where, Tensor],
) -> Iterator[Row]:
    """`v_information`: bits that the linear probe gains on the class frequencies, one a fact."""
    row = partial(row, metric="v_information", protocol=protocol)
    known = [n for n, fact in enumerate(facts) if fact.true in kit.labels]
    unknown = [fact for fact in facts if fact.true not in kit.labels]
    for where, found in states.items():
        place, probe = at(row, where), kit.readers[where].probes["linear"]
        told = pointwise(probe, found[known], [facts[n].true for n in known], kit.labels)
        yield from lost(place, unknown, UNSEEN)
        for n, bits in zip(known, told.tolist(), strict=True):
            if isfinite(bits):
                yield place(fact_id=facts[n].id, prompt_id=facts[n].prompt.id, value=bits)
            else:
                yield from lost(place, [facts[n]], NOT_FINITE)


def selectivities(
    row: partial[Row],
    protocol: str,
    kit: Kit,
    facts: Sequence[Fact],
    states: Mapping[Where, Tensor],
    seed: int,
) -> Iterator[Row]:
    """`probe_selectivity` on test facts and `probe_capacity` on probe subjects, by place."""
    known = [n for n, fact in enumerate(facts) if fact.true in kit.labels]
    truth = [facts[n].true for n in known]
    labels = [control(facts[n], kit.labels, seed) for n in known]
    for where, found in states.items():
        reader = kit.readers[where]
        for kind, probe in reader.probes.items():
            place = partial(at(row, where), protocol=protocol + KINDS[kind])
            hits = _share(probe, found[known], truth)
            chance = _share(reader.controls[kind], found[known], labels)
            cause = NOT_FINITE if known else UNSEEN
            of_test = partial(place, metric="probe_selectivity", split="test")
            yield _valued(of_test, hits - chance, len(known), cause)
            of_probe = partial(place, metric="probe_capacity", split="probe")
            capacity = _valued(of_probe, reader.capacity[kind], len(kit.labels), NOT_FINITE)
            frozen = protocol == "frozen" and capacity.value is not None
            yield replace(capacity, note=UPSTREAM) if frozen else capacity


def codes(row: partial[Row], kit: Kit) -> Iterator[Row]:
    """`mdl_bits` and `mdl_compression` of the probe subjects' labels, by place."""
    row = partial(row, protocol="online_code", split="probe")
    n = len(kit.labels)
    uniform = n * log2(len(set(kit.labels)))
    for where, reader in kit.readers.items():
        place = at(row, where)
        yield _valued(partial(place, metric="mdl_bits"), reader.bits, n, NOT_FINITE)
        ratio = uniform / reader.bits
        yield _valued(partial(place, metric="mdl_compression"), ratio, n, NOT_FINITE)


def undefined(row: partial[Row], kit: Kit, cause: str) -> Iterator[Row]:
    """Nulls in place of all that only retrained probes tell, by place."""
    row = partial(row, value=None, n=0, note=cause)
    for where, reader in kit.readers.items():
        place = at(row, where)
        for kind in reader.probes:
            told = partial(place, protocol="retrained" + KINDS[kind])
            yield told(metric="probe_accuracy", split="test")
            yield told(metric="probe_selectivity", split="test")
            yield told(metric="probe_capacity", split="probe")


def _valued(place: partial[Row], value: float, n: int, cause: str) -> Row:
    """The row; null with the cause if the value is not finite."""
    if not isfinite(value):
        return place(value=None, n=0, note=cause)
    return place(value=value, n=n)


def _share(probe: Probe, states: Tensor, labels: Sequence[str]) -> float:
    """The share of labels that the probe names; NaN if a state is not finite, or of none."""
    guesses = probe.predict(states)
    if not guesses or None in guesses:
        return nan
    return sum(a == b for a, b in zip(guesses, labels, strict=True)) / len(labels)


def baselines(
    row: partial[Row], kit: Kit, facts: Sequence[Fact], states: Mapping[Where, Tensor]
) -> Iterator[Row]:
    """`probe_baseline`: what probes with permuted labels achieve on facts."""
    for where, found in states.items():
        for kind, probe in kit.readers[where].controls.items():
            place = partial(at(row, where), protocol="shuffled" + KINDS[kind])
            yield baseline(place, facts, probe.predict(found, barred(facts)))


def baseline(row: partial[Row], facts: Sequence[Fact], guesses: Sequence[str | None]) -> Row:
    """The share of facts whose object was guessed."""
    row = partial(row, metric="probe_baseline")
    if None in guesses:
        return row(value=None, n=0, note=NOT_FINITE)
    hits = sum(guess == fact.true for guess, fact in zip(guesses, facts, strict=True))
    return row(value=hits / len(facts), n=len(facts))

"""Which of a data set's relations are used; the facts of those left out serve as others."""

from collections.abc import Sequence
from pathlib import Path

from palimpsest.errors import RequestError, nearest
from palimpsest.facts.fact import Fact


def select(
    facts: Sequence[Fact], relations: Sequence[str], path: Path
) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Divide facts into those of `relations`, or all if it names none, and the rest.

    Args:
        facts: of all relations.
        relations: what `facts.relations` holds.
        path: where the facts come from, for the message.

    Raises:
        RequestError: a relation that no fact has.
    """
    present = {fact.relation for fact in facts}
    for relation in relations:
        if relation not in present:
            raise RequestError(
                f"expected relation ids that occur in {path}, found {relation!r} in "
                f"facts.relations; {nearest(relation, present)}"
            )
    chosen = set(relations) or present
    return (
        tuple(fact for fact in facts if fact.relation in chosen),
        tuple(fact for fact in facts if fact.relation not in chosen),
    )

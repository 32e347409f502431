"""Position groups of causal tracing (Meng et al. 2022, arXiv 2202.05262, figure 2)."""

from typing import Literal, get_args

from palimpsest.model.tokens import Tokens

Group = Literal[
    "first_subject",
    "middle_subject",
    "last_subject",
    "first_subsequent",
    "further",
    "last_prompt",
]
"""Where a token stands in its prompt. A subject of one token is its last; a subject that ends the
prompt has nothing after it."""

GROUPS: tuple[Group, ...] = get_args(Group)
"""All of them, in the order of reading."""


def group_of(row: Tokens, place: int) -> Group:
    """The group of a token of a prompt, from its subject on.

    Raises:
        ValueError: the token comes before the subject, or there is none.
    """
    if row.subject is None or not row.subject[0] <= place < row.prompt:
        raise ValueError("expected a token from the subject on")
    first, last = row.subject
    if place <= last:
        if place == last:
            return "last_subject"
        return "first_subject" if place == first else "middle_subject"
    if place == row.prompt - 1:
        return "last_prompt"
    return "first_subsequent" if place == last + 1 else "further"


def places(row: Tokens) -> dict[Group, int]:
    """One token of each group that a prompt has, the middle one of several.

    Raises:
        ValueError: the prompt holds no subject.
    """
    found: dict[Group, list[int]] = {}
    first = -1 if row.subject is None else row.subject[0]
    for place in range(first, row.prompt):
        found.setdefault(group_of(row, place), []).append(place)
    return {group: several[len(several) // 2] for group, several in found.items()}

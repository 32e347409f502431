"""Where something is read or changed: a layer, a part of the block, a position policy."""

from dataclasses import dataclass
from typing import Literal, get_args

from palimpsest.errors import RequestError, nearest

Part = Literal["residual", "mlp", "attention"]
"""`residual`: a block's output. `mlp`: the output of W_out. `attention`: what attention adds."""

Position = Literal["last_subject", "last_prompt"]
"""One token of a prompt: the subject's last, or the prompt's last."""

Policy = Literal["last_subject", "last_prompt", "all_but_sink", "all"]
"""Which tokens a change acts on; `all_but_sink` leaves out position 0."""

ORACLE_POLICIES: tuple[Policy, ...] = ("last_subject", "last_prompt")
"""Policies that know where the subject or the prompt ends, which no deployed eraser would."""

EMBEDDING = -1
"""The layer index that stands for the embedding output, before the first block."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the network: the output of `part` in block `layer` (counted from 0)."""

    layer: int
    part: Part = "residual"


@dataclass(frozen=True, slots=True)
class Change:
    """What the ruler may know of a change: where it begins and whose it is. Never the method.

    Attributes:
        scope: `fact` if it means to change the target facts only, `relation` if all subjects.
        independent: each fact has its own change, felt by that fact's prompts alone.
        layer: the first block whose output differs; None if nothing is changed.
        part: where in that block.
        policy: the tokens that the change acts on.
    """

    scope: Literal["fact", "relation"]
    independent: bool
    layer: int | None
    part: Part = "mlp"
    policy: Policy = "all"

    def reaches(self, layer: int, position: Position) -> bool:
        """Whether the state after block `layer` at `position` can differ from the unchanged one.

        A change on the prompt's last token only cannot reach the subject's last token, which comes
        before it in every prompt that goes on after its subject.
        """
        if self.layer is None or layer < self.layer:
            return False
        return not (self.policy == "last_prompt" and position == "last_subject")


def check_choice(kind: str, value: str, choices: object) -> None:
    """Refuse a string that is none of a Literal's values.

    Raises:
        RequestError: names the kind, what was found and the nearest valid value.
    """
    valid = get_args(choices)
    if value not in valid:
        raise RequestError(
            f"expected {kind} to be one of {', '.join(valid)}, found {value!r}; "
            f"{nearest(value, valid)}"
        )

"""Where something is read or changed: a layer, a part of the block, a position policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from palimpsest.errors import RequestError, nearest

Part = Literal["residual", "mlp", "attention", "attention_norm", "mlp_norm"]
"""`residual`: a block's output. `mlp`: the output of W_out. `attention`: what attention adds.
`attention_norm`, `mlp_norm`: what the norm in front of attention, or of the MLP, gives it to read.
"""

NORMS: tuple[Part, ...] = ("attention_norm", "mlp_norm")
"""Parts that are outputs of norms."""

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
    """A place in the network: the output of a part of a block, `[n, t, d]` in a forward pass.

    Attributes:
        layer: the block, counted from 0; `EMBEDDING` for what goes into the first one.
        part: `residual` (the block's output), `mlp`, `attention`, `attention_norm` or `mlp_norm`.
    """

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
        gated: it acts only in prompts that hold a target subject.
        failed: by fact id, why the method could not change that fact: nothing was done for it, and
            what is measured of it is null.
        fitted_on: splits whose facts a change of a whole relation was fitted on: of these it is
            told how well the fit worked, never what can still be read.
    """

    scope: Literal["fact", "relation"]
    independent: bool
    layer: int | None
    part: Part = "mlp"
    policy: Policy = "all"
    gated: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)
    fitted_on: tuple[str, ...] = ()

    @property
    def oracle(self) -> bool:
        """Whether it knows whose prompt it is, or where the prompt or its subject ends."""
        return self.gated or self.policy in ORACLE_POLICIES

    def reaches(self, layer: int, position: Position, coincide: bool = False) -> bool:
        """Whether the state after block `layer` at `position` can differ from the unchanged one.

        A change on the prompt's last token only cannot reach the subject's last token where that
        comes before it.

        Args:
            layer: counted from 0.
            position: of the token whose state it is.
            coincide: the subject's last token is the prompt's last token.
        """
        if self.layer is None or layer < self.layer:
            return False
        return coincide or not (self.policy == "last_prompt" and position == "last_subject")


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

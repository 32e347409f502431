"""Row: one measured value, tidy. The columns are a contract that other programs read."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["downstream", "recoverability", "consistency", "localization", "cost"]
"""What a value says something about."""

Scope = Literal["fact", "relation"]
"""Whether a change means the target facts alone, or all subjects of a relation."""

UPSTREAM = "unchanged by construction"
"""In the note of a value that was read where the change cannot reach."""

IN_SAMPLE = "fit_sample"
"""Split of rows about target facts that a relation-wide method was fitted on."""

SCHEMA_VERSION = 2
"""Version of the results schema; part of every run_id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One value. All but `value`, `n` and `note` form the unique key.

    Attributes:
        fact_id: the fact that the value belongs to; None when it is no single fact's.
        relation: relation id; None when the value spans relations.
        split: `target`, `test`, `fit`, `probe`, `dev`, `others` and `kept` (facts of other
            relations), `fit_sample` (see `IN_SAMPLE`), or None (held-out text, say).
        scope: what the method changed: `fact` (its own facts) or `relation` (all subjects).
        axis: the panel that the metric belongs to.
        metric: the metric's name, e.g. `efficacy`.
        protocol: the exact definition, documented under this name in docs/metrics.md.
        prompt_id: the prompt within the fact; None for a value over several prompts.
        layer: index of the block after which the state was read; -1 is the embedding output.
        position: `last_subject` or `last_prompt`; None where it does not apply.
        step: edits so far, relearning steps; None where it does not apply.
        budget: number of guesses an attack may make; None where it does not apply.
        value: the number; None with the cause in `note`.
        n: how many observations the value is over.
        note: free text: the cause of a missing value, `oracle_gate`, `unchanged by construction`.
    """

    scope: Scope
    axis: Axis
    metric: str
    protocol: str
    value: float | None
    n: int = 1
    fact_id: str | None = None
    relation: str | None = None
    split: str | None = None
    prompt_id: str | None = None
    layer: int | None = None
    position: str | None = None
    step: int | None = None
    budget: int | None = None
    note: str | None = None

    @property
    def upstream(self) -> bool:
        """Whether it was read where the change cannot reach."""
        return self.note is not None and UPSTREAM in self.note

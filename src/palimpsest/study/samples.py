"""Rows become samples in SQL: one value a fact, for many runs and quantities at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from palimpsest.record.results import Results, sql_text
from palimpsest.record.row import UPSTREAM
from palimpsest.study.comparable import compared
from palimpsest.study.intervals import Estimate, Sample, estimates

Key = tuple[Any, ...]
"""A run's id, and then what tells quantities apart."""

SHARES = (
    *("efficacy", "paraphrase", "neighborhood", "suppression"),
    *("relation_accuracy", "other_accuracy", "probe_accuracy"),
    *("attack_success", "attack_baseline", "inversion_success", "inversion_baseline"),
    *("inversion_rank", "relearned_old", "relearned_test", "compressed_old", "compressed_other"),
    *("legibility_old", "legibility_new", "agreement", "agreement_correct"),
    *("twohop_new", "twohop_old", "twohop_neither"),
)
"""Metrics whose values are hits, or shares of hits. Others are, if they are 0 here and 1 there."""


def samples(
    results: Results, found: str, by: Sequence[str] = (), over: Sequence[str] | None = None
) -> dict[Key, Sample]:
    """The samples of the quantities that a query finds rows of.

    Of rows with steps those without a step count, else those of the last one.

    Args:
        results: the runs.
        found: SQL that gives `run_id`, the columns of `by`, `step`, `fact_id`, `relation`, `value`,
            `n`, `note`, `measure`, `alike`, `share` and `counts` (a row that does not count says
            only which step is the last). `picked` makes such a query.
        by: the columns that tell quantities apart.
        over: the columns that tell apart what has last steps of its own; by default as `by`.

    Returns:
        by run id and the values of `by`, in their order.
    """
    compared(results)
    over = by if over is None else over
    own, wide = _listed(by), _listed(over)
    records = results.query(
        _SAMPLES.format(
            found=found,
            own=own,
            wide=wide,
            whole=_listed(by, "whole."),
            ends_of=_same(["run_id", *over]),
            facts_of=_same(["run_id", *by], "whole", "facts"),
            upstream=sql_text(UPSTREAM),
        )
    )
    width, pool = 1 + len(by), _Pool()
    return {record[:width]: _sample(pool, *record[width:]) for record in records}


_SAMPLES = """WITH found AS ({found}),
ends AS (
    SELECT run_id{wide}, CASE WHEN count(*) = count(step) THEN max(step) END AS ending
    FROM found GROUP BY ALL
),
kept AS (
    SELECT found.* FROM found JOIN ends ON {ends_of}
    WHERE counts AND found.step IS NOT DISTINCT FROM ending
),
means AS (
    SELECT run_id{own}, fact_id, max(relation) AS relation, avg(value) AS mean FROM kept
    WHERE fact_id IS NOT NULL AND value IS NOT NULL GROUP BY ALL
),
facts AS (
    SELECT run_id{own}, list(mean ORDER BY fact_id) AS means,
        list(fact_id ORDER BY fact_id) AS ids, list(relation ORDER BY fact_id) AS relations
    FROM means GROUP BY ALL
),
whole AS (
    SELECT run_id{own}, count(*) AS asked, count(value) AS present,
        sum(value * greatest(n, 1)) AS total,
        sum(greatest(n, 1)) FILTER (value IS NOT NULL) AS weight,
        list(DISTINCT coalesce(nullif(note, ''), 'no cause given'))
            FILTER (value IS NULL) AS causes,
        bool_and(contains(coalesce(note, ''), {upstream}))
            FILTER (value IS NOT NULL) AS upstream,
        list(DISTINCT measure) FILTER (NOT alike) AS unlike,
        bool_and(share) OR (bool_and(value IN (0, 1)) AND min(value) < max(value)) AS hits
    FROM kept GROUP BY ALL
)
SELECT whole.run_id{whole}, means, ids, relations, asked, present, total,
    weight, causes, upstream, unlike, hits
FROM whole LEFT JOIN facts ON {facts_of}
ORDER BY ALL"""
"""A record for each sample. `found`, `own` and so on are filled in."""


def picked(condition: str, *columns: str, counts: str = "true") -> str:
    """A query for `samples`: the comparable rows that meet a condition.

    Args:
        condition: SQL.
        columns: those of `by` and `over`, as SQL.
        counts: SQL that says which rows count.
    """
    named = "".join(f", {column}" for column in columns if column != "step")
    return (
        f"SELECT run_id{named}, step, fact_id, relation, value, n, note, measure, alike, "
        f"compared.metric IN {SHARES!r} AS share, {counts} AS counts "
        f"FROM compared WHERE {condition}"
    )


def measured(
    results: Results, condition: str, by: Sequence[str] = (), over: Sequence[str] | None = None
) -> dict[Key, Estimate]:
    """The estimates of the quantities whose rows meet a condition; see `samples`."""
    columns = dict.fromkeys([*by, *(over or ())])
    return estimates(samples(results, picked(condition, *columns), by, over))


def _listed(columns: Sequence[str], of: str = "") -> str:
    return "".join(f", {of}{column}" for column in columns)


def _same(columns: Sequence[str], one: str = "found", other: str = "ends") -> str:
    return " AND ".join(f"{one}.{c} IS NOT DISTINCT FROM {other}.{c}" for c in columns)


class _Pool:
    """Equal tuples become one: most quantities are over the same facts."""

    def __init__(self) -> None:
        self._held: dict[Key, Key] = {}

    def __call__(self, some: Sequence[Any] | None) -> Key:
        found = tuple(some or ())
        return self._held.setdefault(found, found)


def _sample(
    pool: _Pool,
    means: list[float] | None,
    facts: list[str] | None,
    relations: list[str | None] | None,
    asked: int,
    present: int,
    total: float | None,
    weight: float | None,
    causes: list[str] | None,
    upstream: bool | None,
    unlike: list[str] | None,
    hits: bool | None,
) -> Sample:
    return Sample(
        values=np.array(means or [], dtype=np.float64),
        facts=pool(facts),
        relations=pool(relations),
        aggregate=(total / weight, int(weight)) if total is not None and weight else None,
        asked=asked,
        present=present,
        causes=tuple(sorted(causes or ())),
        upstream=True if upstream is None else upstream,
        unlike=tuple(sorted(unlike or ())),
        kind="share" if hits else "number",
    )

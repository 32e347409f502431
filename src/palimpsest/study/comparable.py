"""What may be compared with what: runs by their model, facts and seed; values by their measure.

Two values are comparable if their measure's key, their metric and their protocol are equal, and the
runs' models, facts, splits and seeds are.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from palimpsest.record.results import Results, Run, sql_text

Measured = Sequence[tuple[str, str, str, int]]
"""A run's id, a measure's name and key, and how many rows it has of them."""


def model_of(run: Run) -> tuple[Any, ...]:
    """What two runs about the same model share: its fingerprint, and the prefix of its prompts."""
    model = run.run.get("model") or {}
    return model.get("fingerprint"), _config(run, "model").get("prefix")


def asked(run: Run) -> tuple[Any, ...]:
    """What two runs must share to be compared, as far as run.json tells it.

    The model, the facts, how they are split, and the seed. The ruler is not among them: each value
    says by itself how it was measured.
    """
    facts = run.run.get("facts") or {}
    plan = {name: value for name, value in _config(run, "facts").items() if name != "path"}
    splits = json.dumps(plan, sort_keys=True, default=repr)
    return (*model_of(run), facts.get("fingerprint"), splits, run.run.get("seed"))


def alike(results: Results, reference: Run) -> set[str]:
    """The ids of the runs that may be compared with one of them, itself included.

    They were asked the same, and measured the same target facts.
    """
    records = results.query(
        "SELECT run_id, list(DISTINCT fact_id) FROM rows WHERE split = 'target' GROUP BY ALL"
    )
    targets = {run_id: frozenset(facts) for run_id, facts in records}
    own = targets.get(reference.run_id)
    return {
        run.run_id
        for run in results.runs
        if asked(run) == asked(reference) and targets.get(run.run_id) == own
    }


def chosen_keys(measured: Measured) -> dict[str, str]:
    """For each measure the key by which values of a directory are compared.

    The key that most runs share; of several the one with most rows, then the smallest.
    """
    runs: dict[str, Counter[str]] = {}
    rows: dict[str, Counter[str]] = {}
    for _, measure, key, count in measured:
        runs.setdefault(measure, Counter())[key] += 1
        rows.setdefault(measure, Counter())[key] += count
    return {
        measure: min(keys, key=lambda key: (-keys[key], -rows[measure][key], key))
        for measure, keys in runs.items()
    }


def shown_keys(measured: Measured) -> dict[tuple[str, str], str]:
    """By run and measure, the key whose rows are shown: the chosen one, else its own.

    Of several of its own the one with most rows, then the smallest.
    """
    chosen = chosen_keys(measured)
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for run_id, measure, key, count in measured:
        counts.setdefault((run_id, measure), {})[key] = count
    return {
        (run_id, measure): chosen[measure]
        if chosen[measure] in keys
        else min(keys, key=lambda key: (-keys[key], key))
        for (run_id, measure), keys in counts.items()
    }


@lru_cache(maxsize=2)
def compared(results: Results) -> str:
    """Makes the relation `compared`: `rows` of one key a measure and run, and the column `alike`.

    `alike` says whether a row's key is the one that is chosen for its measure. Of a run that was
    measured further there are then no two rows of a metric by different rulers.

    Returns:
        its name.
    """
    measured = results.query(
        "SELECT run_id, measure, measure_key, count(*) FROM rows GROUP BY ALL ORDER BY ALL"
    )
    chosen, shown = chosen_keys(measured), shown_keys(measured)
    if len(measured) == len(shown) and all(chosen[m] == key for (_, m), key in shown.items()):
        results.query("CREATE OR REPLACE VIEW compared AS SELECT *, true AS alike FROM rows")
        return "compared"
    kept = _values(shown, chosen)
    results.query(
        f"CREATE OR REPLACE TABLE picked AS SELECT * FROM (VALUES {kept}) "
        "AS v (run_id, measure, measure_key, alike)"
    )
    results.query(
        "CREATE OR REPLACE VIEW compared AS SELECT rows.*, alike FROM rows "
        "JOIN picked USING (run_id, measure, measure_key)"
    )
    return "compared"


def _values(shown: Mapping[tuple[str, str], str], chosen: Mapping[str, str]) -> str:
    return ", ".join(
        f"({sql_text(run_id)}, {sql_text(measure)}, {sql_text(key)}, {key == chosen[measure]})"
        for (run_id, measure), key in shown.items()
    )


def _config(run: Run, part: str) -> Mapping[str, Any]:
    found = (run.run.get("config") or {}).get(part)
    return found if isinstance(found, Mapping) else {}

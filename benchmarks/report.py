"""What a report costs: made-up runs of the demonstration's size, and their report in a process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from palimpsest.record.row import SCHEMA_VERSION

LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29)
METHODS = ("rome", "memit", "leace", "ft", "alphaedit", "scrub", "inlp", "splince", "targeted")
SIZES = {"target": 24, "test": 64, "others": 48}
SITE = 15
"""The layer that every run but the unchanged model changes."""


class Shape(NamedTuple):
    """Rows of one metric and protocol: everything crossed with everything."""

    measure: str
    axis: str
    metric: str
    protocol: str
    split: str | None = "target"
    prompts: tuple[str | None, ...] = (None,)
    layers: tuple[int | None, ...] = (None,)
    positions: tuple[str | None, ...] = (None,)
    budgets: tuple[int | None, ...] = (None,)
    facts: bool = True
    share: float = 0.5


def prompts(kind: str, number: int) -> tuple[str, ...]:
    return tuple(f"{kind}/{place}" for place in range(number))


ASKED = ("fit", *prompts("paraphrase", 6))
BOTH = ("last_subject", "last_prompt")
BUDGETS = (1, 5, 20)


def shapes() -> list[Shape]:
    """The demonstration's rows, of an eraser: about 13,800."""
    down = ("downstream", "downstream")
    made = [
        Shape(*down, "efficacy", p, prompts=("fit",), share=0.8) for p in ("probability", "argmax")
    ]
    made += [
        Shape(*down, metric, p, prompts=prompts(kind, number))
        for p in ("probability", "argmax")
        for metric, kind, number in (
            ("paraphrase", "paraphrase", 6),
            ("neighborhood", "neighbor", 5),
        )
    ]
    for p in ("candidates", "vocabulary"):
        made += [
            Shape(*down, "suppression", p, prompts=ASKED),
            Shape(*down, "relation_accuracy", p, "test", ("fit",)),
        ]
        made += [
            Shape("consistency", "consistency", f"twohop_{said}", p, prompts=prompts("hop", 3))
            for said in ("new", "old", "neither")
        ]
    made += [
        Shape(*down, f"{what}_probability", "string", prompts=ASKED) for what in ("old", "new")
    ]
    made += [
        Shape(*down, "other_accuracy", "vocabulary", "others", ("fit",)),
        Shape(*down, "score", "harmonic_mean", facts=False),
        Shape(*down, "perplexity", "heldout_text", None, facts=False, share=25.0),
        Shape("consistency", "consistency", "agreement", "paraphrase_pairs"),
        Shape("consistency", "consistency", "agreement_correct", "true"),
        Shape("consistency", "consistency", "agreement_correct", "new"),
        *(Shape("fit", "cost", metric, "l2", layers=(SITE,)) for metric in ("delta_norm", "loss")),
    ]
    return made + list(_recoverability())


def _recoverability() -> list[Shape]:
    probes, attacks = ("probes", "recoverability"), ("attacks", "recoverability")
    deep: dict[str, Any] = {"layers": LAYERS, "positions": BOTH}
    made = [
        Shape(*probes, metric, protocol, split, ("state",), **deep)
        for metric in ("probe_accuracy", "v_information")
        for protocol in ("frozen", "retrained")
        for split in ("target", "test")
    ]
    made += [
        Shape(*attacks, f"lens_rank_{what}", "logit_lens", prompts=("fit",), layers=LAYERS,
              positions=("last_prompt",), share=800.0)
        for what in ("old", "new")
    ]  # fmt: skip
    for metric, share in (("attack_success", 0.4), ("attack_baseline", 0.1)):
        made += [
            Shape(*attacks, metric, protocol, layers=LAYERS, positions=("last_prompt",),
                  budgets=BUDGETS, share=share)
            for protocol in ("logit_lens", "probability_delta")
        ]  # fmt: skip
        made += [
            Shape(*attacks, metric, protocol, budgets=BUDGETS, share=share)
            for protocol in ("few_shot", "rephrasing", "in_context")
        ]
    made += [
        Shape(*probes, "probe_baseline", "shuffled", facts=False, share=0.2, **deep),
        Shape(*probes, "probe_baseline", "majority", facts=False, share=0.2),
        Shape(*probes, "probe_baseline", "embedding", None, facts=False, share=0.3),
    ]
    return made


def write_template(database: duckdb.DuckDBPyConnection, facts: int) -> None:
    """All rows but their values, as a table `template`; of `facts` target facts."""
    sizes = {**SIZES, "target": facts, "test": SIZES["test"] * facts // SIZES["target"]}
    rows = [
        (s.measure, "" if s.measure == "fit" else "0123456789ab", f"{s.split}-{n:03d}" if s.facts
         else None, "city_country" if s.facts else None, s.split, "relation", s.axis, s.metric,
         s.protocol, prompt, layer, position, budget, s.share)
        for s in shapes()
        for n in range(sizes.get(s.split or "", 1) if s.facts else 1)
        for prompt in s.prompts
        for layer in s.layers
        for position in s.positions
        for budget in s.budgets
    ]  # fmt: skip
    columns = (
        "measure VARCHAR, measure_key VARCHAR, fact_id VARCHAR, relation VARCHAR, split VARCHAR, "
        "scope VARCHAR, axis VARCHAR, metric VARCHAR, protocol VARCHAR, prompt_id VARCHAR, "
        "layer INTEGER, position VARCHAR, budget INTEGER, share DOUBLE"
    )
    database.execute(f"CREATE OR REPLACE TABLE template ({columns})")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        names = [part.split()[0] for part in columns.split(", ")]
        file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        file.flush()
        kinds = ", ".join(f"{part.split()[0]}: '{part.split()[1]}'" for part in columns.split(", "))
        database.execute(
            f"INSERT INTO template SELECT * FROM read_json('{file.name}', "
            f"format='newline_delimited', columns={{{kinds}}})"
        )


def write_run(
    database: duckdb.DuckDBPyConnection, directory: Path, number: int, facts: int
) -> None:
    """One finished run, whose values are its number's."""
    run_id = f"{number:012x}"
    place = directory / run_id
    place.mkdir(parents=True)
    method = "none" if number == 0 else METHODS[number % len(METHODS)]
    database.execute(
        f"""COPY (
            SELECT * EXCLUDE (budget, share), NULL::INTEGER AS step, budget,
                CASE WHEN share < 1 THEN (hash(rowid, {number}) % 1000 < 1000 * share)::DOUBLE
                     ELSE 1 + hash(rowid, {number}) % share::BIGINT END AS value,
                1::BIGINT AS n,
                CASE WHEN layer < {SITE} THEN 'unchanged by construction' END AS note
            FROM template ORDER BY axis, metric, protocol, measure, fact_id NULLS FIRST
        ) TO '{place / "rows.parquet"}' (FORMAT parquet, COMPRESSION zstd)"""
    )
    (place / "run.json").write_text(json.dumps(run_json(run_id, method, number)))
    (place / "facts.json").write_text(json.dumps([said(n, method) for n in range(facts)]))
    (place / "DONE").touch()


def run_json(run_id: str, method: str, number: int) -> dict[str, Any]:
    settings = {f"setting_{place}": place for place in range(60)}
    return {
        "run_id": run_id, "schema": SCHEMA_VERSION, "status": "done", "method": method,
        "imitates": None, "site": {"layer": SITE, "part": "residual"},
        "model": {"name": "made-up", "fingerprint": "ab" * 32},
        "facts": {"name": "made-up", "fingerprint": "cd" * 32, "sizes": SIZES, "counts": SIZES},
        "seed": 0, "command": f"palimpsest run intervene={method} intervene.strength={number}",
        "config": {"seed": 0, "intervene": {"strength": number}, "evaluate": settings},
        "seconds": {"load": 1.0, "fit": 2.0, "measure": 3.0}, "peak_mb": {"measure": 900.0},
    }  # fmt: skip


def said(number: int, method: str) -> dict[str, Any]:
    return {
        "fact_id": f"target-{number:03d}", "relation": "city_country",
        "subject": f"Subject {number}", "prompt": f"Subject {number} is a city in",
        "true": "France", "new": "Japan", "answer": f" {method} says a country, and more of it",
        "top": [[" France", 0.5], [" the", 0.2], [" a", 0.1], [" Japan", 0.05], [" one", 0.01]],
    }  # fmt: skip


def measure(directory: Path) -> tuple[float, float, float]:
    """CPU-seconds, peak MiB and the page's MB of a report in a process of its own."""
    words = [sys.executable, "-m", "palimpsest", "report", str(directory)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the report of {directory} ended with {process.returncode}")
    page = (directory / "report.html").stat().st_size
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, page / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also 1,000 runs of 20,000 rows")
    parser.add_argument("--runs", type=int, nargs="*", default=[11, 60, 200])
    options = parser.parse_args()
    cases = [(number, SIZES["target"]) for number in options.runs]
    print("| runs | rows | CPU-seconds | peak memory | page |\n|---|---|---|---|---|")
    with duckdb.connect(config={"threads": 1}) as database:
        for number, facts in [*cases, *([(1000, 35)] if options.large else [])]:
            write_template(database, facts)
            [rows] = database.execute("SELECT count(*) FROM template").fetchone() or (0,)
            with tempfile.TemporaryDirectory() as folder:
                for place in range(number):
                    write_run(database, Path(folder) / "sweep", place, facts)
                cpu, peak, page = measure(Path(folder) / "sweep")
            print(
                f"| {number:,} | {number * rows:,} | {cpu:.1f} | {peak:,.0f} MiB | {page:.1f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()

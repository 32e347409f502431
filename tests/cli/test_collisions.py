"""One and the same run, asked for by several processes at once, is done once."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest

from palimpsest.record.results import KEY
from tests.cli.test_kill import check_like, environment, only

SAME = [["intervene=none", f"protocol={name}"] for name in ("independent", "batch", "sequential")]
"""One run by three names: `none` makes no changes, so that their protocol does not matter."""

STAGE = """
import json, os, select, sys, time
import palimpsest.cli.jobs, palimpsest.experiment, transformers.models.llama.modeling_llama
from palimpsest.cli import main

EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.listdir", "shutil.rmtree"}

def start(words, place, number, act=lambda count: None, tell=None):
    child = os.fork()
    if child:
        return child
    code, seen = 1, []
    try:
        os.dup2(os.open(f"{place}.{number}.err", os.O_WRONLY | os.O_CREAT), 2)

        def hook(event, found):
            if event in EVENTS and str(found[0]).startswith(place + "/"):
                seen.append(event)
                act(len(seen))

        sys.addaudithook(hook)
        code = main([*words, "record.dir=" + place])
        if tell:
            os.write(tell, str(len(seen)).encode())
    finally:
        os._exit(code)

def ended(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def together(several, place):
    return ended([start(words, place, n) for n, words in enumerate(several)]), 0

def staged(several, place, moment):
    first_seen, first_tells = os.pipe()
    second_seen, second_tells = os.pipe()

    def wait(count):
        if count == moment:
            os.write(first_tells, b".")
            select.select([second_seen], [], [], 60)
            time.sleep(0.05)

    def arrive(count):
        if count == 1:
            os.write(second_tells, b".")

    first = start(several[0], place, 0, wait, first_tells)
    os.close(first_tells)
    text = os.read(first_seen, 1).decode()
    second = start(several[1], place, 1, arrive)
    codes = ended([first, second])
    text += os.read(first_seen, 100).decode()
    for file in (first_seen, second_seen, second_tells):
        os.close(file)
    return codes, int(text.strip(".") or 0)

for line in sys.stdin:
    cache, several, place, moment = json.loads(line)
    os.environ["PALIMPSEST_CACHE"] = cache
    outcome = together(several, place) if moment is None else staged(several, place, moment)
    print(json.dumps(outcome), flush=True)
"""
"""Imports everything once, then runs several commands at once for every line.

At a `moment` the first of two stops: before the so many-eth file that it opens, renames or removes
among its results, it waits until the second one comes to these results too, and a little longer.
"""


@dataclass(frozen=True)
class Stage:
    """A process that starts others.

    Attributes:
        process: runs `STAGE`.
    """

    process: subprocess.Popen[str]

    def run(
        self, cache: Path, several: Sequence[Sequence[str]], place: Path, moment: int | None = None
    ) -> int:
        """Run several commands at once; each ends well.

        Args:
            cache: where they keep what they compute.
            several: the commands' words.
            place: where their results go; what each says goes beside it.
            moment: where the first of two stops until the second one comes; None for nowhere.

        Returns:
            how many moments the first one had, if there was one to stop at.
        """
        asked = json.dumps([str(cache), several, str(place), moment])
        print(asked, file=self.process.stdin, flush=True)
        codes, moments = json.loads(self.process.stdout.readline())
        said = [place.with_name(f"{place.name}.{n}.err").read_text() for n in range(len(several))]
        assert codes == [0] * len(several), said
        check_said(said)
        return moments


@pytest.fixture(scope="module")
def stage(cache: Path) -> Iterator[Stage]:
    """Takes a few seconds to import; from then on commands start at once."""
    with subprocess.Popen(
        [sys.executable, "-c", STAGE], env=environment(cache), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            yield Stage(process)
        finally:
            process.stdin.close()


def check_said(said: list[str]) -> None:
    """One worked; the others found the run done; before that, at most whom they waited for."""
    lines = [text.splitlines() for text in said]
    ends = sorted(line[-1].partition(": results")[0].partition(": /")[0] for line in lines)
    before = ["none: done before, left as it is"] * (len(said) - 1)
    assert ends == sorted(["none: done", *before])
    assert all("process" in told for line in lines for told in line[:-1])


def check_done_once(place: Path, expected) -> None:
    """Every key once, nothing half written, status `done`, one DONE."""
    run = only(place)
    rows = f"read_parquet('{run.path / 'rows.parquet'}')"
    [(count, keys)] = duckdb.sql(
        f"SELECT count(*), (SELECT count(*) FROM (SELECT DISTINCT {', '.join(KEY)} FROM {rows})) "
        f"FROM {rows}"
    ).fetchall()
    assert count == keys == len(expected.rows)
    assert run.run["status"] == "done"
    assert len(list(place.rglob("DONE"))) == 1
    check_like(run, expected)


def stage_trials(stage, cache, few, expected, home: Path, count: int, seed: int) -> None:
    """Two that ask for the same run, the second at moments spread over the first one's work."""
    words = [["run", *few, *same] for same in SAME[:2]]
    moments = stage.run(cache, words, home / "whole", moment=10**9)
    assert moments > count / 4
    drawn = random.Random(seed)
    for trial in range(count):
        moment = 1 + (trial * moments // count + drawn.randrange(moments // count + 1)) % moments
        place = home / f"{trial}-at-{moment}"
        stage.run(cache, words, place, moment)
        check_done_once(place, expected)


def test_the_same_run_asked_for_three_times_at_once_is_done_once(stage, few, done, tmp_path):
    words = [["run", *few, *same] for same in SAME]
    stage.run(tmp_path / "cache", words, tmp_path / "results")
    check_done_once(tmp_path / "results", done["none"])


def test_a_second_process_may_come_at_any_moment(stage, few, done, cache, tmp_path):
    stage_trials(stage, cache, few, done["none"], tmp_path, 8, seed=0)


@pytest.mark.slow
def test_a_second_process_may_come_at_any_of_many_moments(stage, few, done, cache, tmp_path):
    stage_trials(stage, cache, few, done["none"], tmp_path, 64, seed=1)

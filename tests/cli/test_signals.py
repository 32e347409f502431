"""A run that is asked to end undoes its change, says why it ended, and is taken up again."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from palimpsest.cli import main
from palimpsest.cli.signals import stoppable
from palimpsest.errors import Stopped
from palimpsest.evaluate.probes import Probes
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.load import Pretrained
from palimpsest.record.results import load_runs
from palimpsest.record.store import RunStore
from tests.cli.test_many import check_untouched, loaded, unfinished

__all__ = ["loaded"]

TOLD = {
    signal.SIGTERM: ("stopped by SIGTERM", "stopped by SIGTERM"),
    signal.SIGHUP: ("stopped by SIGHUP", "stopped by SIGHUP"),
    signal.SIGINT: ("interrupted", "KeyboardInterrupt"),
}
"""By signal, what the user reads and what run.json says."""

SIGNALS = pytest.mark.parametrize("number", TOLD, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def usual():
    """Every test ends with the handlers with which it began."""
    before = {number: signal.getsignal(number) for number in TOLD}
    yield
    assert {number: signal.getsignal(number) for number in TOLD} == before


def sending(number, times=1):
    """A method that sends this process a signal and goes on."""

    def method(*_, **__):
        for _ in range(times):
            os.kill(os.getpid(), number)

    return method


@pytest.fixture(autouse=True)
def usual_signals():
    """As in a terminal: under nohup, or in a shell's background, some are ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# -- a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "place", "name", "words"),
    [
        (signal.SIGTERM, ValueSearch, "find", ["intervene=rome"]),
        (signal.SIGHUP, Probes, "measure", ["intervene=rome"]),
        (signal.SIGINT, Probes, "measure", ["intervene=leace"]),
        (signal.SIGTERM, RunStore, "write_facts", ["intervene=leace"]),
    ],
    ids=["fit", "measure an edit", "measure an erasure", "write"],
)
def test_a_signal_ends_a_run_and_the_next_one_finishes_it(
    call, few, done, loaded, tmp_path, monkeypatch, number, place, name, words
):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, sending(number))
        outcome = call("run", *few, *words)
    line, error = TOLD[number]
    assert (outcome.code, outcome.err) == (1, f"{line}\n")
    run = unfinished(tmp_path)
    assert (run["status"], run["error"]) == ("failed", error)
    check_untouched(loaded[0])
    assert call("run", *few, *words).code == 0
    [run] = load_runs(tmp_path / "results" / "runs")
    assert run.rows == done[run.method].rows


@SIGNALS
def test_a_signal_before_the_run_has_a_directory_leaves_none(
    call, few, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(Pretrained, "load", sending(number))
    outcome = call("run", *few, "intervene=none")
    assert (outcome.code, outcome.err) == (1, f"{TOLD[number][0]}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_a_grid(call, few, tmp_path, monkeypatch):
    monkeypatch.setattr(Probes, "measure", sending(signal.SIGTERM))
    outcome = call("run", "-m", *few, "intervene=none,leace")
    assert (outcome.code, outcome.err) == (1, "stopped by SIGTERM\n")
    assert unfinished(tmp_path)["method"] == "none"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_disturb_the_clean_up(call, few, tmp_path, monkeypatch, second):
    fail = RunStore.fail

    def disturbed(store, error):
        sending(second, times=3)()
        fail(store, error)

    monkeypatch.setattr(RunStore, "fail", disturbed)
    monkeypatch.setattr(Probes, "measure", sending(signal.SIGTERM))
    outcome = call("run", *few, "intervene=leace")
    assert (outcome.code, outcome.err) == (1, "stopped by SIGTERM\n")
    assert unfinished(tmp_path)["error"] == "stopped by SIGTERM"


# -- handlers --------------------------------------------------------------------------------------


def test_a_signal_that_somebody_else_handles_is_left_to_them():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
            with pytest.raises(Stopped, match="stopped by SIGHUP"):
                os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_works_in_another_thread(capfd):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["completion", "bash"]).result() == 0

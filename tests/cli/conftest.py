"""A tiny Llama that knows sixty invented facts, and the command run in this process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from palimpsest.cli import main
from palimpsest.locks import held
from palimpsest.record.results import Run, load_runs
from tests.invented import Invented


@dataclass(frozen=True)
class Tiny:
    """Where the tiny model and its facts lie.

    Attributes:
        model: a checkpoint that knows nearly all of the facts.
        ignorant: the same before training: it knows none.
        facts: the facts in CounterFact's format.
    """

    model: Path
    ignorant: Path
    facts: Path


@dataclass(frozen=True)
class Outcome:
    """What one call of the command gave."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]

FEW = (
    "facts=counterfact",
    "facts.relations=[P17]",
    "facts.limit=6",
    "contexts=1",
    "evaluate.probes.least=1",
    "~evaluate.relearning",
    "~evaluate.compression",
    "record=local",
)
"""A run of half a second."""

METHODS = {
    "none": ["intervene=none"],
    "rome": ["intervene=rome"],
    "rome_batch": ["intervene=rome", "intervene.protocol=batch"],
    "rome_plain": ["intervene=rome_plain"],
    "random_delta": ["intervene=random_delta"],
    "leace": ["intervene=leace"],
    "leace_shuffled": ["intervene=leace_shuffled"],
}
"""Every method, and its variants, by a name for the tests."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is computed once for all tests that do not ask for a cache of their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, caches out of the user's home, no account, no leftovers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALIMPSEST_CACHE", str(cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "PALIMPSEST_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(cache / "wandb"))
    monkeypatch.setenv("NETRC", str(cache / "netrc"))


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: its exit code and all that it wrote."""

    def run(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def few(tiny: Tiny) -> list[str]:
    """Overrides of a small run; the place of the results comes on top."""
    return [f"model.path={tiny.model}", f"facts.path={tiny.facts}", "locate.layer=0", *FEW]


@pytest.fixture(scope="session")
def done(few: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One finished run of every method, by its name in `METHODS`."""
    home = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(cache))
        codes = {
            name: main(["run", *words, *few, f"record.dir={home / name}"])
            for name, words in METHODS.items()
        }
    assert set(codes.values()) == {0}, codes
    return {name: load_runs(home / name)[0] for name in METHODS}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made once, by one worker."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "tiny"
    made = Tiny(home / "model", home / "ignorant", home / "counterfact.json")
    with held(shared / "tiny.lock"):
        if not made.model.exists():
            Invented().save(made.model, made.facts, made.ignorant)
    return made

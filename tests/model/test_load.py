import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.model.load import Pretrained
from palimpsest.model.memory import default_rows
from tests.model.tiny import KINDS, make_handle, make_model, tokenizer


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory written by save_pretrained."""
    return save(tmp_path / f"my-{request.param}", request.param)


def save(directory: Path, kind: str = "llama") -> Path:
    make_model(kind).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def load(path: Path, **options: Any) -> Any:
    return Pretrained(path=str(path), device="cpu", **options).load()


def refusal(path: Path, **options: Any) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(RequestError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_saved_model_is_the_original(saved: Path) -> None:
    original = make_handle(saved.name.removeprefix("my-"))
    handle = load(saved, prefix="\n")
    assert handle.fingerprint == original.fingerprint
    mine, theirs = handle.model.state_dict(), original.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    prompt = Prompt.fill("fit", "The city of {} is in", "東京")
    assert handle.encode(prompt, "Japan", 3) == original.encode(prompt, "Japan", 3)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(handle.model(ids).logits, original.model(ids).logits)


def test_options_reach_the_handle(saved: Path) -> None:
    handle = load(saved, prefix="Fact:", batch_size=3)
    assert (handle.prefix, handle.batch_size, handle.device.type) == ("Fact:", 3, "cpu")


def test_a_path_names_the_model(saved: Path) -> None:
    assert load(saved).name == saved.name
    assert load(Path(f"{saved}/")).name == saved.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_is_the_one_asked_for(dtype: str, tmp_path: Path) -> None:
    handle = load(save(tmp_path / "model"), dtype=dtype)
    assert {weight.dtype for weight in handle.model.parameters()} == {getattr(torch, dtype)}


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, dtype="float64")
    assert "expected model.dtype to be one of float32, bfloat16, float16" in message
    assert "found 'float64'; did you mean 'float16'" in message


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a model"])
def test_adapters_are_refused_with_the_way_to_merge_them(whole: bool, tmp_path: Path) -> None:
    base, place = save(tmp_path / "base"), tmp_path / "adapters"
    place.mkdir()
    if whole:
        save(place)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["up"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(place)
    assert f"expected a whole model at model.path, found adapters of PEFT in '{place}'" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize("name", ["nowhere", "a/b/nowhere"])
def test_nothing_at_the_path_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name)
    assert message.startswith("expected a local directory or a hub id with safetensors weights")
    assert str(tmp_path / name) in message
    assert "set model.path to a directory written by save_pretrained" in message


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "expected a model directory" in refusal(tmp_path / "model.safetensors")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "expected a model directory with safetensors weights" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert "expected a model directory with safetensors weights" in refusal(saved)


def test_a_directory_without_a_tokenizer_is_refused(saved: Path) -> None:
    for file in saved.glob("tokenizer*"):
        file.unlink()
    assert "and a tokenizer" in refusal(saved)


def test_pickled_weights_are_never_opened(saved: Path) -> None:
    torch.save(make_model(saved.name.removeprefix("my-")).state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    assert "with safetensors weights" in refusal(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "expected a model directory" in refusal(saved)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    state = make_model("llama").state_dict()
    state.pop("model.layers.2.mlp.down_proj.weight")
    directory = save(tmp_path / "model")
    make_model("llama").save_pretrained(directory, state_dict=state)
    message = refusal(directory)
    assert "model.layers.2.mlp.down_proj.weight" in message


def test_a_model_that_is_no_language_model_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "vit"}')
    assert "expected a model directory" in refusal(saved)


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_the_directory_is_not_run(tmp_path: Path, model_type: str) -> None:
    directory, marker = save(tmp_path / "model"), tmp_path / "it ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": model_type}
    config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (directory / "config.json").write_text(json.dumps(config))
    if model_type == "llama":
        assert load(directory).fingerprint == make_handle("llama").fingerprint
    else:
        assert "expected a model directory" in refusal(directory)
    assert not marker.exists()


@pytest.mark.parametrize("device", ["nonsense", "gpu", "cuda:x", "meta"])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(RequestError, match=f"auto, cpu, cuda or cuda:N, found '{device}'; name"):
        Pretrained(path=str(tmp_path), device=device).load()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_an_absent_gpu_is_refused(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match=f"GPU for model.device={device}, found 0 .* set"):
        Pretrained(path=str(tmp_path), device=device).load()


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_batch_is_refused(size: int) -> None:
    with pytest.raises(RequestError, match=f"model.batch_size .*{size}"):
        Pretrained(batch_size=size)


def test_the_number_of_rows_is_the_devices_unless_given(saved: Path) -> None:
    assert load(saved).batch_size == default_rows(torch.device("cpu"))
    assert load(saved, batch_size=3).batch_size == 3


COMPARE = """
import sys
import torch
from palimpsest.facts.fact import Prompt
from palimpsest.model.forward import keys, score
from palimpsest.model.load import Pretrained

plain, compiled = (Pretrained(path=sys.argv[1], device="cpu", compile=c).load() for c in (0, 1))
prompts = [Prompt.fill("p", "The city of {} is in", city) for city in ("東京", "Ur")]
rows = [plain.encode(prompt, "Japan") for prompt in prompts]
one, two = ([found.logprob for found in score(handle, rows)] for handle in (plain, compiled))
torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-4)
one, two = (keys(handle, rows, 1) for handle in (plain, compiled))
torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
"""
"""In a process of its own: the compiler does not bear every module that tests import."""


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_compiled_blocks_compute_the_same_and_see_later_hooks(saved: Path) -> None:
    command = [sys.executable, "-c", COMPARE, str(saved)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr

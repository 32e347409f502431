"""A change of weights is written as transformers writes a model, and undone bit for bit."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from palimpsest import apply as applying
from palimpsest.apply import ORIGINAL, RECORD, Chosen, apply, choose, undo
from palimpsest.errors import RequestError, WriteError
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import NORMS, Change, Part
from tests.architectures.changes import make_eraser, make_folded
from tests.architectures.tiny import TINY, make_model, tokenizer

FACTS = ("a", "b", "c")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Place:
    """A model on disk, a directory for runs, and one for what is written."""

    source: Pretrained
    run: Path
    out: Path
    back: Path

    @property
    def original(self) -> dict[str, Tensor]:
        return state(Path(self.source.path or ""))

    def names(self) -> set[str]:
        """What stands beside model and run."""
        return {path.name for path in self.out.parent.iterdir()} - {"source", "run"}


Make = Callable[..., Place]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a tiny model to disk."""

    def place(name: str = "gpt2", dtype: str = "float32", shard: str = "1GB", **options) -> Place:
        model = make_model(name, **options).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path / "source", max_shard_size=shard)
        tokenizer().save_pretrained(tmp_path / "source")
        source = Pretrained(path=str(tmp_path / "source"), dtype=dtype, device="cpu")
        return Place(source, tmp_path / "run", tmp_path / "out", tmp_path / "back")

    return place


def state(directory: Path, dtype: str = "auto") -> dict[str, Tensor]:
    """The weights that plain transformers finds."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return dict(model.state_dict())


def check_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# -- interventions of every kind -------------------------------------------------------------------


def noise(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(
    handle: ModelHandle, layer: int, independent: bool = False, seed: int = 0
) -> Intervention:
    facts = len(FACTS) if independent else 1
    return WeightDeltas(
        change=Change("fact", independent, layer),
        model=handle.fingerprint,
        left=noise(seed, facts, 2, handle.w_out(layer).shape[1]),
        right=noise(seed + 1, facts, 2, handle.width),
    )


def dense(handle: ModelHandle, layer: int, independent: bool = False) -> Intervention:
    facts = len(FACTS) if independent else 1
    delta = noise(7, facts, *handle.w_out(layer).shape)
    change = Change("fact", independent, layer)
    return DenseDeltas(change=change, model=handle.fingerprint, delta=delta)


def composed(*parts: Intervention) -> Intervention:
    first = parts[0]
    return Composition(change=first.change, model=first.model, parts=parts)


def history(*parts: Intervention) -> Intervention:
    return History(change=parts[0].change, model=parts[0].model, parts=parts, steps=(1, 10))


SHARED: dict[str, Callable[[ModelHandle], Intervention]] = {
    "low rank": lambda handle: low_rank(handle, 2),
    "dense": lambda handle: dense(handle, 1),
    "readers": lambda handle: make_folded(handle, make_eraser(handle, "mlp_norm", "all")),
    "composition": lambda handle: composed(low_rank(handle, 1), dense(handle, 3)),
    "history": lambda handle: history(low_rank(handle, 2), low_rank(handle, 2, seed=5)),
    "history of compositions": lambda handle: history(
        composed(low_rank(handle, 1), low_rank(handle, 2)),
        composed(low_rank(handle, 1, seed=3), low_rank(handle, 2, seed=4)),
    ),
}
OWN: dict[str, Callable[[ModelHandle], Intervention]] = {
    "low rank": lambda handle: low_rank(handle, 2, independent=True),
    "dense": lambda handle: dense(handle, 1, independent=True),
    "composition": lambda handle: composed(
        low_rank(handle, 1, independent=True), dense(handle, 3, independent=True)
    ),
}


def saved(place: Place, intervention: Intervention) -> Path:
    """A run's directory with what `apply` reads."""
    intervention.save(place.run / "intervention")
    (place.run / "facts.json").write_text(json.dumps([{"fact_id": name} for name in FACTS]))
    return place.run


def leaves(intervention: Intervention) -> list[Intervention]:
    parts = getattr(intervention, "parts", None)
    return [intervention] if parts is None else [leaf for part in parts for leaf in leaves(part)]


def literal(place: Place, intervention: Intervention, fact: int = 0) -> dict[str, Tensor]:
    """The original's weights with W + ΔW of one fact, summed in float32 and rounded once."""
    handle = place.source.load()
    weights = place.original
    names = {id(tensor): name for name, tensor in handle.model.named_parameters()}
    last = intervention.parts[-1] if isinstance(intervention, History) else intervention
    for leaf in leaves(last):
        if isinstance(leaf, ReaderDeltas):
            put_readers(weights, names, handle, leaf)
            continue
        assert isinstance(leaf, WeightDeltas | DenseDeltas)
        if isinstance(leaf, WeightDeltas):
            delta = leaf.right[fact].T @ leaf.left[fact]
        else:
            delta = leaf.delta[fact]
        module = handle.blocks[leaf.layer].get_submodule(handle.architecture.w_out)
        name = names[id(module.weight)]
        turned = delta.T if type(module).__name__ == "Conv1D" else delta
        weights[name] = (weights[name].float() + turned).to(weights[name].dtype)
    return weights


def put_readers(
    weights: dict[str, Tensor], names: dict[int, str], handle: ModelHandle, change: ReaderDeltas
) -> None:
    """The same for what reads a norm, reader by reader."""
    delta, shift = (change.left @ change.right).float(), change.shift.float()
    for module in handle.reading(change.site):
        conv, size = type(module).__name__ == "Conv1D", module.weight.shape
        rows = size[1] if conv else size[0]
        mine, delta = delta[:rows], delta[rows:]
        parameters = [(module.weight, mine.T if conv else mine)]
        if module.bias is not None:
            parameters.append((module.bias, shift[:rows]))
            shift = shift[rows:]
        for parameter, change_of in parameters:
            name = names[id(parameter)]
            weights[name] = (weights[name].float() + change_of).to(weights[name].dtype)
    assert delta.numel() == shift.numel() == 0


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_goes_there_and_back(make: Make, name: str) -> None:
    place = make(name)
    handle = place.source.load()
    change = composed(low_rank(handle, 1), low_rank(handle, 3, seed=4))
    record = apply(place.source, choose(saved(place, change)), place.out)
    wanted = literal(place, change)
    check_equal(state(place.out), wanted)
    assert record.model["fingerprint"] == handle.fingerprint
    assert len(record.changed) == 2
    undone = undo(replace(place.source, path=str(place.out)), place.back)
    assert undone == record
    check_equal(state(place.back), place.original)
    assert replace(place.source, path=str(place.back)).load().fingerprint == handle.fingerprint
    assert place.names() == {"out", "back"}


@pytest.mark.parametrize("part", NORMS)
@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.norms])
def test_what_reads_a_norm_goes_there_and_back(make: Make, name: str, part: Part) -> None:
    place = make(name)
    handle = place.source.load()
    change = make_folded(handle, make_eraser(handle, part, "all"))
    record = apply(place.source, choose(saved(place, change)), place.out)
    check_equal(state(place.out), literal(place, change))
    readers = handle.readers(change.site)
    assert len(record.changed) == sum(1 + (bias is not None) for _, bias in readers)
    undo(replace(place.source, path=str(place.out)), place.back)
    check_equal(state(place.back), place.original)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_change_of_every_kind_is_summed_once(make: Make, kind: str, dtype: str) -> None:
    place = make("llama", dtype)
    change = SHARED[kind](place.source.load())
    record = apply(place.source, choose(saved(place, change)), place.out)
    check_equal(state(place.out), literal(place, change))
    with safetensors.safe_open(place.out / ORIGINAL, "pt") as file:
        assert sorted(file.keys()) == list(record.changed)
        originals = {name: file.get_tensor(name) for name in record.changed}
    check_equal(originals, {name: place.original[name] for name in originals})
    undo(replace(place.source, path=str(place.out)), place.back)
    check_equal(state(place.back), place.original)


@pytest.mark.parametrize("kind", OWN)
def test_the_change_of_one_fact_is_its_own(make: Make, kind: str) -> None:
    place = make("gpt2")
    change = OWN[kind](place.source.load())
    apply(place.source, choose(saved(place, change), fact="b"), place.out)
    check_equal(state(place.out), literal(place, change, fact=1))
    assert not change.alone(1).change.independent


def test_a_checkpoint_of_a_history_is_taken(make: Make) -> None:
    place = make("llama")
    change = SHARED["history"](place.source.load())
    assert isinstance(change, History)
    record = apply(place.source, choose(saved(place, change), step=1), place.out)
    check_equal(state(place.out), literal(place, change.parts[0]))
    assert record.intervention == {
        "digest": change.digest,
        "kind": "history",
        "fact": None,
        "step": 1,
    }


def test_what_is_on_disk_is_read_as_transformers_reads_it(make: Make) -> None:
    """Tied weights, shards, generation settings and the chat template stay."""
    place = make("llama", shard="20KB", tie_word_embeddings=True)
    source = Path(place.source.path or "")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": true}')
    apply(place.source, choose(saved(place, SHARED["dense"](place.source.load()))), place.out)
    undo(replace(place.source, path=str(place.out)), place.back)
    for directory in (place.out, place.back):
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.generation_config.max_new_tokens, model.generation_config.do_sample) == (7, 1)
        assert AutoTokenizer.from_pretrained(directory).chat_template == TEMPLATE
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert not any(str(source) in path.read_text("latin-1") for path in files)


def test_a_changed_model_is_changed_again_and_undone_step_by_step(make: Make) -> None:
    place = make("gpt2")
    first = SHARED["low rank"](place.source.load())
    apply(place.source, choose(saved(place, first)), place.out)
    changed = replace(place.source, path=str(place.out))
    second = SHARED["composition"](changed.load())
    apply(changed, choose(saved(place, second)), place.back)
    third = place.out.with_name("third")
    undo(replace(place.source, path=str(place.back)), third)
    check_equal(state(third), state(place.out))


# -- nothing half written --------------------------------------------------------------------------


@pytest.fixture
def ready(make: Make) -> tuple[Place, Chosen]:
    place = make("llama")
    return place, choose(saved(place, SHARED["dense"](place.source.load())))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "full"), WriteError),
        (OSError(13, "denied"), RequestError),
        (safetensors.SafetensorError("No space left on device (os error 28)"), WriteError),
    ],
    ids=str,
)
def test_a_failure_leaves_nothing(ready, monkeypatch, error, told) -> None:
    place, chosen = ready

    def save_pretrained(model, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    with pytest.raises(told):
        apply(place.source, chosen, place.out)
    assert place.names() == set()


def test_what_is_not_read_back_as_written_does_not_appear(ready, monkeypatch) -> None:
    place, chosen = ready

    def save(handle, folder):
        real(handle, folder)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        name = min(weights)
        weights[name] = weights[name] + 1e-3
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    real = applying._save
    monkeypatch.setattr(applying, "_save", save)
    with pytest.raises(WriteError, match=r"was written by save_pretrained, and .* is read back"):
        apply(place.source, chosen, place.out)
    assert place.names() == set()


def test_another_model_is_refused(ready, tmp_path) -> None:
    place, chosen = ready
    weights = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    name = max(weights)
    weights[name][0] += 1e-3
    safetensors.torch.save_file(
        weights, tmp_path / "source" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RequestError, match="expected the model with fingerprint"):
        apply(place.source, chosen, place.out)
    assert place.names() == set()


def test_a_change_lost_in_rounding_is_refused(make: Make) -> None:
    place = make("llama", "bfloat16")
    change = dense(place.source.load(), 1)
    assert isinstance(change, DenseDeltas)
    small = replace(change, delta=1e-9 * change.delta.sign())
    with pytest.raises(RequestError, match=r"found none that does so in torch\.bfloat16"):
        apply(place.source, choose(saved(place, small)), place.out)
    assert place.names() == set()


# -- what cannot be undone -------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def alter(path: Path, name: str | None = None) -> None:
    """Change one value of one tensor, or give it another name."""
    tensors = safetensors.torch.load_file(path)
    first = min(tensors)
    tensors[first].view(-1)[0] += 1
    if name is not None:
        tensors[name] = tensors.pop(first)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda d: (d / RECORD).unlink(), "found no record of a change"),
    "another record": (lambda d: (d / RECORD).write_text('{"wheel": 1}'), "found no record of a"),
    "record a list": (lambda d: (d / RECORD).write_text("[1]"), "found no record of a change"),
    "record of numbers": (
        lambda d: edit(d / RECORD, lambda r: r.update(changed=[1])),
        "found no record of a change",
    ),
    "another dtype": (
        lambda d: edit(d / RECORD, lambda r: r.update(dtype="evil")),
        "expected model.dtype to be one of",
    ),
    "weights changed since": (
        lambda d: alter(d / "model.safetensors"),
        "it was changed since, and cannot be undone",
    ),
    "no originals": (lambda d: (d / ORIGINAL).unlink(), "expected the original values"),
    "originals cut short": (
        lambda d: (d / ORIGINAL).write_bytes((d / ORIGINAL).read_bytes()[:99]),
        "expected the original values",
    ),
    "originals altered": (lambda d: alter(d / ORIGINAL), "other values than the original's"),
    "originals of others": (lambda d: alter(d / ORIGINAL, "x"), "the values of other matrices"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_not_undone(ready, damage) -> None:
    place, chosen = ready
    apply(place.source, chosen, place.out)
    spoil, message = DAMAGE[damage]
    spoil(place.out)
    with pytest.raises(RequestError, match=message):
        undo(replace(place.source, path=str(place.out)), place.back)
    assert place.names() == {"out"}


def test_an_intervention_that_is_given_must_be_the_one_that_was_applied(ready) -> None:
    place, chosen = ready
    apply(place.source, chosen, place.out)
    changed = replace(place.source, path=str(place.out))
    other = SHARED["low rank"](place.source.load())
    other.save(place.run.with_name("source") / "other")
    with pytest.raises(RequestError, match=f"{chosen.digest[:12]} that was applied, found"):
        undo(changed, place.back, place.run.with_name("source") / "other")
    undo(changed, place.back, place.run)
    check_equal(state(place.back), place.original)

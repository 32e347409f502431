"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): a state read by an affine translator.

A translator of a layer turns its states into what the last block would have made of them, so that
the model's final norm and head can read it. Translators are trained here, on text sampled from the
unchanged model, and never see a fact or a change.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import check_at_least, check_number, check_seed
from palimpsest.model.forward import capturing, logit_lens, run_to
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.sample import sample
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate
from palimpsest.record.row import Row


@dataclass(frozen=True)
class Translator:
    """h ↦ A h + b.

    Attributes:
        matrix: A `[d_model, d_model]` float32.
        bias: b `[d_model]`.
        divergence: KL(final ‖ lens) on held-out text, nats a token.
        untuned: the same of the logit lens, where A = 1 and b = 0.
    """

    matrix: Tensor
    bias: Tensor
    divergence: float
    untuned: float

    def of(self, states: Tensor) -> Tensor:
        """What the last block would make of states `[..., d_model]`."""
        return states @ self.matrix.to(states).T + self.bias.to(states)


@dataclass(frozen=True)
class TunedLens:
    """How translators are trained.

    Each begins as the ridge regression of the last block's output on the layer's, and goes on by
    Adam on KL(p_final ‖ p_lens), as in section 3 of the paper; the beginning is kept where that
    does worse on held-out text.

    Attributes:
        tokens: sampled tokens to train on; a fifth as many are held out.
        steps: of Adam; 0 for the regression alone.
        batch: tokens in a step.
        lr: Adam's learning rate.
        ridge: of the regression, in multiples of the states' mean variance.
        seed: of text and batches.
    """

    tokens: int = 4096
    steps: int = 20
    batch: int = 64
    lr: float = 1e-4
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is out of its range.
        """
        check_at_least("evaluate.lens.tokens", self.tokens, 2 * _LENGTH)
        check_at_least("evaluate.lens.steps", self.steps, 0)
        check_at_least("evaluate.lens.batch", self.batch, 1)
        for name in ("lr", "ridge"):
            check_number(f"evaluate.lens.{name}", getattr(self, name), above=0)
        check_seed("evaluate.lens.seed", self.seed)

    def train(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, Translator]:
        """Translators of layers of the unchanged model, from the cache or trained.

        The last layer needs none.
        """
        wanted = [layer for layer in layers if layer < model.n_layers - 1]
        if not wanted:
            return {}
        key = {
            "version": 1,
            "lens": asdict(self),
            "model": model.state,
            "prefix": model.prefix,
            "layers": wanted,
        }
        found = cached_tensors("lens", key, lambda: self._trained(model, wanted))
        return {
            layer: Translator(
                found["matrix"][i], found["bias"][i], *found["divergence"][i].tolist()
            )
            for i, layer in enumerate(wanted)
        }

    def _trained(self, model: ModelHandle, layers: Sequence[int]) -> dict[str, Tensor]:
        known, fresh = (
            _states(model, layers, rows) for rows in self._text(model).split(self._rows)
        )
        each = [self._translator(model, layer, known, fresh) for layer in layers]
        return {
            "matrix": torch.stack([one.matrix for one in each]),
            "bias": torch.stack([one.bias for one in each]),
            "divergence": torch.tensor([[one.divergence, one.untuned] for one in each]),
        }

    @property
    def _rows(self) -> int:
        return -(-self.tokens // _LENGTH)

    def _text(self, model: ModelHandle) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return sample(model, self._rows + -(-self._rows // 5), _LENGTH, generator)

    def _translator(
        self, model: ModelHandle, layer: int, known: dict[int, Tensor], fresh: dict[int, Tensor]
    ) -> Translator:
        last = model.n_layers - 1
        identity = torch.eye(model.width), torch.zeros(model.width)
        judge = partial(_divergence, model, states=fresh[layer], final=fresh[last])
        untuned, kept = judge(*identity), regression(known[layer], known[last], self.ridge)
        least = judge(*kept)
        matrix, bias = (tensor.clone().requires_grad_() for tensor in kept)
        adam = torch.optim.Adam([matrix, bias], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            some = torch.randperm(len(known[layer]), generator=generator)[: self.batch]
            adam.zero_grad()
            divergence(model, matrix, bias, known[layer][some], known[last][some]).backward()
            adam.step()
        tuned = matrix.detach(), bias.detach()
        if self.steps and (found := judge(*tuned)) < least:
            least, kept = found, tuned
        return Translator(*kept, least, untuned)


_LENGTH = 64
"""Sampled tokens in a row."""


@within_memory
@torch.no_grad()
def _states(model: ModelHandle, layers: Sequence[int], ids: Tensor) -> dict[int, Tensor]:
    """States `[tokens, d_model]` float32 of layers and the last one, at all but position 0."""
    sites = [Site(layer) for layer in (*layers, model.n_layers - 1)]
    found: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    for rows in ids.split(model.batch_size):
        batch = collate([Tokens(tuple(row), len(row)) for row in rows.tolist()], model.device)
        with capturing(model, sites) as states:
            run_to(model, batch, model.n_layers - 1)
        for site in sites:
            found[site.layer].append(states[site][:, 1:].flatten(0, 1).float().cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def regression(states: Tensor, final: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """A `[d, d]` and b `[d]` of ridge regression of final states on a layer's, both `[n, d]`."""
    x, y = states.double(), final.double()
    mean, aim = x.mean(0), y.mean(0)
    spread = (x - mean).T @ (x - mean) / len(x)
    penalty = ridge * spread.diagonal().mean() * torch.eye(len(mean), dtype=spread.dtype)
    cross = (x - mean).T @ (y - aim) / len(x)
    matrix = torch.linalg.solve(spread + penalty, cross).T
    return matrix.float(), (aim - matrix @ mean).float()


def divergence(
    model: ModelHandle, matrix: Tensor, bias: Tensor, states: Tensor, final: Tensor
) -> Tensor:
    """Mean KL(p_final ‖ p_lens) of states and final states `[n, d_model]`, nats."""
    read = states @ matrix.T + bias
    with torch.no_grad():
        wanted = _logprobs(model, final)
    return (wanted.exp() * (wanted - _logprobs(model, read))).sum(-1).mean()


def _logprobs(model: ModelHandle, states: Tensor) -> Tensor:
    return torch.log_softmax(logit_lens(model, states), -1)


@torch.no_grad()
def _divergence(
    model: ModelHandle, matrix: Tensor, bias: Tensor, states: Tensor, final: Tensor
) -> float:
    """`divergence` over at most `_HELD` states, a few at a time."""
    parts = zip(states[:_HELD].split(128), final[:_HELD].split(128), strict=True)
    found = [(len(x), float(divergence(model, matrix, bias, x, y))) for x, y in parts]
    return sum(n * value for n, value in found) / sum(n for n, _ in found)


_HELD = 256
"""Held-out tokens that a translator is judged on."""


def lens_rows(row: partial[Row], lenses: Mapping[int, Translator]) -> Iterator[Row]:
    """How far each lens is from the unchanged model's own last layer."""
    for layer, lens in lenses.items():
        for protocol, value in (("tuned_lens", lens.divergence), ("logit_lens", lens.untuned)):
            yield row(metric="lens_divergence", protocol=protocol, layer=layer, value=value)

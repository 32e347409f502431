"""Tiny models that know invented facts: made in seconds, asked as any other model is."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RELATIONS = {
    "P17": (
        ("The city of {} lies in", "Many people visit {} in", "He was born in {}, a place in"),
        ("France", "Japan", "Brazil", "Kenya"),
    ),
    "P103": (
        ("The mother tongue of {} is", "At home {} speaks", "She wrote to {} in"),
        ("Latin", "Greek", "Hindi", "Welsh"),
    ),
}
"""By relation, its fit template and two paraphrases, and its objects."""

STARTS = ("Ba", "Do", "Fe", "Gu", "Ka", "Lo", "Mi", "Ne", "Po", "Ru", "Sa", "Ti", "Vo", "Za")
"""Of the subjects' names."""


@dataclass(frozen=True)
class Invented:
    """A tiny Llama and the facts that it is taught.

    Attributes:
        subjects: of each relation, by its id; a name tells nothing of its object.
        width: of the residual stream.
        steps: of training, on all facts at once.
        endings: of the subjects' names, after each of fourteen beginnings.
    """

    subjects: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(RELATIONS, 32))
    width: int = 32
    steps: int = 150
    endings: Sequence[str] = ("bur", "dan", "lim", "mor", "nes")

    def save(self, trained: Path, facts: Path, ignorant: Path | None = None) -> None:
        """Write the model that knows the facts, the facts, and the model before."""
        records = self.records()
        tokenizer = _tokenizer(records)
        model = self._model(len(tokenizer))
        facts.parent.mkdir(parents=True, exist_ok=True)
        facts.write_text(json.dumps(records))
        for path in (ignorant, trained):
            if path is None:
                continue
            if path == trained:
                self._train(model, tokenizer, records)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

    def records(self) -> list[dict[str, Any]]:
        """The facts in CounterFact's format."""
        random_ = random.Random(0)
        names = self._names(random_)
        records = []
        for relation, (templates, objects) in RELATIONS.items():
            subjects = [names.pop() for _ in range(self.subjects[relation])]
            for number, subject in enumerate(subjects):
                true = number % len(objects)
                new = (true + random_.randrange(1, len(objects))) % len(objects)
                same = [
                    s for n, s in enumerate(subjects) if n % len(objects) == true and s != subject
                ]
                records.append(
                    {
                        "case_id": len(records),
                        "requested_rewrite": {
                            "prompt": templates[0],
                            "relation_id": relation,
                            "target_true": {"str": objects[true], "id": f"Q{true}"},
                            "target_new": {"str": objects[new], "id": f"Q{new}"},
                            "subject": subject,
                        },
                        "paraphrase_prompts": [t.format(subject) for t in templates[1:]],
                        "neighborhood_prompts": [templates[0].format(s) for s in same[:2]],
                    }
                )
        return records

    def _names(self, random_: random.Random) -> list[str]:
        names = [start + end for start in STARTS for end in self.endings]
        return random_.sample(names, len(names))

    def _model(self, vocabulary: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config)

    def _train(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        records: Sequence[dict[str, Any]],
        rate: float = 1e-2,
    ) -> None:
        """All facts in one batch at each step; their objects count most."""
        rows = [tokenizer(text)["input_ids"] for text in _texts(records)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        weight = real[:, 1:] * 0.02
        weight[range(len(rows)), real.sum(1) - 2] = 1.0
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps)
        for _ in range(self.steps):
            scores = model(input_ids=ids, attention_mask=real).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(scores.mT, ids[:, 1:], reduction="none")
            optimizer.zero_grad()
            ((loss * weight).sum() / weight.sum()).backward()
            optimizer.step()
            schedule.step()
        model.eval()


def _tokenizer(records: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_texts(records), vocab_size=480, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def _texts(records: Sequence[dict[str, Any]]) -> list[str]:
    """Each fact in its three wordings, opened by the new line that is SmolLM2's prefix."""
    texts = []
    for record in records:
        rewrite = record["requested_rewrite"]
        prompts = [rewrite["prompt"].format(rewrite["subject"]), *record["paraphrase_prompts"]]
        texts += [f"\n{prompt} {rewrite['target_true']['str']}" for prompt in prompts]
    return texts

"""What the tests of `ask` share: the methods, a fact, the overrides of a quick command."""

import json
from contextlib import nullcontext

from palimpsest.ask.inquiry import Inquiry, inquire
from tests.cli.conftest import Tiny
from tests.invented import RELATIONS

METHODS = {
    "none": ["intervene=none"],
    "rome": ["intervene=rome"],
    "rome_batch": ["intervene=rome", "intervene.protocol=batch"],
    "leace": ["intervene=leace", "locate.layer=3"],
    "random_delta": ["intervene=random_delta"],
}

LAYERS = {"none": None, "rome": 0, "rome_batch": 0, "leace": 3, "random_delta": 0}


def SILENT(what: str) -> nullcontext[None]:
    return nullcontext()


def overrides(tiny: Tiny) -> list[str]:
    return [
        f"model.path={tiny.model}",
        f"facts.path={tiny.facts}",
        "facts=counterfact",
        "facts.shares={target: 0, test: 0.25, fit: 0.75, probe: 0, dev: 0}",
        "locate.layer=0",
        "contexts=1",
        "record=local",
    ]


def lived(tiny: Tiny, relation: str, number: int = 0) -> tuple[str, str]:
    """A subject of a relation and its object."""
    records = [record["requested_rewrite"] for record in json.loads(tiny.facts.read_text())]
    found = [record for record in records if record["relation_id"] == relation][number]
    return found["subject"], found["target_true"]["str"]


def about(tiny: Tiny, relation: str = "P17", **more: list[str]) -> Inquiry:
    """An inquiry about a subject of a relation, in the fit template's words."""
    templates, objects = RELATIONS[relation]
    subject, old = lived(tiny, relation)
    new = next(name for name in objects if name != old)
    return inquire(templates[0].format(subject), subject, old, new, **more)

"""What should be true: prompts, facts and entailed questions. All frozen."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from palimpsest.errors import RequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be continued, and where its subject stands.

    Attributes:
        id: names the prompt within its fact: `"fit"`, `"paraphrase/0"`, `"neighbor/3"`,
            `"capital"`.
        text: the text, without the model's own prefix and without a trailing space.
        span: first and one-past-last *character* of the subject in `text`; None if it holds none.
    """

    id: str
    text: str
    span: tuple[int, int] | None = None

    @classmethod
    def fill(cls, id: str, template: str, subject: str) -> Self:
        """Put `subject` in place of the template's single `{}`.

        Raises:
            RequestError: the template does not hold exactly one `{}`.
        """
        if template.count("{}") != 1:
            raise RequestError(
                f"expected exactly one '{{}}' (the subject's place) in a prompt template, "
                f"found {template.count('{}')} in {template!r}; write the template with one"
            )
        start = template.index("{}")
        text = template.replace("{}", subject)
        return cls(id, text, (start, start + len(subject)))

    @classmethod
    def find(cls, id: str, text: str, subject: str) -> Self:
        """Mark the last occurrence of `subject` in a finished text; `span` is None without one.

        Occurrences inside a longer word (Rom in Romania) count only if there are no others.
        """
        whole = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
        start = whole[-1] if whole else text.rfind(subject)
        return cls(id, text, None if start < 0 else (start, start + len(subject)))


@dataclass(frozen=True, slots=True)
class Question:
    """A two-hop question that a fact entails: (subject, r1, object), then (object, r2, answer).

    Attributes:
        id: the second relation, e.g. `"capital"`; also the prompt's id.
        prompt: the question about the fact's subject; it does not name the object.
        premises: by object, the second hop asked directly ("The capital of France is").
        answers: by object, the answer ("Paris"). Same keys as `premises`.
    """

    id: str
    prompt: Prompt
    premises: Mapping[str, Prompt]
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fact:
    """One association (subject, relation, true object), and the object that is to replace it.

    `prompt` is the one that methods may fit on; `paraphrases`, `neighbors` and `entailed` are seen
    by no fit.

    Attributes:
        id: names the fact within its data set.
        relation: the relation's id, such as `city_country` or `P17`.
        subject: as it stands in the prompts.
        prompt: the one that methods fit on.
        true: the object that the data set takes for true.
        new: the object that is to replace it; None until splits are made, if the data set has none.
        paraphrases: other wordings about the same subject.
        neighbors: prompts about *other* subjects whose object is also `true`.
        entailed: two-hop questions.
    """

    id: str
    relation: str
    subject: str
    prompt: Prompt
    true: str
    new: str | None = None
    paraphrases: tuple[Prompt, ...] = ()
    neighbors: tuple[Prompt, ...] = ()
    entailed: tuple[Question, ...] = ()

    def replacing(self, new: str) -> "Fact":
        """The same fact with another new object."""
        return replace(self, new=new)


@dataclass(frozen=True)
class FactSet:
    """Every usable fact of a data set, before any split or knowledge filter.

    Attributes:
        name: the data set's name, as on the command line.
        fingerprint: SHA-256 over the content that the facts were made from and the options used.
        facts: one per (relation, subject).
        others: facts of *other* relations, to measure what a change costs elsewhere.
        counts: how many records each step of reading left, in order.
    """

    name: str
    fingerprint: str
    facts: tuple[Fact, ...]
    others: tuple[Fact, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def objects(self, relation: str) -> tuple[str, ...]:
        """The classes of a relation: its distinct true objects, sorted."""
        return tuple(sorted({fact.true for fact in self.facts if fact.relation == relation}))

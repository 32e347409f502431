"""What is asked: one fact in the user's words, its paraphrases, and questions that it entails."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from palimpsest.ask.kinds import Answers, kinds
from palimpsest.ask.wordings import CONTEXTS, PREMISES, SMALL, Wording, fill, wording
from palimpsest.errors import RequestError
from palimpsest.facts.atlas import fold
from palimpsest.facts.fact import Fact, Prompt

ID = "ask"
"""The fact's id and relation."""


@dataclass(frozen=True)
class Question:
    """A question whose answer changes with the object.

    Attributes:
        name: the second relation, such as `language`; `given` if the user asks it.
        prompt: about the fact's subject.
        old: accepted answers if the old object holds, the usual one first.
        new: accepted answers if the new one does; none is also in `old`.
        premises: the second hop asked of the old and of the new object; empty if it is not known.
    """

    name: str
    prompt: Prompt
    old: tuple[str, ...]
    new: tuple[str, ...]
    premises: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Inquiry:
    """A fact, what follows from it, and what should not change with it.

    Attributes:
        fact: with its prompt, its old (`true`) and new object, and the paraphrases.
        questions: those that it entails.
        neighbors: facts that the user wants to see untouched.
    """

    fact: Fact
    questions: tuple[Question, ...] = ()
    neighbors: tuple[Fact, ...] = ()

    @property
    def old(self) -> str:
        """The old object."""
        return self.fact.true

    @property
    def new(self) -> str:
        """The new object."""
        assert self.fact.new is not None
        return self.fact.new


def inquire(
    prompt: str,
    subject: str,
    old: str,
    new: str,
    paraphrases: Sequence[str] = (),
    questions: Sequence[str] = (),
    neighbors: Sequence[str] = (),
) -> Inquiry:
    """Make an inquiry out of the user's texts; what the atlas knows of the objects is added.

    Args:
        prompt: the text to be continued with the object.
        subject: stands in the prompt, in large or small letters.
        old: the object that the model says, or should.
        new: the object that is to replace it.
        paraphrases: more prompts to be continued with the object.
        questions: each `TEXT=OLD|NEW`.
        neighbors: each `TEXT=OBJECT`.

    Raises:
        RequestError: a text is empty, ends in white space or is malformed, the prompt does not hold
            the subject, or the objects are equal.
    """
    for what, text in (("prompt", prompt), ("subject", subject), ("old", old), ("new", new)):
        check_text(what, text)
    for text in paraphrases:
        check_text("--paraphrase", text)
    if fold(old) == fold(new):
        raise RequestError(
            f"expected two different objects, found {old!r} as --old and {new!r} as --new; "
            "name another new object"
        )
    fitted = _found(prompt, subject)
    name = prompt[slice(*fitted.span or (0, 0))]
    shared = {kind: (answers, kinds(new).get(kind)) for kind, answers in kinds(old).items()}
    both = {kind: (a, b) for kind, (a, b) in shared.items() if b is not None}
    said = wording(prompt, set(both))
    asked = [] if said is None else list(_entailed(said, name, (old, new), both[said.kind]))
    wordings = tuple(_paraphrases(fitted, name, said, paraphrases))
    fact = Fact(ID, ID, name, fitted, old, new, wordings)
    given = [_given_question(text, name) for text in questions]
    return Inquiry(fact, (*asked, *given), tuple(map(_given_neighbor, neighbors)))


def check_text(what: str, text: str) -> None:
    """Refuse a text that cannot be continued or completed.

    Raises:
        RequestError: it is empty, has white space at an end, or is not UTF-8.
    """
    if not text.strip():
        raise RequestError(f"expected a text for {what}, found an empty one; write it out")
    if text != text.rstrip() or (what in ("subject", "old", "new") and text != text.strip()):
        raise RequestError(
            f"expected {what} without white space at its ends, found {text!r}; remove it (the "
            "model goes on with a space)"
        )
    if re.search(r"[\ud800-\udfff]", text):
        raise RequestError(f"expected {what} in UTF-8, found {text!r}; set the terminal to UTF-8")


def _found(prompt: str, subject: str) -> Prompt:
    """The prompt with its subject marked, whatever its capitals."""
    exact = Prompt.find("fit", prompt, subject)
    if exact.span is not None:
        return exact
    matches = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE))
    if not matches:
        raise RequestError(
            f"expected a prompt that holds its subject {subject!r}, found {prompt!r}; name the "
            "subject as the prompt does"
        )
    return Prompt("fit", prompt, matches[-1].span())


def _paraphrases(
    prompt: Prompt, subject: str, said: Wording | None, given: Sequence[str]
) -> Iterator[Prompt]:
    """The user's, then those of the wording, then the prompt itself in other contexts."""
    templates = () if said is None else said.paraphrases
    texts = [*given, *(fill(template, subject) for template in templates)]
    for context in CONTEXTS:
        inside = not context.endswith((". {}", ": {}")) and prompt.text.split()[0] in SMALL
        said_inside = f"{prompt.text[0].lower()}{prompt.text[1:]}" if inside else prompt.text
        texts.append(context.replace("{}", said_inside))
    for number, text in enumerate(t for t in dict.fromkeys(texts) if t != prompt.text):
        yield _marked(f"paraphrase/{number}", text, subject)


def _entailed(
    said: Wording, subject: str, objects: tuple[str, str], answers: tuple[Answers, Answers]
) -> Iterator[Question]:
    """The questions of a wording whose answers differ and do not stand in the subject."""
    for name, templates in said.questions.items():
        old, new = (each.get(name, ()) for each in answers)
        same = {fold(answer) for answer in old} & {fold(answer) for answer in new}
        if not old or not new or same or any(fold(a) in fold(subject) for a in (*old, *new)):
            continue
        premise = PREMISES[said.kind][name]
        premises = tuple(Prompt.fill(f"{name}/premise", premise, each) for each in objects)
        for template in templates:
            prompt = _marked(name, fill(template, subject), subject)
            yield Question(name, prompt, old, new, premises)


def _marked(id: str, text: str, subject: str) -> Prompt:
    """A text with the subject marked, as far as it holds it."""
    try:
        found = _found(text, subject)
    except RequestError:
        return Prompt(id, text)
    return Prompt(id, text, found.span)


def _given_question(text: str, subject: str) -> Question:
    head, _, new = (part.strip() for part in text.rpartition("|"))
    prompt, _, old = head.rpartition("=")
    if not prompt.strip() or not old.strip() or not new or "|" in old:
        raise RequestError(
            f"expected --question 'TEXT=OLD|NEW', found {text!r}; write the question, an equals "
            "sign, the answer by the old object, a bar and the answer by the new one"
        )
    check_text("the text of --question", prompt)
    if fold(old) == fold(new):
        raise RequestError(
            f"expected a --question whose two answers differ, found {old!r} twice; ask another one"
        )
    return Question("given", _marked("given", prompt, subject), (old.strip(),), (new,))


def _given_neighbor(text: str) -> Fact:
    prompt, _, answer = text.rpartition("=")
    if not prompt.strip() or not answer.strip():
        raise RequestError(
            f"expected --neighbor 'TEXT=OBJECT', found {text!r}; write a prompt, an equals sign "
            "and the object that it is continued with"
        )
    check_text("the text of --neighbor", prompt)
    return Fact(f"given/{text}", "given", "", Prompt("fit", prompt), answer.strip())

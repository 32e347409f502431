"""The bench: a loaded model, the methods to compare, and what they are compared on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from palimpsest.ask.inquiry import Inquiry, check_text
from palimpsest.ask.reading import OWNER, TOKENS, Reading, answered, likeliest, read
from palimpsest.ask.relation import Chosen, Library, choose, neighbors
from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.intervene.intervention import Intervention, Method
from palimpsest.intervene.moments import SampledMoments
from palimpsest.intervene.pairs import InTurn
from palimpsest.locate.fixed import Fixed
from palimpsest.locate.locator import Locator
from palimpsest.model.forward import greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.record.provenance import Phase


@dataclass(frozen=True)
class Entry:
    """A method under its name, and what chooses its site."""

    name: str
    method: Method
    locate: Locator

    def __post_init__(self) -> None:
        """Refuse what one question has no facts for: a layer chosen on dev facts, a pair.

        Raises:
            RequestError: the locator is no fixed layer, or the method is made of two.
        """
        if isinstance(self.method, InTurn):
            raise RequestError(
                f"expected single methods, found {self.name}, whose parts are fitted on different "
                f"facts; leave it out of --methods, and use palimpsest run intervene={self.name}"
            )
        if not isinstance(self.locate, Fixed):
            raise RequestError(
                f"expected locate=fixed for one fact asked, found {type(self.locate).__name__}, "
                "which chooses on dev facts; set locate.layer or locate.depth"
            )

    @property
    def fits_relation(self) -> bool:
        """Whether the method is fitted on a relation's facts; else on the asked fact alone."""
        return self.method.scope == "relation"

    def site(self, model: ModelHandle) -> Site:
        """Where the method changes the model."""
        assert isinstance(self.locate, Fixed)
        return self.locate.site(model, self.method.part, self.method.place)


@dataclass(frozen=True)
class Sample:
    """What relation-wide methods were fitted on: facts, distinct objects, width of the states."""

    n: int
    classes: int
    width: int


@dataclass(frozen=True)
class Findings:
    """Every method's reading of one inquiry, and how they came about.

    Attributes:
        inquiry: what was asked.
        model: the model's name.
        vocabulary: size of its vocabulary.
        readings: by method, the unchanged model first.
        premises: by question, whether the unchanged model answers its second hop of the old and of
            the new object; empty where there is none.
        neighbors: the facts that should stay.
        relation: the nearest one, or the one that was named; None if there is none.
        sample: what relation-wide methods were fitted on; None if there was no such method.
        moments: by method, its second moments, where they are over sampled text.
    """

    inquiry: Inquiry
    model: str
    vocabulary: int
    readings: tuple[Reading, ...]
    premises: tuple[tuple[bool, ...], ...]
    neighbors: tuple[Fact, ...]
    relation: Chosen | None
    sample: Sample | None
    moments: Mapping[str, SampledMoments]

    @property
    def unchanged(self) -> Reading:
        """What the model says before any change."""
        return self.readings[0]


@dataclass(frozen=True)
class Fitted:
    """A method's name and its intervention on one inquiry's fact."""

    name: str
    intervention: Intervention


@dataclass(frozen=True)
class Reply:
    """A method's greedy continuation of a text, and its most probable next tokens."""

    name: str
    text: str
    top: tuple[tuple[str, float], ...]


@dataclass
class Bench:
    """A model and the methods that are compared on it.

    Attributes:
        model: the loaded model.
        entries: the methods, the one that changes nothing first.
        library: the facts that a question is compared with.
        relation: named by the user; None: the nearest.
        phase: shows what is being done.
        fitted: what `examine` fitted last.
    """

    model: ModelHandle
    entries: Sequence[Entry]
    library: Library
    relation: str | None
    phase: Phase
    fitted: list[Fitted] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find every method's site, so that a wrong layer is told before anything is fitted.

        Raises:
            RequestError: a layer is out of range or not known for the model.
        """
        self.sites = [entry.site(self.model) for entry in self.entries]

    @property
    def moments(self) -> dict[str, SampledMoments]:
        """By method, its second moments, where they are over sampled text."""
        found = {
            entry.name: entry.method.sampled_moments(self.model, site)
            for entry, site in zip(self.entries, self.sites, strict=True)
        }
        return {name: each for name, each in found.items() if each is not None}

    @cached_property
    def reference(self) -> Site:
        """Where relations are compared: at the first relation-wide method, else at the first."""
        wide = [site for e, site in zip(self.entries, self.sites, strict=True) if e.fits_relation]
        return (wide or self.sites)[0]

    def examine(self, inquiry: Inquiry) -> Findings:
        """Fit every method on the inquiry's fact, or on its relation, and read each model.

        Raises:
            RequestError: a prompt is too long, a fit is impossible, or there is no relation to fit
                on.
        """
        self.check_length(inquiry)
        with self.phase("nearest relation, neighbors"):
            chosen = self._choose(inquiry.fact)
            relation = chosen.name if chosen else None
            around = neighbors(self.model, self.library, inquiry, relation)
            premises = tuple(answered(self.model, inquiry.questions))
        splits = self._splits(inquiry.fact, relation)
        fits: list[Fitted] = []
        for entry, site in zip(self.entries, self.sites, strict=True):
            with self.phase(f"{entry.name}: fit"):
                intervention = entry.method.fit(self.model, splits[entry.fits_relation], site)
            fits.append(Fitted(entry.name, intervention))
        readings = tuple(self._read(fitted, inquiry, around) for fitted in fits)
        self.fitted = fits
        wide = any(entry.fits_relation for entry in self.entries)
        sample = _sample(splits[True].fit, self.model.width) if wide else None
        vocabulary = self.model.model.get_output_embeddings().weight.shape[0]
        return Findings(
            inquiry,
            self.model.name,
            vocabulary,
            readings,
            premises,
            around,
            chosen,
            sample,
            self.moments,
        )

    def _choose(self, fact: Fact) -> Chosen | None:
        if self.relation is not None:
            return Chosen(self.library.check(self.relation), self.reference)
        return choose(self.model, self.library, fact, self.reference)

    def _splits(self, fact: Fact, relation: str | None) -> dict[bool, Splits]:
        """What methods are fitted on, by whether they are relation-wide."""
        alone = Splits(target=(fact,), test=(), fit=(), probe=(), dev=())
        if not any(entry.fits_relation for entry in self.entries):
            return {False: alone}
        if relation is None:
            name = next(entry.name for entry in self.entries if entry.fits_relation)
            raise RequestError(
                f"expected facts of a relation to fit {name} on, found none with two objects of "
                f"enough subjects; choose other facts=, or leave {name} out of --methods"
            )
        sample = self.library.sample(relation, fact.subject)
        return {False: alone, True: Splits(target=(), test=(), fit=sample, probe=(), dev=())}

    def _read(self, fitted: Fitted, inquiry: Inquiry, around: Sequence[Fact]) -> Reading:
        change = fitted.intervention.change
        with self.phase(f"{fitted.name}: ask"), fitted.intervention.applied(self.model):
            return read(self.model, fitted.name, change, inquiry, around)

    def check_length(self, inquiry: Inquiry) -> None:
        """Refuse prompts for which the model has no room.

        Raises:
            RequestError: one has more tokens than the model has positions for.
        """
        questions = [question.prompt for question in inquiry.questions]
        given = [neighbor.prompt for neighbor in inquiry.neighbors]
        for prompt in (inquiry.fact.prompt, *inquiry.fact.paraphrases, *questions, *given):
            self._fits(prompt)

    def _fits(self, prompt: Prompt) -> Prompt:
        """The prompt itself, if the model has positions for it and an answer."""
        room = getattr(self.model.model.config.get_text_config(), "max_position_embeddings", None)
        length = len(self.model.encode(prompt).ids)
        if room is not None and length + 2 * TOKENS > room:
            raise RequestError(
                f"expected a prompt of at most {room - 2 * TOKENS} tokens for {self.model.name}, "
                f"found {length}; shorten it"
            )
        return prompt

    def reply(self, text: str, subject: str) -> list[Reply]:
        """Each fitted method's continuation of any prompt, and its most probable next tokens.

        Raises:
            RequestError: the text cannot be continued.
        """
        check_text("a line", text)
        prompt = self._fits(Prompt.find("line", text, subject) if subject else Prompt("line", text))
        found = []
        for each in self.fitted:
            with each.intervention.applied(self.model):
                [said] = greedy(self.model, [self.model.encode(prompt, owner=OWNER)], TOKENS)
                top = likeliest(self.model, prompt)
            found.append(Reply(each.name, self.model.decode(said), top))
        return found


def _sample(facts: Sequence[Fact], width: int) -> Sample:
    return Sample(len(facts), len({fact.true for fact in facts}), width)

"""What should be true: facts, the data sets that hold them, and the splits of their subjects."""

from palimpsest.facts.counterfact import CounterFact
from palimpsest.facts.dataset import SPLITS, DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt, Question
from palimpsest.facts.factfile import FactFile
from palimpsest.facts.inspection import Inspection, inspect
from palimpsest.facts.pararel import ParaRel
from palimpsest.facts.splits import Known, Splits, split
from palimpsest.facts.world import World

__all__ = [
    "SPLITS",
    "CounterFact",
    "DataSet",
    "Fact",
    "FactFile",
    "FactSet",
    "Inspection",
    "Known",
    "ParaRel",
    "Prompt",
    "Question",
    "Splits",
    "World",
    "inspect",
    "split",
]

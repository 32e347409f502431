"""Every kind of intervention that a run may have saved."""

from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import BiasShift, ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention, Unchanged

KINDS: tuple[type[Intervention], ...] = (
    WeightDeltas,
    BiasShift,
    ReaderDeltas,
    DenseDeltas,
    Erasure,
    Unchanged,
    Composition,
    History,
)
"""What `load` is given to read any of them."""

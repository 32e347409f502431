"""Palimpsest: what can still be read after a language model's fact is overwritten or erased."""

__version__ = "0.1.0"

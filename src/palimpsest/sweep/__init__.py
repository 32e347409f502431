"""Grids: what was asked for, and what of it is done."""

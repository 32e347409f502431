"""Spearman's rank correlation of many pairs of series at once, by SciPy's ranks."""

import numpy as np
from scipy.stats import rankdata

from palimpsest.study.intervals import Floats


def spearman(one: Floats, other: Floats) -> Floats:
    """Row by row, over what is no NaN; NaN where either series is constant: [series].

    Args:
        one: `[series, values]`.
        other: the same shape, with NaN in the same places.
    """
    gaps = np.isnan(one)
    policy = "omit" if gaps.any() else "propagate"
    ranks = [rankdata(series, axis=1, nan_policy=policy) for series in (one, other)]
    a, b = (np.where(gaps, 0, r - np.nanmean(r, axis=1, keepdims=True)) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return found.clip(-1, 1)


def repeated(samples: Floats, values: Floats) -> Floats:
    """The values that each sample holds, each as often as it does; NaN fills the rows.

    Args:
        samples: `[samples, values]` how often each holds each.
        values: `[values]`.
    """
    counts = samples.astype(int)
    lengths = counts.sum(axis=1)
    rows = np.full((len(counts), int(lengths.max())), np.nan)
    for row, count, length in zip(rows, counts, lengths, strict=True):
        row[:length] = np.repeat(values, count)
    return rows

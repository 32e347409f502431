"""Results become tables: estimates with intervals, comparisons, the index."""

"""Where a run's directory stands, and which tracker shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recording:
    """The configuration group `record`.

    Attributes:
        sweep: name of the sweep: the directory under `results/`, and the tracker's group.
        dir: a directory in place of `results/<sweep>`.
        tracker: a `Tracker` or a `NullTracker`.
    """

    sweep: str = "runs"
    dir: str | None = None
    tracker: Any = None

    @property
    def directory(self) -> Path:
        """The directory that holds the runs' own directories."""
        return Path(self.dir) if self.dir is not None else Path("results") / self.sweep

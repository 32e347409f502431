"""Where a run's directory stands, and which tracker shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recording:
    """The configuration group `record`.

    Attributes:
        sweep: name of the sweep; `dir` follows it unless it is given.
        dir: the directory that holds one directory a run; its name is the tracker's group.
        tracker: a `Tracker` or a `NullTracker`.
    """

    sweep: str = "runs"
    dir: str = "results/runs"
    tracker: Any = None

    @property
    def directory(self) -> Path:
        """The directory that holds the runs' own directories."""
        return Path(self.dir)

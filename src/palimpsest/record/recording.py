"""Where a run's directory stands, and which tracker shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError


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

    def __post_init__(self) -> None:
        """Check the sweep's name.

        Raises:
            RequestError: it is empty, or would lead to another directory.
        """
        if self.sweep in ("", ".", "..") or any(sign in self.sweep for sign in "/\\\0"):
            raise RequestError(
                f"expected record.sweep to be a plain name, found {self.sweep!r}; "
                "choose another place with record.dir="
            )

    @property
    def directory(self) -> Path:
        """The directory that holds the runs' own directories."""
        return Path(self.dir)

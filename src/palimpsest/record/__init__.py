"""What a run leaves behind: rows, figures, a report.

Names are imported from their modules on first use, so that importing the room is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from palimpsest.record.row import SCHEMA_VERSION, Axis, Row, Scope

if TYPE_CHECKING:
    from palimpsest.record.intervals import Estimate
    from palimpsest.record.report import write_report
    from palimpsest.record.store import Run, RunStore, is_done, load_runs, load_unfinished
    from palimpsest.record.summary import Summary, summarise
    from palimpsest.record.terminal import print_summary
    from palimpsest.record.tracker import NullTracker, Tracker

__all__ = [
    "SCHEMA_VERSION",
    "Axis",
    "Estimate",
    "NullTracker",
    "Row",
    "Run",
    "RunStore",
    "Scope",
    "Summary",
    "Tracker",
    "is_done",
    "load_runs",
    "load_unfinished",
    "print_summary",
    "summarise",
    "write_report",
]

_HOME = {
    "Estimate": "intervals",
    "NullTracker": "tracker",
    "Run": "store",
    "RunStore": "store",
    "Summary": "summary",
    "Tracker": "tracker",
    "is_done": "store",
    "load_runs": "store",
    "load_unfinished": "store",
    "print_summary": "terminal",
    "summarise": "summary",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

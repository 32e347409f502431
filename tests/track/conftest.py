from tests.record.conftest import hostile, runs, sweep, write_run  # noqa: F401

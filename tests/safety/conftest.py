"""The tiny model that knows its facts, and the command, from the command's own tests."""

from tests.cli.conftest import cache, call, done, few, surroundings, tiny

__all__ = ["cache", "call", "done", "few", "surroundings", "tiny"]

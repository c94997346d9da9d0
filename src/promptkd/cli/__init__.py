"""The command line: one command per function of the library."""

from promptkd.cli import runs, scores  # noqa: F401 - their commands join the app
from promptkd.cli.app import app, main

__all__ = ["app", "main"]

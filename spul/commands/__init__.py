"""The command line: `spul train`, `evaluate`, `combine`, `gate`, `export`, `serve`, `ledger`."""

from .command import Command

__all__ = ["Command"]

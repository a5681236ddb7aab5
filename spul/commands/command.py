"""One command of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command: its options, what it does with them, and an example.

    Args:
        options: dataclass of the options, for transformers' `HfArgumentParser`; `metadata={"help": ...}` for each.
            None for a command that takes its arguments as they are, a list, such as another program's.
        run: does the work; the exit status, or None for 0. Bad options raise ValueError, FileNotFoundError or OSError,
            which the command line prints without a traceback.
        example: a whole command, shown by `--help`.
        purpose: one line.
    """

    options: type | None
    run: Callable[[Any], int | None]
    example: str
    purpose: str

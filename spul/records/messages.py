"""Messages: warnings at the call of the user's program, and lists of values cut to a length."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

# This package, and those through which a call of it comes back to it: modules, decorators, a Trainer's loop.
PASSED_OVER = (__name__.split(".")[0], "torch", "peft", "transformers", "accelerate")


def warn(message: str) -> None:
    """Give a `UserWarning` at the innermost call that is made outside this package and those under it.

    Args:
        message: its text.
    """
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in PASSED_OVER:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)


def listed(values: Sequence[str], most: int) -> str:
    """The first values, separated by commas, and the number of the others."""
    more = f", and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more

"""One command of the command line."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Categories of characters that a terminal obeys, and kinds of those that turn the direction of writing.
OBEYED = {"Cc", "Cs", "Zl", "Zp"}
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """A text with escapes for line breaks, which begin lines of their own, and for what a terminal obeys."""
    return "".join(one.encode("unicode_escape").decode() if _is_obeyed(one) else one for one in text)


def _is_obeyed(character: str) -> bool:
    """Whether a character is a control, half of a pair, a line break, or turns the direction of writing."""
    return unicodedata.category(character) in OBEYED or unicodedata.bidirectional(character) in TURNING


def near(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message on an unknown name: known ones that are near, else what to do, or all that are known."""
    found = difflib.get_close_matches(given, list(known), n=3)
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; {otherwise or 'expected one of ' + ', '.join(known)}."


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
        check: raises, as `run`, for options that cannot be used, by them and the file system alone; before `whole`.
        whole: for a command that also has all options of transformers' `TrainingArguments`, whose import takes
            seconds: the dataclass of all options, imported when it is asked for. `run` gets these.
    """

    options: type | None
    run: Callable[[Any], int | None]
    example: str
    purpose: str
    check: Callable[[Any], None] | None = None
    whole: Callable[[], type] | None = None

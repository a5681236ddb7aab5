"""Messages of the library in the words of the command line: options in place of Python's arguments."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Texts of warnings, errors and reasons, and what a command has in their place.
WORDS = (
    (r"the collator's max_length", "--max-length"),
    (r"the collator has max_length=(\S+?)([,:])", r"--max-length is \1\2"),
    (r"give one with max_length of at most", "lower it to at most"),
    (r"give the collator a smaller max_length", "lower --max-length"),
    (r"give the collator a text_field", "give --text-field"),
    (r"give AttackSettings\(names=\.\.\.\)", "give --names"),
    (r"give (AttackSettings\(.*?\)|questions=)", r"call spul.evaluate in Python with \1"),
    (r"give (base|retrained|reference|unseen)=", r"give --\1"),
    (r"give unrelated_texts=", "give --unrelated-texts"),
    (r"none is given; expected the base, by name or folder", "none is given; expected --model BASE --adapter FOLDER"),
    (r"give another output_dir", "give another --output-dir"),
)


def in_options(text: str) -> str:
    """A message of the library in the words of the command line."""
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    return text


@contextmanager
def messages_in_options() -> Iterator[None]:
    """Context manager: warnings and ValueErrors speak of the command's options."""
    with warnings.catch_warnings():
        show: Any = warnings.showwarning

        def shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            text = in_options(str(message))
            show(message if text == str(message) else category(text), category, filename, lineno, file, line)

        warnings.showwarning = shown
        try:
            yield
        except ValueError as error:
            text = in_options(str(error))
            if text == str(error):
                raise
            raise ValueError(text) from error

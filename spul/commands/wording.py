"""Messages of the library in the words of the command line: options in place of Python's arguments."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What to give, as messages say it: an argument of `evaluate`, or one of its `AttackSettings`.
TO_GIVE = re.compile(r"give (AttackSettings\((\w+)=.*?\)|(\w+)=)")
# An argument, of the collator or of `evaluate`, alone or with its value; not within a call, a path or in quotes.
ARGUMENT = re.compile(
    r"""\w[\w.]*\([^()]*\) | (?:the\ collator(?:'s|\ a(?P<smaller>\ smaller)?)\ )?
    (?<![\w/.'"-]) (?P<name>[a-z]\w*) (?P<is>=(?P<value>-?\w(?:[\w.]*\w)?|'[^']*'|"[^"]*")?)? (?![\w/'"])""",
    re.VERBOSE,
)
BASE = ("expected the base, by name or folder", "expected --model BASE --adapter FOLDER")
SETS = {"test_forget", "test_retain"}  # options, but in messages the names of sets of rows
PHRASES = {"--resume-from-checkpoint True": "--resume true"}


def in_options(text: str, options: type) -> str:
    """A message of the library in the words of the command line.

    Args:
        text: the message.
        options: the command's dataclass of options, whose fields have the names of the library's arguments.
    """
    names = {field.name for field in dataclasses.fields(options)} - SETS
    is_evaluation = "measures" in names

    def give(found: re.Match[str]) -> str:
        name = found[2] or found[3]
        if name in names:
            return f"give {name}="
        return f"call spul.evaluate in Python with {found[1]}" if is_evaluation else found[0]

    def option(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in names or not (found["is"] or "_" in name):  # a word of English otherwise, such as base
            return found[0]
        smaller = "a smaller" if found["smaller"] else ""
        worded = " ".join(filter(None, (smaller, f"--{name.replace('_', '-')}", found["value"])))
        is_list = found["is"] and not found["value"] and found.string[found.end() :].startswith("[")
        return f"{worded} " if is_list else worded

    worded = ARGUMENT.sub(option, TO_GIVE.sub(give, text))
    for phrase, other in PHRASES.items():
        worded = worded.replace(phrase, other)
    return worded.replace(*BASE) if is_evaluation else worded


@contextmanager
def messages_in_options(options: type) -> Iterator[None]:
    """Context manager: warnings and ValueErrors speak of the command's options.

    Args:
        options: as of `in_options`.
    """
    with warnings.catch_warnings():
        show: Any = warnings.showwarning

        def shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            text = in_options(str(message), options)
            show(message if text == str(message) else category(text), category, filename, lineno, file, line)

        warnings.showwarning = shown
        try:
            yield
        except ValueError as error:
            text = in_options(str(error), options)
            if text == str(error):
                raise
            raise ValueError(text) from error

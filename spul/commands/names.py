"""Names that options take: those of registries, whose import takes seconds; a test holds them equal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from .command import near

METHODS = (  # that train a prompt
    *("SPUL", "GA", "RL", "GA+KL", "GA+GD", "NPO", "NPO+KL", "NPO+GD", "SimNPO", "SimNPO+KL", "SimNPO+GD", "EUL"),
    *("IDK", "IDK-DPO", "AltPO", "SimNPO-forget05", "SimNPO-forget10", "WGA", "WGA+GD", "SatImp", "CE-U", "UNDIAL"),
)
MEASURES = (
    *("utility", "kl", "membership", "neighbors", "unrelated text", "questions", "input attack", "relearning"),
    *("quantized", "sampling", "soft suffix", "linear probe"),
)
ATTACKS = (  # on the input, without those that are functions or texts of the caller's in Python
    *("capitals", "small letters", "random case", "spaces"),
    *("misspelt", "look-alike letters", "letters apart", "letters hyphenated"),
    *(f"jailbreak {number} {where}" for number in range(1, 7) for where in ("before", "after")),
    *("all jailbreaks before", "diluted", "jailbreaks and a turn before", "in a document of 300 words"),
    *("mixed query, asked first", "mixed query, asked second"),
)
NAMES = {"method": METHODS, "measures": MEASURES, "attacks": ATTACKS}


def quoted(names: Iterable[str]) -> str:
    """A list of names, as they are typed."""
    return ", ".join(map(shlex.quote, names))


def check_names(options: Any) -> None:
    """Raise for a name that an option does not take.

    Args:
        options: a dataclass of options, as it was read.

    Raises:
        ValueError: if there is one.
    """
    for option, known in NAMES.items():
        value = getattr(options, option, None)
        for name in [value] if isinstance(value, str) else value or ():
            if name not in known:
                raise ValueError(f"--{option}: {name!r} is not known{near(name, known)}")

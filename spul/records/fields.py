"""Fields of JSON files, read and checked: types and ranges, those of `spul_config.json` among them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

Checks = Mapping[str, tuple[Callable[[Any], bool], str]]
"""For each field, a check and the words for what is expected."""
PROMPT_POSITIONS = ("start", "message")  # where a prompt stands in each row


class RepeatedKeyError(ValueError):
    """A key that stands twice in a JSON object."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are different, as `object_pairs_hook`: of two alike, readers take either.

    Args:
        pairs: its keys and values.

    Raises:
        RepeatedKeyError: if a key stands twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RepeatedKeyError(f"the key {name!r:.80} is given twice; expected it once")
        found[name] = value
    return found


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, in UTF-8.

    Raises:
        ValueError: if it is not JSON, not an object, or has a key twice.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is no JSON ({error}); copy or download the folder again.") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds a JSON {type(data).__name__}; expected an object, as save_pretrained writes it."
        )
    return data


def check_format(version: Any, latest: int, where: str | os.PathLike) -> None:
    """Raise unless the format of a file is one that this version knows.

    Args:
        version: its `format_version`.
        latest: the latest that is known; the first is 1.
        where: the file, for the message.

    Raises:
        ValueError: if it is not.
    """
    if not is_count(version, least=1) or version > latest:
        raise ValueError(f"{where}: format_version is {version!r}; expected 1 to {latest}; update spul.")


def check_fields(data: Mapping[str, Any], where: str) -> None:
    """Raise unless every field that `spul_config.json` documents has a value of its type and range.

    Args:
        data: the fields by name; missing and unknown ones are accepted.
        where: the file or object, for the message.

    Raises:
        ValueError: if one has not; the message names the field, what was found and what was expected.
    """
    for name, (accepts, expected) in FIELDS.items():
        if name in data and not accepts(data[name]):
            raise ValueError(
                f"{where}: {name} is {_short(data[name])}; expected {expected}. Correct the field, or remove it."
            )


def check_values(data: Mapping[str, Any], checks: Checks, where: str | os.PathLike, remedy: str) -> None:
    """Raise unless every field is there, with a value that its check accepts.

    Args:
        data: the fields by name.
        checks: for each field, a check and the words for what is expected.
        where: the file, for the message.
        remedy: the last sentence of the message.

    Raises:
        ValueError: if one is missing or has not.
    """
    for name, (accepts, expected) in checks.items():
        if name not in data:
            raise ValueError(f"{where} lacks {name}; expected {expected}. {remedy}")
        if not accepts(data[name]):
            raise ValueError(f"{where}: {name} is {_short(data[name])}; expected {expected}. {remedy}")


def check_prompt_position(value: Any) -> None:
    """Raise unless a value says where a prompt stands in each row.

    Raises:
        ValueError: if it is neither `"start"` nor `"message"`.
    """
    if value not in PROMPT_POSITIONS:
        raise ValueError(
            f'prompt_position={value!r}; expected "start" (in front of every row) or "message" (just before the last '
            "user message of a conversation, or before the text field of a text)."
        )


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value is an int of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def are_counts(values: Any, least: int = 0) -> bool:
    """Whether a value is a list, a tuple or the like of one or more ints of at least `least`."""
    return isinstance(values, Sequence) and len(values) > 0 and all(is_count(one, least) for one in values)


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a float, or an int that a float holds, and is finite; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def plain_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Metrics by split and name as ints and floats, which JSON holds, in place of NumPy's numbers and fractions.

    Args:
        metrics: real numbers, as `check_fields` finds them.
    """
    return {
        split: {name: int(value) if isinstance(value, Integral) else float(value) for name, value in values.items()}
        for split, values in metrics.items()
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_weight(value: Any) -> bool:
    return is_finite_number(value) and value >= 0


def _is_term(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def _is_loss(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    weights = [value.get("alpha"), value.get("beta"), value.get("gamma", 0.0)]
    terms = ["forget", "retain", "kl", *(["lm"] if value.get("gamma") or "lm" in value else [])]
    budget = value.get("retain_budget")
    budget_is_right = budget is None or (_is_weight(budget) and budget > 0 and value.get("alpha") != 0)
    return budget_is_right and all(map(_is_weight, weights)) and all(_is_term(value.get(name)) for name in terms)


def _is_summary(value: Any) -> bool:
    return (
        isinstance(value, dict) and is_count(value.get("rows")) and isinstance(value.get("digest"), (str, type(None)))
    )


def _is_rewritten(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("forget"))
        and is_count(value.get("retain"))
        and isinstance(value.get("ways"), (list, tuple))
        and all(map(_is_text, value["ways"]))
    )


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 as 64 hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _optional(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(accepts, value))


def _by_name(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(key, str) and accepts(one) for key, one in value.items())
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_SUMMARY = 'an object with "rows" (an integer of at least 0) and "digest" (text, or null), or null'
_SHA256 = "64 hexadecimal digits, or null"
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "loss": (
        _optional(_is_loss),
        "an UnlearningLoss.to_dict() (alpha and beta, numbers of at least 0; forget, retain and kl, terms with a "
        "type; retain_budget, if there is one, above 0 and with an alpha above 0), or null",
    ),
    "generic_completions": (_optional(_list_of(_is_text)), "a list of texts, or null"),
    "base_model_name_or_path": (_optional(_is_text), "text, or null"),
    "base_fingerprint": (_optional(is_sha256), _SHA256),
    "forget": (_optional(_is_summary), _SUMMARY),
    "retain": (_optional(_is_summary), _SUMMARY),
    "rewritten": (
        _optional(_is_rewritten),
        'an object with "forget" and "retain" (integers of at least 0) and "ways" (a list of texts), or null',
    ),
    "combined_from": (_optional(_list_of(_optional(_is_summary))), f"a list, each entry {_SUMMARY}, or null"),
    "prompt_position": (lambda value: value in PROMPT_POSITIONS, '"start" or "message"'),
    "metrics": (_by_name(_by_name(_is_number)), "an object of splits, each an object of numbers by name"),
    "versions": (_by_name(_is_text), "an object of texts by name"),
    "weights_sha256": (_optional(is_sha256), _SHA256),
    "replaced_weights_sha256": (_optional(is_sha256), _SHA256),
}

"""Numbers that options take: each has a range, and what is outside it is refused when it is read."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any, get_args, get_type_hints

import pytest

from spul.commands.main import commands_of
from spul.commands.numbers import NUMBERS
from spul.commands.options import parse

COMMANDS = [(name, sub) for name in ("train", "combine", "evaluate", "serve", "gate") for sub in commands_of(name)]
TAKE_ZERO = {
    *("alpha", "beta", "warmup_steps", "forget_fraction", "stop_margin", "stop_target", "stop_patience", "seed"),
    *("layers", "port"),
}


def is_number(hint: Any) -> bool:
    return hint in (int, float) or any(map(is_number, get_args(hint)))


def numeric(name: str, sub: str) -> set[str]:
    """Names of the numeric options of a command."""
    options: Any = commands_of(name)[sub].options
    hints = get_type_hints(options)
    return {field.name for field in dataclasses.fields(options) if is_number(hints[field.name])}


def read(name: str, sub: str, *arguments: str, is_whole: bool = False) -> Any:
    """The options of a command's example, with further ones."""
    command, words = commands_of(name)[sub], ["spul", *filter(None, (name, sub))]
    given = shlex.split(command.example)[len(words) :]
    for flag in set(arguments) & {"--port", "--recall"} & set(given):
        del given[given.index(flag) : given.index(flag) + 2]
    return parse(command, words, [*given, *arguments], is_whole)


@pytest.mark.parametrize(("name", "sub"), COMMANDS)
def test_every_numeric_option_has_a_range_and_refuses_what_is_outside_it(name, sub):
    assert numeric(name, sub) <= NUMBERS.keys()
    for option in numeric(name, sub):
        flag = f"--{option.replace('_', '-')}"
        for value in ("nan", "inf", "-inf", *(() if option in TAKE_ZERO else ("0",)), "-2", "1e30"):
            with pytest.raises(ValueError, match=flag):
                read(name, sub, flag, value)
        if option in TAKE_ZERO:
            assert getattr(read(name, sub, flag, "0"), option) in (0, [0])


@pytest.mark.parametrize(
    ("name", "flag", "value", "expected"),
    [
        ("train", "--num-train-epochs", "nan", "--num-train-epochs is nan; expected a number above 0."),
        ("train", "--max-steps", "0", "--max-steps is 0; expected a number of steps from 1, or -1 for epochs."),
        ("train", "--hold-out", "1", "--hold-out is 1.0; expected a share above 0 and below 1."),
        ("train", "--bits", "3", "--bits is 3; expected 8 or 4."),
        ("train", "--rewritten-turns", "0", "--rewritten-turns is 0; expected a number of at least 1."),
        ("serve", "--timeout", "nan", "--timeout is nan; expected a number above 0."),
        ("serve", "--port", "65536", "--port is 65536; expected a number of at least 0, at most 65535."),
        ("evaluate", "--relearn-lr", "inf", "--relearn-lr is inf; expected a number above 0."),
    ],
)
def test_the_message_says_what_was_given_and_what_is_expected(name, flag, value, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read(name, "", flag, value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--weight-decay", "nan"], "--weight-decay is nan; expected a number of at least 0."),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps is 0; expected a number of at least"),
        (["--seed", "-1"], "--seed is -1; expected a number of at least 0"),
        (["--label-smoothing-factor", "nan"], "--label-smoothing-factor is nan; expected a number."),
    ],
)
def test_the_arguments_of_a_training_are_checked_likewise_and_so_is_a_file(arguments, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        read("train", "", *arguments, is_whole=True)
    path = tmp_path / "options.yaml"
    path.write_text(f"{arguments[0].removeprefix('--')}: {arguments[1]}\n")
    with pytest.raises(ValueError, match=expected):
        read("train", "", "--config", str(path), is_whole=True)


def test_numbers_within_the_ranges_are_taken():
    found = read("train", "", "--max-steps", "-1", "--max-grad-norm", "inf", "--warmup-steps", "0.1", is_whole=True)
    assert (found.max_steps, found.max_grad_norm, found.warmup_steps) == (-1, float("inf"), 0.1)

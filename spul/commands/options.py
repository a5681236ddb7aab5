"""Options of a command: from flags and from a YAML file, by transformers' `HfArgumentParser`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..records.files import check_is_file
from .command import Command, near
from .names import check_names
from .numbers import check_numbers

CONFIG, HELP_ALL = "config", "help-all"
NULL = "tag:yaml.org,2002:null"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults beside options, where there are any, and the example as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = str(action.help)
        if action.required:
            return f"{text} (required)"
        if action.default in (None, [], argparse.SUPPRESS):
            return text
        if type(action.default) is str:  # as it is typed: one may begin with a space
            return f"{text} (default: {shlex.quote(action.default).replace('%', '%%')})"
        return f"{text} (default: %(default)s)"


class OptionsParser(HfArgumentParser):
    """A parser of a command's options, whose errors are exceptions.

    Options that the command has from `TrainingArguments` are parsed as any; `--help` leaves them out, and
    `--help-all` shows them.

    Args:
        command: the command.
        words: its name, word by word.
        shows_all: whether help shows inherited options, too.
        is_whole: whether inherited options are parsed; their names alone are known otherwise, as `left_out`.
    """

    def __init__(self, command: Command, words: Sequence[str], shows_all: bool = False, is_whole: bool = True) -> None:
        assert command.options is not None
        name, inherited = " ".join(words), _inherited(command)
        self.left_out = frozenset[str]() if is_whole else inherited
        more = f"\n{len(inherited)} more options: {name} --{HELP_ALL}\n" if inherited and not shows_all else ""
        super().__init__(
            cast(Any, command.whole() if command.whole is not None and is_whole else command.options),
            prog=name,
            usage=f"{name} [--{CONFIG} FILE.yaml] [options]",
            description=command.purpose,
            epilog=f"{more}\nexample:\n  {command.example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:  # of a bool that may be None
                action.nargs, action.const = "?", True
        self.by_name = {action.dest: action for action in reversed(self._actions)}  # first of --x and --no_x
        if not shows_all:
            for action in self._actions:
                if action.dest in inherited:
                    action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raise, in place of argparse's exit.

        Raises:
            ValueError: always.
        """
        raise ValueError(message)


def parse(command: Command, words: Sequence[str], arguments: Sequence[str], is_whole: bool = True) -> Any:
    """A command's options from its arguments, `--config FILE.yaml` among them; flags win over the file.

    Args:
        command: the command.
        words: its name, word by word.
        arguments: its arguments.
        is_whole: whether those that it has from `TrainingArguments` are read, whose import takes seconds. Without them
            only their names are checked.

    Raises:
        ValueError: for an unknown option or key, with those of a near name, a missing one, one that is given twice, or
            one of another type.
        FileNotFoundError: if there is no such file.
        SystemExit: after `--help`.
    """
    shows_all = f"--{HELP_ALL}" in arguments
    parser = OptionsParser(command, words, shows_all, is_whole or shows_all)
    if shows_all:
        parser.print_help()
        sys.exit(0)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument(f"--{CONFIG}", action="append", default=[])
    try:
        own, rest = before.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    for path in own.config:
        _take(parser, path)
    _check_flags(parser, rest)
    options, unknown = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown and not parser.left_out:  # the rest are of those
        raise ValueError(f"unknown option or value {unknown[0]!r}{_near_options(parser, unknown[0])}")
    check_numbers(options)
    check_names(options)
    return options


def _check_flags(parser: OptionsParser, arguments: Sequence[str]) -> None:
    """Raise for a flag that is unknown or given twice.

    Of two, argparse would take the last, and drop the first one's files or prompts; of one that is mistyped and
    required, it would say that it is missing.
    """
    names = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    given: dict[str, str] = {}
    for flag in (one.split("=", 1)[0] for one in arguments):
        if flag.startswith("--") and flag != "--" and flag not in names and _name(flag) not in parser.left_out:
            raise ValueError(f"unknown option or value {flag!r}{_near_options(parser, flag)}")
        if flag in names and names[flag] in given:
            both = (
                f"{flag} is given twice" if given[names[flag]] == flag else f"{given[names[flag]]} and {flag} are one"
            )
            raise ValueError(f"{both}; expected it once, several values behind one another: {flag} A B.")
        if flag in names:
            given[names[flag]] = flag


def _take(parser: OptionsParser, path: str) -> None:
    """Make the values of a YAML file the parser's defaults, which flags replace."""
    check_is_file(path)
    try:
        found = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, yaml.MappingNode):
        what = "nothing" if found is None else f"a {found.id}"
        raise ValueError(f"{path} holds {what}; expected options by name, such as 'model: NAME'.")
    seen: set[str] = set()
    for key, node in found.value:
        name = str(key.value).replace("-", "_")
        if name in parser.left_out:
            continue
        action = parser.by_name.get(name)
        if action is None or name == "help":
            raise ValueError(f"{path}: unknown option {key.value!r}{_near_options(parser, name)}")
        if name in seen:
            raise ValueError(f"{path}: {key.value} is given twice; expected it once, several values as a list.")
        seen.add(name)
        if node.tag == NULL:  # as if the key were not there
            continue
        try:
            parser.set_defaults(**{name: _converted(action, node)})
        except (ValueError, TypeError, argparse.ArgumentTypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {key.value} is {_written(node)}; {error}") from error
        action.required = False


def _converted(action: argparse.Action, node: yaml.Node) -> Any:
    """A value of YAML as the option's type, as a flag would give it."""
    if action.nargs == "+":
        return [_single(action, one) for one in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
    return _single(action, node)


def _single(action: argparse.Action, node: yaml.Node) -> Any:
    """One value, of its text as it is written: YAML itself takes `no` for a boolean and `017` for 15."""
    if isinstance(node, yaml.SequenceNode) or node.tag == NULL:
        raise ValueError("expected a single value, not a list." if node.tag != NULL else "expected a value, not null.")
    text = node.value if isinstance(node, yaml.ScalarNode) else json.dumps(_constructed(node))
    convert: Any = action.type or str
    found = convert(text)
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}.")
    return found


def _constructed(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _written(node: yaml.Node) -> str:
    """A value of YAML in messages: a scalar as it is written."""
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def _near_options(parser: OptionsParser, given: str) -> str:
    names = [name for name in (*parser.by_name, *sorted(parser.left_out)) if name != "help"]
    return near(given.lstrip("-").split("=")[0].replace("-", "_"), names, f"{parser.prog} --help lists the options")


def _name(flag: str) -> str:
    """The option of a flag, `--no-x` also of x."""
    return flag.removeprefix("--").replace("-", "_").removeprefix("no_")


def _inherited(command: Command) -> frozenset[str]:
    """Names of the options that a command has from `TrainingArguments` alone."""
    if command.options is None or command.whole is None:
        return frozenset()
    return training_argument_names() - {field.name for field in dataclasses.fields(command.options)}


@cache
def training_argument_names() -> frozenset[str]:
    """Names of the fields of `TrainingArguments`, read in its source: its import takes seconds, for torch and PEFT."""
    spec = find_spec("transformers.training_args")
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    targets = (node.target for node in found.body if isinstance(node, ast.AnnAssign))
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))

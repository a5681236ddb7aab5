"""`spul NAME ...`: the table of commands, their options from flags and a file, and errors in one line."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from logging.handlers import MemoryHandler

from safetensors import SafetensorError

from .command import Command, near, printable
from .wording import messages_in_options

# A command's module is loaded when it is asked for: the list of commands needs none of them, nor torch.
TABLE = {
    "train": "train a soft prompt on files of forget and retain rows, from data to card",
    "evaluate": "measure an unlearned model, attack it, and check conditions",
    "combine": "make one prompt of several",
    "gate": "fit a gate, which decides who gets a prompt or a fixed refusal, or check texts by it",
    "export": "bring a prompt to another engine",
    "serve": "serve prompts and fixed refusals over HTTP",
    "ledger": "keep and verify the record of requests",
    "lm-eval": "lm-evaluation-harness with --model spul",
}
BAD_OPTIONS, INTERRUPTED, UNREAD = 2, 130, 141
TRACEBACK = "SPUL_TRACEBACK"


class UsageError(ValueError):
    """A command line that cannot be read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command's name and its arguments; those of the process unless given.

    Returns:
        The exit status: the command's own, 0 if it has none; 2 for bad options and files, after a line on standard
        error, with a traceback if the environment has `SPUL_TRACEBACK`; 130 if it was interrupted; 141 if nobody reads
        the output any more, as after `| head`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _hold_kernel_message()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # what has been done is said, if without its letters
    try:
        status = _run(given)
        print(end="", flush=True)  # also where the output is closed, and there is none to flush
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, SafetensorError, FloatingPointError) as error:
        # The last two: a full disk, and a training that has diverged.
        if isinstance(error, BrokenPipeError) and _is_unread():
            return UNREAD
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        words = given[:1] if given and given[0] in TABLE else []
        print(f"{' '.join(['spul', *words])}: {one_line(error)}", file=sys.stderr)
        return BAD_OPTIONS


def _is_unread() -> bool:
    """Whether nobody reads the output any more, the rest of which is then dropped."""
    try:
        print(flush=True)  # a line alone: what could not be written is not tried again
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its end would complain, too
        return True
    return False


def _hold_kernel_message() -> None:
    """Hold back what bitsandbytes, which PEFT imports, says of its 4-bit kernel until a model in 4 bit is loaded."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")  # it says nothing else there
    if "bitsandbytes" not in sys.modules and not logger.handlers:
        logger.addHandler(MemoryHandler(capacity=100, flushLevel=logging.CRITICAL))
        logger.propagate = False


def one_line(error: BaseException) -> str:
    """An error's message in one line, without control characters; its type where it has none."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"spul {import_module(__name__.split('.')[0]).__version__}")
        return 0
    name, rest = given[0], given[1:]
    commands = commands_of(name)
    words = ["spul", name]
    if "" in commands:
        command = commands[""]
    else:
        if not rest or rest[0] in ("-h", "--help"):
            print(_listing(f"usage: spul {name} NAME [options]", {sub: commands[sub].purpose for sub in commands}))
            return 0
        if rest[0] not in commands:
            raise UsageError(f"there is no {rest[0]!r} of {name}{near(rest[0], commands)}")
        words.append(rest[0])
        command, rest = commands[rest[0]], rest[1:]
    if command.options is None:
        return command.run(rest) or 0
    from .options import parse  # transformers, which is slow to import

    options = parse(command, words, rest, is_whole=False)
    if command.check is not None:
        with messages_in_options(type(options)):
            command.check(options)
    if command.whole is not None:
        options = parse(command, words, rest)
    with messages_in_options(type(options)):
        return command.run(options) or 0


def commands_of(name: str) -> dict[str, Command]:
    """The commands of a name in the table, loaded now: by the subcommand's name, `""` where there is none.

    Raises:
        UsageError: if there is no such name; the message names those that are near.
        ImportError: if this installation lacks its module.
    """
    if name not in TABLE:
        raise UsageError(f"there is no command {name!r}{near(name, TABLE)}")
    module = f"{__package__}.{name.replace('-', '_')}"
    if find_spec(module) is None:
        raise ImportError(f"the command {name!r} is not part of this installation (no module {module}).")
    return import_module(module).COMMANDS


def overview() -> str:
    """All commands with their purposes."""
    ending = "spul NAME --help shows a command's options and an example. --config FILE.yaml gives them in a file."
    return f"{_listing('usage: spul NAME [options]', TABLE)}\n\n{ending}"


def _listing(usage: str, purposes: dict[str, str]) -> str:
    width = max(map(len, purposes))
    return "\n".join([usage, "", *(f"  {name:<{width}}  {purpose}" for name, purpose in purposes.items())])

"""`spul lm-eval`: lm-evaluation-harness's own command line, with the model `spul`."""

from __future__ import annotations

import sys

from .command import Command


def run(arguments: list[str]) -> int | None:
    """Run the harness.

    Args:
        arguments: those of `lm_eval`.

    Raises:
        ImportError: if it is not installed.
    """
    from ..evaluation.harness import register

    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return None


COMMANDS = {
    "": Command(
        None,
        run,
        "spul lm-eval --model spul --model_args pretrained=facebook/opt-1.3b,adapter=out --tasks hellaswag "
        "--batch_size 8",
        "Run lm-evaluation-harness with --model spul.",
    )
}

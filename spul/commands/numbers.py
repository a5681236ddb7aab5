"""Numbers that options take, by the option's name, which means the same in every command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Range = tuple[Callable[[float], bool], str]
"""A check, and the words for what is expected; NaN passes none."""

LARGEST = 2**31 - 1  # of a C int, which some libraries take
LAST_PORT = 65535


def at_least(least: int, most: float = LARGEST) -> Range:
    """Numbers from `least` to `most`."""
    up_to = "" if most == LARGEST else f", at most {most:g}"
    return lambda number: least <= number <= most, f"a number of at least {least}{up_to}"


def above(least: int, most: float = LARGEST) -> Range:
    """Numbers above `least`, up to `most`."""
    up_to = "" if most == LARGEST else f", at most {most:g}"
    return lambda number: least < number <= most, f"a number above {least}{up_to}"


def share(is_whole: bool = False) -> Range:
    """Shares above 0 and below 1, or 1 itself."""
    words = "a share above 0, at most 1" if is_whole else "a share above 0 and below 1"
    return lambda number: 0 < number < 1 or (is_whole and number == 1), words


NUMBERS: dict[str, Range] = {
    # training
    "num_train_epochs": above(0),
    "max_steps": (lambda number: number == -1 or 1 <= number <= LARGEST, "a number of steps from 1, or -1 for epochs"),
    "learning_rate": above(0),
    "warmup_steps": at_least(0),
    "logging_steps": above(0),
    "eval_steps": above(0),
    "save_steps": above(0),
    "save_total_limit": at_least(1),
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "eval_accumulation_steps": at_least(1),
    "eval_delay": at_least(0),
    "dataloader_num_workers": at_least(0),
    "data_seed": at_least(0, 2**32 - 1),
    "gradient_accumulation_steps": at_least(1),
    "weight_decay": at_least(0),
    "adam_beta1": (lambda number: 0 <= number < 1, "a number of at least 0 and below 1"),
    "adam_beta2": (lambda number: 0 <= number < 1, "a number of at least 0 and below 1"),
    "adam_epsilon": at_least(0),
    "max_grad_norm": (lambda number: number >= 0, "a number of at least 0"),  # inf clips nothing, and logs the norm
    "forget_fraction": (lambda number: 0 <= number < 1, "a share of at least 0 and below 1"),
    "rewritten_turns": at_least(1),
    "num_virtual_tokens": at_least(1),
    "encoder_hidden_size": at_least(1),
    "alpha": at_least(0),
    "beta": at_least(0),
    "retain_budget": above(0),
    "hold_out": share(),
    "stop_every": at_least(1),
    "stop_margin": (lambda number: 0 <= number < 100, "points of accuracy, from 0 to below 100"),
    "stop_target": (lambda number: 0 <= number < 100, "points of accuracy, from 0 to below 100"),
    "stop_patience": at_least(0),
    # rows, models and draws
    "max_length": at_least(2),  # a token of prompt, one of completion
    "bits": (lambda number: number in (4, 8), "8 or 4"),
    "seed": at_least(0, 2**32 - 1),
    # evaluation
    "attack_rows": at_least(1),
    "relearn_lr": above(0),
    "relearn_model_lr": above(0),
    "max_new_tokens": at_least(1),
    "batch_size": at_least(1),
    # gates
    "recall": share(is_whole=True),
    "layers": at_least(0),
    # serving
    "port": at_least(0, LAST_PORT),
    "max_body_bytes": at_least(1),
    "max_prompt_tokens": at_least(1),
    "max_batch": at_least(1),
    "max_waiting": at_least(1),
    "timeout": above(0),
}


def check_numbers(options: Any) -> None:
    """Raise for a number that an option does not take; NaN is one, whatever the option.

    Args:
        options: a dataclass of options, as it was read.

    Raises:
        ValueError: if there is one.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            takes, words = NUMBERS.get(field.name, (lambda number: not math.isnan(number), "a number"))
            if not takes(number):
                raise ValueError(f"--{field.name.replace('_', '-')} is {number}; expected {words}.")

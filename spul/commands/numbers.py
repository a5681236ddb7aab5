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


def number(
    least: float = 0,
    most: float = LARGEST,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    what: str = "a number",
) -> Range:
    """Numbers from `least` to `most`, above `above` and below `below`."""
    words = f"{what} of at least {least}" if above == -math.inf else f"{what} above {above}"
    words += f" and below {below}" if below < math.inf else "" if most == LARGEST else f", at most {most:g}"
    return lambda number: least <= number <= most and above < number < below, words


NUMBERS: dict[str, Range] = {
    # training
    "num_train_epochs": number(above=0),
    "max_steps": (lambda number: number == -1 or 1 <= number <= LARGEST, "a number of steps from 1, or -1 for epochs"),
    "learning_rate": number(above=0),
    "warmup_steps": number(0),
    "logging_steps": number(above=0),
    "eval_steps": number(above=0),
    "save_steps": number(above=0),
    "save_total_limit": number(1),
    "per_device_train_batch_size": number(1),
    "per_device_eval_batch_size": number(1),
    "eval_accumulation_steps": number(1),
    "eval_delay": number(0),
    "dataloader_num_workers": number(0),
    "data_seed": number(0, 2**32 - 1),
    "gradient_accumulation_steps": number(1),
    "weight_decay": number(0),
    "adam_beta1": number(0, below=1),
    "adam_beta2": number(0, below=1),
    "adam_epsilon": number(0),
    "max_grad_norm": (lambda number: number >= 0, "a number of at least 0"),  # inf clips nothing, and logs the norm
    "forget_fraction": number(0, below=1, what="a share"),
    "rewritten_turns": number(1),
    "num_virtual_tokens": number(1),
    "encoder_hidden_size": number(1),
    "alpha": number(0),
    "beta": number(0),
    "retain_budget": number(above=0),
    "hold_out": number(above=0, below=1, what="a share"),
    "stop_every": number(1),
    "stop_margin": number(0, below=100, what="points of accuracy"),
    "stop_target": number(0, below=100, what="points of accuracy"),
    "stop_patience": number(0),
    # rows, models and draws
    "max_length": number(2),  # a token of prompt, one of completion
    "bits": (lambda number: number in (4, 8), "8 or 4"),
    "seed": number(0, 2**32 - 1),
    # evaluation
    "attack_rows": number(1),
    "relearn_lr": number(above=0),
    "relearn_model_lr": number(above=0),
    "max_new_tokens": number(1),
    "batch_size": number(1),
    # gates
    "recall": number(above=0, most=1, what="a share"),
    "layers": number(0),
    # serving
    "port": number(0, LAST_PORT),
    "max_body_bytes": number(1),
    "max_prompt_tokens": number(1),
    "max_batch": number(1),
    "max_waiting": number(1),
    "timeout": number(above=0),
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

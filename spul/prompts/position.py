"""Where a prompt stands: in front of every row, or inside it, just before the message; and how its files say so."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from torch import Tensor

from ..records.fields import check_prompt_position

# A prompt inside the rows has another type than PEFT's in adapter_config.json: plain PEFT, which would put it in front
# of the rows, knows no such type, raises, and shows it.
_AT_MESSAGE = "@message"
_REMEDY = ": load it by spul.SoftPromptUnlearner.from_pretrained; PEFT would put it at the start of every row"


def check_position(prompt_position: Any, peft_config: Any) -> None:
    """Raise unless a prompt of this kind can stand there.

    Args:
        prompt_position: `"start"` or `"message"`.
        peft_config: the prompt's config.

    Raises:
        ValueError: for another position, and for prefix tuning at `"message"`.
    """
    check_prompt_position(prompt_position)
    kind = PeftType(peft_config.peft_type)
    if prompt_position == "message" and kind not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        raise ValueError(
            f'prompt_position="message" with {type(peft_config).__name__}: its keys and values are those of tokens '
            "before every row, and cannot stand inside one. Use PromptTuningConfig or PromptEncoderConfig, whose "
            'virtual tokens are input embeddings, or prompt_position="start".'
        )


def stands_inside(model: Any) -> bool:
    """Whether the active prompt stands inside the rows, by its record."""
    position = model.spul_config.prompt_position
    if position == "start":
        return False
    check_position(position, model.active_peft_config)
    return True


def missing_position() -> ValueError:
    """The error of a batch that does not say where its rows' messages begin."""
    return ValueError(
        'the soft prompt stands inside each row, just before its message (prompt_position="message"), and the batch '
        "does not say where: prompt_position is missing, for each row the number of its tokens before the prompt, "
        '(B,). ForgetRetainCollator(..., prompt_position="message") gives it in batches, and its '
        "encoder.prompts(rows) for generate."
    )


def check_column(prompt_position: Any, num_rows: int) -> None:
    """Raise unless a batch says for each row where its message begins.

    Args:
        prompt_position: numbers of tokens, (B,); their range is checked once the rows' lengths are known.
        num_rows: B.

    Raises:
        ValueError: if they are missing, or of another shape or type.
    """
    if prompt_position is None:
        raise missing_position()
    whole = isinstance(prompt_position, Tensor) and not (
        prompt_position.is_floating_point() or prompt_position.is_complex() or prompt_position.dtype == torch.bool
    )
    if not whole or tuple(prompt_position.shape) != (num_rows,):
        found = type(prompt_position).__name__
        if isinstance(prompt_position, Tensor):
            found = f"{prompt_position.dtype} of the shape {tuple(prompt_position.shape)}"
        raise ValueError(
            f"prompt_position is a {found}; expected a tensor of whole numbers ({num_rows},), for each row the number "
            "of its tokens before the soft prompt, without padding."
        )


def check_any_row(model: Any, prompt_position: Any) -> None:
    """Raise if a prompt may stand inside a row, whichever the rows will have, and a batch does not say where.

    Args:
        model: an unlearner.
        prompt_position: of the batch, or None.

    Raises:
        ValueError: if it is None, and one of the prompts stands at `"message"`.
    """
    positions = [record.prompt_position for record in model.spul_configs.values()]
    if prompt_position is None and model.enabled and "message" in positions:
        raise missing_position()


def saved_type(peft_type: str, prompt_position: str) -> str:
    """The `peft_type` of `adapter_config.json` of a prompt.

    Args:
        peft_type: PEFT's own.
        prompt_position: `"start"` or `"message"`.
    """
    return peft_type if prompt_position == "start" else f"{peft_type}{_AT_MESSAGE}{_REMEDY}"


def read_type(saved: Any) -> tuple[Any, str]:
    """PEFT's type and the prompt's position, from the `peft_type` of an `adapter_config.json`."""
    if not isinstance(saved, str) or _AT_MESSAGE not in saved:
        return saved, "start"
    return saved.partition(_AT_MESSAGE)[0], "message"

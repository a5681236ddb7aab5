"""Names of prompts: which a prompt may have, and which a model has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..records.ledger_events import GATE_FOLDER

NO_PROMPT = "__base__"  # PEFT's name for rows without an adapter


def check_new_name(adapter_name: str) -> None:
    """Raise unless a prompt, and its folder, may be called so.

    Raises:
        TypeError: if it is no text.
        ValueError: if it leads out of a folder, or is one that PyTorch's modules, PEFT or a gate's folder has.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name is a {type(adapter_name).__name__}; expected a prompt's name as text.")
    is_folder = re.fullmatch(r"(?!\s)[^./\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+(?<!\s)", adapter_name)
    if not is_folder or adapter_name in (NO_PROMPT, GATE_FOLDER) or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: expected a name that is not empty, has no dot, no slash, no control "
            "character and no space at its ends, and is none that PyTorch, PEFT or a gate has for itself; another "
            "one, such as 'request-2026-017'."
        )


def check_has_adapter(model: Any, adapter_name: str) -> None:
    """Raise unless a model has a prompt of this name.

    Raises:
        TypeError: if it is no text.
        ValueError: if there is none.
    """
    known = list(model.peft_config)
    if not isinstance(adapter_name, str):
        raise TypeError(
            f"adapter_name is a {type(adapter_name).__name__}; expected the name of one prompt, of {known}. Prompts "
            "for each row of a batch are adapter_names of generate and forward."
        )
    if adapter_name not in known:
        hint = " The base alone runs inside disable_adapter()." if adapter_name == NO_PROMPT else ""
        raise ValueError(f"there is no prompt {adapter_name!r}; there are {known}.{hint}")


def check_adapter_names(model: Any, adapter_names: Sequence[str], num_rows: int) -> None:
    """Raise unless there is one name for each row, of a prompt of the model or `"__base__"`.

    Raises:
        TypeError: if they are no list of strings.
        ValueError: for another number of names than rows, and unknown names.
    """
    known = [*model.peft_config, NO_PROMPT]
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r}: expected a list with one name for each row, of {known}.")
    if len(adapter_names) != num_rows:
        raise ValueError(
            f"adapter_names has {len(adapter_names)} names for {num_rows} rows; expected one for each, of {known}."
        )
    if unknown := sorted(set(adapter_names) - set(known)):
        raise ValueError(f"adapter_names holds {unknown}, which this model does not have; its prompts are {known}.")

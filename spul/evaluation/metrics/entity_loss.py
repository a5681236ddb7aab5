"""What a model says of names in the texts themselves: EUL's language modelling loss at masked entities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from ...data.collator import ForgetRetainCollator
from .likelihood import response_likelihoods


def rows_at_names(rows: Dataset, names: Sequence[str]) -> Dataset:
    """One row for each prompt that holds a name: what stands before its first name, and the name as the completion.

    Args:
        rows: with `prompt`, a text.
        names: whole words, in any letter case.

    Raises:
        ValueError: if there are no names, or no prompt holds any of them after its first word.
    """
    if not names:
        raise ValueError("names is empty; pass the names that the rows are to be forgotten for.")
    spelled = "|".join(r"\s+".join(map(re.escape, name.split())) for name in names)
    pattern = re.compile(rf"(?<!\w)(?:{spelled})(?!\w)", re.IGNORECASE)
    found = []
    for prompt in rows["prompt"]:
        for place in pattern.finditer(prompt):
            before = prompt[: place.start()].rstrip()
            if not before:
                continue
            found.append({"prompt": before, "completion": prompt[len(before) : place.end()]})
            break
    if not found:
        raise ValueError(
            f"none of {len(rows)} prompts holds any of {list(names)[:5]} after its first word; pass the names that "
            "the rows are to be forgotten for."
        )
    return Dataset.from_list(found)


def name_loss(
    model: nn.Module,
    rows: Dataset,
    names: Sequence[str],
    collator: ForgetRetainCollator,
    batch_size: int = 32,
    **kwargs: Any,
) -> float:
    """The mean over rows of the loss of a name's tokens given the text before it, in nats per token.

    On forget rows higher is better: the model expects the name less (EUL, arXiv 2310.20150, which masks the name; a
    causal LM sees what is before it only).

    Args:
        model: a causal LM, bare, under PEFT, a prompt or unlearning layers.
        rows: with `prompt`, a text.
        names: whole words, in any letter case.
        collator: for tokenizing and padding.
        batch_size: rows per forward.
        kwargs: as `response_likelihoods`.

    Raises:
        ValueError: if no prompt holds any of the names, or the collator appends an end token.
    """
    if collator.encoder.append_eos:
        raise ValueError("append_eos=True would end the text at the name; pass a collator with append_eos=False.")
    found = response_likelihoods(model, rows_at_names(rows, names), collator, batch_size, **kwargs)
    return float(np.mean([-likelihood.log_probs.mean() for likelihood in found]))

"""Loss of entities named in the texts themselves: EUL's language modeling loss at masked entities."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from torch import nn

from ...data.characters import whole_words
from ...data.checks import check_rows, checked_names, checked_texts
from ...data.encoder import RowEncoder
from ...data.rows import column_values
from .likelihood import response_likelihoods


def entity_rows(rows: Dataset, entities: Sequence[str]) -> Dataset:
    """One row for each prompt that names an entity: the text before the first name, and the name as the completion.

    Args:
        rows: with `prompt`, a text.
        entities: names as whole words, in any letter case.

    Raises:
        TypeError: if the rows are no `datasets.Dataset`, the entities a single text, or prompts no texts.
        ValueError: if there are no rows, no `prompt` or no entities, or no prompt names any after its first word.
    """
    pattern = re.compile(whole_words(checked_names("entities", entities)), re.IGNORECASE)
    check_rows(rows, ("prompt",))
    found = []
    for prompt in checked_texts(column_values(rows, "prompt")):
        for match in pattern.finditer(prompt):
            before = prompt[: match.start()].rstrip()
            if not before:
                continue
            found.append({"prompt": before, "completion": prompt[len(before) : match.end()]})
            break
    if not found:
        raise ValueError(
            f"none of {len(rows)} prompts holds any of {list(entities)[:5]} after its first word; pass the names that "
            "the rows are to be forgotten for."
        )
    return Dataset.from_list(found)


def entity_loss(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    entities: Sequence[str],
    batch_size: int = 32,
    progress: str | None = None,
) -> float:
    """Mean over rows of the loss of an entity's name given the text before it, in nats per token.

    Higher is better on forget rows: the model expects the name less. EUL masks the name; a causal LM sees only the
    text before it.

    Args:
        model: a causal LM, bare, under PEFT, a prompt or unlearning layers.
        rows: with `prompt`, a text.
        encoder: its tokenizer and `max_length` count; the text before a name has no `text_field`.
        entities: names as whole words, in any letter case.
        batch_size: rows per forward pass.
        progress: label of a progress bar; None shows none.

    Raises:
        TypeError, ValueError: as `entity_rows`.
        ValueError: if the encoder has prompts at `"message"`: the text before a name is no message.

    Source: Chen and Yang, *EUL*, https://arxiv.org/abs/2310.20150
    """
    named = entity_rows(rows, entities)
    if encoder.prompt_position == "message":
        raise ValueError(
            'the encoder has prompt_position="message", where a prompt stands before what is asked, and the text '
            'before a name asks nothing; expected one of prompts at "start".'
        )
    plain = RowEncoder(encoder.tokenizer, encoder.max_length, pad_to_multiple_of=encoder.pad_to_multiple_of)
    found = response_likelihoods(model, named, plain, batch_size, progress)
    return float(np.mean([-likelihood.log_probs.mean() for likelihood in found]))

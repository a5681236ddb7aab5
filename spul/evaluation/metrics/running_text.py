"""Loss and perplexity on running text that is unrelated to the forgotten data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from ...data.checks import checked_texts
from ...data.encoder import RowEncoder
from .likelihood import response_likelihoods

logger = logging.getLogger(__name__)


def text_losses(
    model: nn.Module,
    texts: Sequence[str],
    encoder: RowEncoder,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """Loss of running text, such as pages of an encyclopedia that have nothing to do with the forgotten data.

    Tokens are those of `encoder.tokenizer(text)`, with one beginning-of-sequence token at most. The first token is
    never predicted, not from a prompt either, so that models with and without a prompt are scored on the same tokens.
    A text of one token has nothing to predict: 0 nats, 0 tokens.

    Args:
        model: a causal LM, bare, under PEFT, a prompt or unlearning layers.
        texts: running text.
        encoder: its tokenizer encodes the texts; tokens beyond its `max_length` are cut off the end and counted.
        batch_size: texts per forward pass, whose logits take `batch_size * length * vocabulary` floats: lower it for
            long texts.
        progress: label of a progress bar; None shows none.

    Returns:
        (texts,) each: `nats`, the negative log-likelihood of the predicted tokens, summed; `tokens`, the number of
        predicted tokens; `tokens_lost`, the number of tokens beyond `max_length`, which are not scored.

    Raises:
        TypeError: if the texts are not strings.
        ValueError: if there are no texts, none has a token to predict, or the model's logits are NaN or infinite.
    """
    whole = _whole_ids(texts, encoder)
    tokens_lost = np.array([max(0, len(ids) - encoder.max_length) for ids in whole])
    if tokens_lost.any():
        message = "max_length=%d cuts %d of %d texts: %d of their tokens are not scored."
        logger.warning(message, encoder.max_length, np.count_nonzero(tokens_lost), len(whole), tokens_lost.sum())
    tokens = np.array([max(0, min(len(ids), encoder.max_length) - 1) for ids in whole])
    indices = np.flatnonzero(tokens)
    rows = _rows(whole, encoder)
    found = response_likelihoods(model, Dataset.from_list(rows), encoder, batch_size, progress)
    nats = np.zeros(len(whole))
    nats[indices] = [-likelihood.log_probs.sum(dtype=np.float64) for likelihood in found]
    return {"nats": nats, "tokens": tokens, "tokens_lost": tokens_lost}


def text_rows(texts: Sequence[str], encoder: RowEncoder) -> list[dict[str, Any]]:
    """The texts that have a token to predict as the tokenized rows that `text_losses` scores.

    Args:
        texts: as in `text_losses`.
        encoder: likewise.

    Raises:
        TypeError: if the texts are not strings.
        ValueError: if there are no texts, or none has a token to predict.
    """
    return _rows(_whole_ids(texts, encoder), encoder)


def _whole_ids(texts: Sequence[str], encoder: RowEncoder) -> list[list[int]]:
    """The token ids of texts, before they are cut."""
    texts = checked_texts(texts)
    if not texts:
        raise ValueError("texts is empty; expected at least one text.")
    whole = encoder.tokenizer(texts, verbose=False)["input_ids"]  # `text_losses` warns of texts that are too long
    return [ids[encoder.has_second_bos(text, ids) :] for text, ids in zip(texts, whole, strict=True)]


def _rows(whole: Sequence[list[int]], encoder: RowEncoder) -> list[dict[str, Any]]:
    """Rows of those with a token to predict: the first token is the prompt, the others are the completion."""
    bos = encoder.tokenizer.bos_token_id
    rows = [
        {
            "input_ids": cut,
            "completion_mask": [0] + [1] * (len(cut) - 1),
            "is_running_text": True,
            "prompt_position": int(cut[0] == bos),  # of a prompt at "message": before the text
        }
        for ids in whole
        if len(cut := ids[: encoder.max_length]) > 1
    ]
    if not rows:
        raise ValueError(
            f"none of {len(whole)} texts has a token to predict; expected texts of at least two tokens, such as "
            "paragraphs."
        )
    return rows


def perplexity(losses: Mapping[str, np.ndarray]) -> float:
    """`exp(nats / tokens)` over all texts together, 1 or more; infinite where floats overflow.

    Best is the value before unlearning. Only models with the same tokenizer can be compared.

    Args:
        losses: `nats` and `tokens` of each text, as `text_losses` returns them.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(losses["nats"].sum() / losses["tokens"].sum()))

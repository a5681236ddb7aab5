"""What else was lost: rows near the forgotten ones, and unrelated running text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.checks import checked_texts
from ...data.collator import ForgetRetainCollator
from .likelihood import response_likelihoods

logger = logging.getLogger(__name__)


# ---- running text ----


class TextLosses(NamedTuple):
    """How surprised a model is by texts.

    Attributes:
        nats: (texts,), the negative log-likelihood of each text's predicted tokens, summed, in nats.
        num_tokens: (texts,), how many tokens that is: all but the first, or but the token that begins every sequence.
        num_cut: (texts,), how many tokens were beyond `max_length` and are not scored.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_cut: np.ndarray


def text_losses(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    batch_size: int = 32,
    progress: str | None = None,
) -> TextLosses:
    """The loss of running text, such as pages of an encyclopedia that have nothing to do with what was forgotten.

    Tokens are those of `tokenizer(text)`. The first one is never predicted, not from a prompt either, so that models
    with and without one are scored on the same tokens. A text of one token has nothing to predict: 0 nats, 0 tokens.

    Args:
        model: a causal LM, bare, under PEFT, a prompt or unlearning layers.
        texts: running text.
        tokenizer: the model's; it needs no pad token and is not changed.
        max_length: the most tokens of a text, without virtual tokens; what is beyond is cut off its end and counted.
        batch_size: texts per forward, whose logits take `batch_size * length * vocabulary` numbers: lower it for long
            texts.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        TypeError: if the texts are not strings.
        ValueError: if there are none, none has a token to predict, `max_length` is below 2, or the model's logits are
            not numbers.
    """
    texts = checked_texts(texts)
    if not texts:
        raise ValueError("texts is empty; expected at least one text.")
    collator = ForgetRetainCollator(tokenizer, None, max_length)
    whole = tokenizer(texts, verbose=False)["input_ids"]  # what is too long is cut, and told, below
    num_cut = np.array([max(0, len(ids) - max_length) for ids in whole])
    if num_cut.any():
        message = "max_length=%d cuts %d of %d texts: %d of their tokens are not scored."
        logger.warning(message, max_length, np.count_nonzero(num_cut), len(texts), num_cut.sum())
    kept = [ids[:max_length] for ids in whole]
    num_tokens = np.array([max(0, len(ids) - 1) for ids in kept])
    places = np.flatnonzero(num_tokens)
    if not len(places):
        raise ValueError(
            f"none of {len(texts)} texts has a token to predict; expected texts of at least two tokens, such as "
            "paragraphs."
        )
    # The first token is what is given, the others are what is answered.
    rows = [{"input_ids": kept[i], "completion_mask": [0] + [1] * int(num_tokens[i])} for i in places]
    found = response_likelihoods(model, Dataset.from_list(rows), collator, batch_size, progress)
    nats = np.zeros(len(texts))
    nats[places] = [-likelihood.log_probs.sum(dtype=np.float64) for likelihood in found]
    return TextLosses(nats, num_tokens, num_cut)


def perplexity(losses: TextLosses) -> float:
    """`exp(nats / tokens)` over all texts together, 1 or more; infinite beyond what floats can hold.

    As low as before unlearning is best. Only models with the same tokens can be compared by it.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(losses.nats.sum() / losses.num_tokens.sum()))

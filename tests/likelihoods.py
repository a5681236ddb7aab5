"""Rows of answers of many lengths, and their likelihoods written out token by token."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from helpers import make_tokenizer
from plain import row_logits

from spul import ForgetRetainCollator, SoftPromptUnlearner
from spul.evaluation.metrics import Likelihood


def answer_collator(**kwargs):
    return ForgetRetainCollator(make_tokenizer(), None, max_length=64, **kwargs)


def free_form(num=7):
    """Prompts and answers of many lengths, so that every batch has pads and unused slots."""
    words = ["the", "film", "is", "good", "bad", "plot", "about", "jane", "doe", "text", "review", "positive"]
    return Dataset.from_list(
        [
            {"prompt": " ".join(words[: 1 + 3 * i % 7]) + " :", "completion": " " + " ".join(words[i : 2 * i + 2])}
            for i in range(num)
        ]
    )


def plain_logits(model, prompt, answer, before=0):
    """Logits (|y|, V) that predict the answer, one row, no pads; PEFT's prompt by hand."""
    ids = torch.tensor(prompt + answer)
    with torch.no_grad():
        if isinstance(model, SoftPromptUnlearner):
            logits = row_logits(model, ids, before=before)
        else:
            logits = model(input_ids=ids[None]).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def plain_likelihood(model, row, collator):
    """The definitions written out token by token."""
    encoded = collator.encoder.encode(row)
    prompt, answer = encoded.prompt_ids, encoded.completion_ids
    found = {"log_probs": [], "is_greedy": [], "mean": [], "std": []}
    every = plain_logits(model, prompt, answer, encoded.prompt_position or 0)
    for logits, token in zip(every, answer, strict=True):
        p = torch.exp(logits) / torch.exp(logits).sum()
        mean = sum(float(p[z]) * float(p[z].log()) for z in range(len(p)))
        variance = sum(float(p[z]) * (float(p[z].log()) - mean) ** 2 for z in range(len(p)))
        found["log_probs"].append(float(p[token].log()))
        found["is_greedy"].append(max(range(len(p)), key=lambda z, p=p: float(p[z])) == token)
        found["mean"].append(mean)
        found["std"].append(variance**0.5)
    return found


def of(log_probs, is_greedy=None):
    log_probs = np.array(log_probs, dtype=np.float64)
    greedy = np.ones(len(log_probs), bool) if is_greedy is None else np.array(is_greedy, bool)
    return Likelihood(log_probs, greedy, np.zeros_like(log_probs), np.ones_like(log_probs))

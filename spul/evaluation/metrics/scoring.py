"""What a model answers, by greedy decoding, and how often it is right or generic.

Answers are read off at the response positions: a completion is what greedy decoding gives exactly if each of its
tokens is the most likely one after those before it. One forward with the true completion settles most rows; the
others are tried with the candidates that begin with the token the model chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, PeftType
from sklearn.metrics import f1_score
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.collator import ForgetRetainCollator, completion_text
from ...data.samplers import by_length
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import evaluation_mode, logits_at
from ...prompts.unlearner import SoftPromptUnlearner

# Beyond so many different completions a set is free-form: its rows' answers are not classes to each other.
MAX_CLASSES = 32
NEITHER = "<neither a label nor generic>"


@dataclass
class Answers:
    """What a model answered to some rows.

    Attributes:
        true: the rows' completions.
        predicted: the candidate that greedy decoding gives, or a text that says that it is none of them.
        nll: negative log-likelihood of each true completion, in nats.
    """

    true: list[str] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)


class DivergedError(ValueError):
    """A model whose logits or hidden states are not numbers."""


def check_numbers(values: Tensor, what: str = "logits") -> None:
    """Raise where a model's logits or states are NaN: an answer that is read off them would look forgotten."""
    if bool(values.isnan().any()):
        raise DivergedError(
            f"the model's {what} are not numbers (NaN): it has diverged, there is nothing to measure. Lower the "
            "learning rate that it learns at; if it is in float16, load it in bfloat16 or float32."
        )


def response_logits(model: nn.Module, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Logits (B, K, V) at the response positions of a right-padded batch, of a bare or prompted model."""
    if isinstance(model, SoftPromptUnlearner):
        return model.response_logits(batch["input_ids"], batch["attention_mask"], positions)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return logits_at(model, positions, **inputs)
    # Plain PEFT's prompts: their tokens stand in front and have logits too; a prefix has none, nor what is disabled.
    in_front = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
    config = model.active_peft_config
    if config.peft_type in in_front and model.has_active_enabled_adapter:
        positions = positions + config.num_virtual_tokens
    return model(**inputs).logits.take_along_dim(positions[..., None], dim=1)


@torch.no_grad()
def greedy_completions(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collator: ForgetRetainCollator,
    classes: Sequence[str] = (),
) -> Answers:
    """Which candidate greedy decoding gives for each row.

    The candidates are the row's own completion, `classes`, and the collator's generic completions. Where one is the
    beginning of another, the longer counts.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt, in evaluation mode.
        rows: rows with `prompt` and `completion`, at most as many as fit in a batch.
        collator: for tokenizing and padding.
        classes: the labels of the task.

    Raises:
        DivergedError: a ValueError, if logits at the response positions are NaN.
    """
    device = next(model.parameters()).device
    own = [completion_text(row["completion"]) for row in rows]
    candidates = list(dict.fromkeys([*classes, *(collator.generic_completions or [])]))

    def ids_of(i: int, text: str) -> list[int]:
        """A candidate's tokens as they would follow this row's prompt; a chat template adds its own."""
        if isinstance(rows[i]["prompt"], str):
            return collator.encoder.completion_ids(text)
        return collator.encoder.encode(rows[i], text).completion_ids

    def matches(some: Sequence[int], texts: Sequence[str] | None) -> tuple[list[bool], Tensor, Tensor, Tensor]:
        """Whether greedy decoding gives the texts; also its first token, the targets' first tokens, and their NLL."""
        batch = collator.encoder.batch([rows[i] for i in some], texts)
        batch = {name: value.to(device) for name, value in batch.items()}
        positions, targets = response_positions(batch["labels"])
        logits = response_logits(model, batch, positions)
        check_numbers(logits[targets != IGNORE_INDEX])
        chosen = logits.argmax(dim=-1)
        same = ((chosen == targets) | (targets == IGNORE_INDEX)).all(dim=1)
        return same.tolist(), chosen[:, 0], targets[:, 0], token_nll(logits, targets).sum(dim=1)

    same, first, _, nll = matches(range(len(rows)), None)
    predicted = [text if is_same else NEITHER for text, is_same in zip(own, same, strict=True)]
    for candidate in candidates:
        ids = [ids_of(i, candidate) for i in range(len(rows))]
        possible = [
            i
            for i in range(len(rows))
            if candidate != own[i]
            and int(first[i]) == ids[i][0]
            and (predicted[i] == NEITHER or len(ids[i]) > len(ids_of(i, predicted[i])))
        ]
        if any(len(ids[i]) > 1 for i in possible):
            given, *_ = matches(possible, [candidate] * len(possible))
            possible = [i for i, is_given in zip(possible, given, strict=True) if is_given]
        for i in possible:
            predicted[i] = candidate
    return Answers(own, predicted, nll.float().tolist())


def summarize(answers: Answers, generic_completions: Sequence[str] | None) -> dict[str, float]:
    """Numbers of a set of answers.

    Returns:
        `accuracy`: share of rows answered with their own completion; `f1`: F1 weighted by the classes' frequency
        (scikit-learn); `generic`: share answered with a generic completion; `loss`: mean negative log-likelihood of
        the true completions, in nats per row. All but the loss lie in 0..1, and forgetting wants the first two low.
    """
    num, generic = len(answers.true), set(generic_completions or [])
    labels = sorted(set(answers.true))
    return {
        "accuracy": sum(t == p for t, p in zip(answers.true, answers.predicted, strict=True)) / num,
        "f1": float(f1_score(answers.true, answers.predicted, labels=labels, average="weighted", zero_division=0)),
        "generic": sum(p in generic for p in answers.predicted) / num,
        "loss": sum(answers.nll) / num,
    }


def task_classes(rows: Any) -> list[str]:
    """The labels of a set, if it has so few that it is a classification task; else none."""
    texts = {completion_text(completion) for completion in rows["completion"]}
    return sorted(texts) if len(texts) <= MAX_CLASSES else []


def score_completions(
    model: nn.Module,
    rows: Any,
    collator: ForgetRetainCollator,
    batch_size: int = 32,
    progress: str | None = None,
) -> dict[str, float]:
    """Accuracy, weighted F1, share of generic answers and loss of a model on one split.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: a `datasets.Dataset` with `prompt` and `completion`.
        collator: for tokenizing and padding; its `generic_completions` are those counted as generic.
        batch_size: rows per forward.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        See `summarize`.

    Raises:
        ValueError: if there are no rows, they have no `prompt` and `completion`, or the model has diverged: its logits
            are NaN.
    """
    answers = collect_answers(model, rows, collator, batch_size, range(len(rows)), progress)
    return summarize(answers, collator.generic_completions)


def collect_answers(
    model: nn.Module,
    rows: Any,
    collator: ForgetRetainCollator,
    batch_size: int,
    some: Sequence[int],
    progress: str | None = None,
) -> Answers:
    """Answers to some rows of a split, batch by batch, rows of like length together."""
    if not isinstance(rows, Dataset):
        raise TypeError(f"rows are a {type(rows).__name__}; expected a datasets.Dataset: Dataset.from_list([...]).")
    if len(rows) == 0:
        raise ValueError("there are no rows to score.")
    if missing := {"prompt", "completion"} - set(rows.column_names):
        raise ValueError(f"rows to score lack {sorted(missing)}; they have {rows.column_names}.")
    classes = task_classes(rows)
    picked = [rows[int(i)] for i in some]
    encoded = [collator.encoder.encode(row) for row in picked]
    batches = list(by_length([len(one.prompt_ids) + len(one.completion_ids) for one in encoded], batch_size))
    answers = Answers([""] * len(picked), [""] * len(picked), [0.0] * len(picked))
    with evaluation_mode(model):
        for places in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            found = greedy_completions(model, [picked[i] for i in places], collator, classes)
            for j, i in enumerate(places):
                answers.true[i], answers.predicted[i] = found.true[j], found.predicted[j]
                answers.nll[i] = found.nll[j]
    return answers

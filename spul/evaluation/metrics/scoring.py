"""Answers of a model by greedy decoding, and how often they are right or generic.

Answers are read at the response positions: greedy decoding generates a completion exactly if each of its tokens is the
most likely one after those before it. One forward pass with the true completion settles most rows; the others are
checked against the candidates that begin with the token the model chose. What ends an answer, a chat template's end of
turn or the token of `append_eos`, is no part of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from ...data.checks import check_rows
from ...data.collator import ForgetRetainCollator, checked_collator
from ...data.encoded import Encoded
from ...data.row_checks import check_all_texts
from ...data.rows import ADAPTER_NAME, adapter_names_of, column_batches, completion_text, rows_at, with_column
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX, token_nll
from ...models.causal_lm import evaluation_mode
from ...models.compat_devices import device_of
from ...models.unlearner import unlearner_of
from .batches import length_batches

# A set with more different completions than this is free-form: its answers are texts, not classes.
MAX_CLASSES = 32
NEITHER = "<neither a label nor generic>"


@dataclass
class Answers:
    """Answers of a model to some rows.

    Attributes:
        true: the rows' completions.
        predicted: the candidate that greedy decoding generates; `NEITHER` if it is none of them.
        nll: negative log-likelihood of each true completion, in nats.
    """

    true: list[str] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)


class DivergedError(ValueError):
    """The model has diverged: its logits, hidden states or gradients are NaN or infinite."""


def check_not_diverged(values: Tensor, what: str = "logits") -> None:
    """Raise if rows of values have no finite maximum: an answer read from such logits would look forgotten.

    Single logits of -infinity are those of tokens of probability 0.
    """
    if not bool(values.amax(dim=-1).isfinite().all()):
        raise DivergedError(
            f"the model's {what} are NaN or infinite: it has diverged, there is nothing to measure. Lower the "
            "learning rate that it learns at; if it is in float16, load it in bfloat16 or float32."
        )


def response_logits(
    model: nn.Module, batch: Mapping[str, Tensor], positions: Tensor, adapter_names: Sequence[str] | None = None
) -> Tensor:
    """Logits (B, K, V) at the response positions of a right-padded batch, of a bare or prompted model.

    Names of the rows' prompts choose among those of a `SoftPromptUnlearner`; other models have none, and are run as
    they are.
    """
    own, unlearner = row_arguments(model, adapter_names, batch.get("prompt_position")), unlearner_of(model)
    if unlearner.reads_tokens:
        own["labels"] = batch["labels"]
    return unlearner.response_logits(batch["input_ids"], batch["attention_mask"], positions, **own)


def row_arguments(
    model: nn.Module, adapter_names: Sequence[str] | None, prompt_position: Tensor | None = None
) -> dict[str, Any]:
    """`adapter_names` and `prompt_position` as arguments of a model that takes them; those that are given."""
    unlearner = unlearner_of(model)
    found: dict[str, Any] = {}
    if adapter_names is not None and unlearner.takes_adapter_names:
        found["adapter_names"] = list(adapter_names)
    if prompt_position is not None and unlearner.takes_prompt_position:
        found["prompt_position"] = prompt_position
    return found


@torch.no_grad()
def greedy_completions(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collator: ForgetRetainCollator,
    classes: Sequence[str] = (),
) -> Answers:
    """The candidate that greedy decoding generates for each row.

    The candidates are the row's own completion, `classes`, and the collator's generic completions. Where one is the
    start of another, the longer one counts.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt, in evaluation mode.
        rows: `prompt` and `completion`, at most as many as fit in one batch.
        collator: its encoder turns rows into token ids; its `generic_completions` are candidates.
        classes: the labels of the task.

    Raises:
        DivergedError: a ValueError, if logits at the response positions are NaN or infinite.
    """
    device = device_of(model)
    own = [completion_text(row["completion"]) for row in rows]
    candidates = list(dict.fromkeys([*classes, *(collator.generic_completions or [])]))

    @functools.cache
    def encoded(i: int, text: str | None) -> Encoded:
        return collator.encoder.encode(rows[i], text).without_ending()

    @functools.cache
    def ids_of(i: int, text: str) -> list[int]:
        """A candidate's tokens as they follow this row's prompt; a chat template adds its own."""
        return collator.encoder.answer_ids(text, rows[i])

    def matches(some: Sequence[int], text: str | None) -> tuple[list[bool], Tensor, Tensor]:
        """Whether greedy decoding generates a text (None: the row's completion), its first tokens, the text's NLL."""
        batch = collator.encoder.pad([rows[i] for i in some], [encoded(i, text) for i in some])
        batch = {name: value.to(device) for name, value in batch.items()}
        positions, targets = response_positions(batch["labels"])
        names = adapter_names_of([rows[i] for i in some])
        logits = response_logits(model, batch, positions, names)
        check_not_diverged(logits[targets != IGNORE_INDEX])
        chosen = logits.argmax(dim=-1)
        same = ((chosen == targets) | (targets == IGNORE_INDEX)).all(dim=1)
        return same.tolist(), chosen[:, 0], token_nll(logits, targets).sum(dim=1)

    same, first, nll = matches(range(len(rows)), None)
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
            given, *_ = matches(possible, candidate)
            possible = [i for i, is_given in zip(possible, given, strict=True) if is_given]
        for i in possible:
            predicted[i] = candidate
    return Answers(own, predicted, nll.float().tolist())


def summarize(answers: Answers, generic_completions: Sequence[str] | None) -> dict[str, float]:
    """Metrics of a set of answers.

    Returns:
        `accuracy`, `generic`, `loss`: means of `answer_scores`; `f1`: support-weighted F1
        (scikit-learn), in 0..1. Lower accuracy and F1 are better on forget rows, higher on retain rows.
    """
    scores = {name: float(values.mean()) for name, values in answer_scores(answers, generic_completions).items()}
    labels = sorted(set(answers.true))
    f1 = f1_score(answers.true, answers.predicted, labels=labels, average="weighted", zero_division=0)
    return {"accuracy": scores.pop("accuracy"), "f1": float(f1), **scores}


def answer_scores(answers: Answers, generic_completions: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Scores of each answer.

    Returns:
        `accuracy`: 1 if the row is answered with its own completion, else 0; `generic`: 1 if it is answered with a
        generic completion; `loss`: negative log-likelihood of the true completion, in nats. (rows,) each.
    """
    generic = set(generic_completions or [])
    return {
        "accuracy": np.array([float(t == p) for t, p in zip(answers.true, answers.predicted, strict=True)]),
        "generic": np.array([float(p in generic) for p in answers.predicted]),
        "loss": np.array(answers.nll),
    }


def task_classes(*sets: Any) -> list[str]:
    """The labels of sets of rows; none if there are more than `MAX_CLASSES`, which makes them free-form."""
    batches = itertools.chain.from_iterable(column_batches(rows, "completion") for rows in sets)
    texts = set(map(completion_text, itertools.chain.from_iterable(batches)))
    return sorted(texts) if len(texts) <= MAX_CLASSES else []


def score_completions(
    model: nn.Module,
    rows: Any,
    collator: ForgetRetainCollator,
    batch_size: int = 32,
    progress: str | None = None,
    adapter_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Accuracy, weighted F1, share of generic answers and loss of a model on a set of rows.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.
        rows: a `datasets.Dataset` with `prompt` and `completion`.
        collator: its encoder turns rows into token ids; its `generic_completions` are those counted as generic.
        batch_size: rows per forward pass.
        progress: label of a progress bar; None shows none.
        adapter_names: for each row the name of its prompt, `"__base__"` for none; a column `adapter_name` of `rows`
            says the same. The active prompt for all unless given.

    Returns:
        `accuracy`, `f1`, `generic` (0..1) and `loss` (nats per row), see `summarize`.

    Raises:
        TypeError: if rows or collator are of another type.
        ValueError: if there are no rows, they have no `prompt` and `completion`, or the model has diverged: its logits
            are NaN or infinite.
    """
    if adapter_names is not None:
        rows = with_adapter_names(model, rows, adapter_names)
    answers = collect_answers(model, rows, collator, batch_size, range(len(rows)), progress)
    return summarize(answers, collator.generic_completions)


def with_adapter_names(model: nn.Module, rows: Any, adapter_names: Sequence[str] | str, name: str = "rows") -> Any:
    """Rows with a column `adapter_name`, by which the metrics run each under its prompt.

    Args:
        model: the model whose prompts they are.
        rows: a `datasets.Dataset`.
        adapter_names: for each row the name of its prompt, `"__base__"` for none; one name for all.
        name: the rows' name in the message.

    Raises:
        TypeError: if the model takes no names, or they are no strings.
        ValueError: for another number of names than rows, and unknown names.
    """
    check_rows(rows)
    names = [adapter_names] * len(rows) if isinstance(adapter_names, str) else adapter_names
    unlearner: Any = unlearner_of(model)
    if not unlearner.takes_adapter_names:
        raise TypeError(
            f"adapter_names for {name}, and the model is a {type(model).__name__}; expected a SoftPromptUnlearner, "
            "whose prompts they name."
        )
    unlearner.check_adapter_names(names, len(rows))
    return with_column(rows, ADAPTER_NAME, list(names))


def collect_answers(
    model: nn.Module,
    rows: Any,
    collator: ForgetRetainCollator,
    batch_size: int,
    some: Sequence[int],
    progress: str | None = None,
) -> Answers:
    """Answers to some rows of a set, by their indices; see `score_completions`."""
    check_rows(rows)
    checked_collator(collator)
    check_all_texts(collator.encoder, rows)
    classes = task_classes(rows)
    picked = rows if some == range(len(rows)) else rows.select(some)
    answers = Answers([""] * len(picked), [""] * len(picked), [0.0] * len(picked))
    with evaluation_mode(model), unlearner_of(model).cached_prompts():
        encoder = collator.encoder
        for indices in length_batches(model, picked, encoder.encode, batch_size, encoder.pad_to_multiple_of, progress):
            found = greedy_completions(model, rows_at(picked, indices), collator, classes)
            for j, i in enumerate(indices):
                answers.true[i], answers.predicted[i] = found.true[j], found.predicted[j]
                answers.nll[i] = found.nll[j]
    return answers

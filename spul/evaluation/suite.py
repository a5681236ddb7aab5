"""The subject of an evaluation, and its tasks: one measure of one model on one set of rows each."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from ..data.collator import ForgetRetainCollator
from ..data.conversations import comparable
from ..data.formats import PromptFormat
from ..data.rows import ADAPTER_NAME, column_values, completion_text, read_rows
from ..models.causal_lm import bare_model, max_positions
from ..models.compat import is_sharded
from ..models.compat_devices import is_offloaded
from ..models.unlearner import detached_base, unlearner_of
from ..prompts.names import NO_PROMPT
from ..records.digests import digest_of_rows
from ..records.fields import is_count
from .aggregation import Key, Measurement
from .attack_settings import AttackSettings
from .metrics.free_form import generate_answers, rouge_l
from .metrics.likelihood import Likelihood, exact_memorization, extraction_strength, probability, response_likelihoods
from .metrics.scoring import answer_scores, collect_answers, task_classes


@dataclass(frozen=True)
class Task:
    """A piece of an evaluation.

    Attributes:
        keys: the keys of its measurements.
        run: takes the measurements, in this order.
        parts: tasks that take them one by one, in case that one model of several has diverged; else empty.
    """

    keys: tuple[Key, ...]
    run: Callable[[], list[Measurement]]
    parts: tuple[Task, ...] = ()


@dataclass
class Suite:
    """Models, rows and settings of an evaluation; for the fields see `spul.evaluate`."""

    model: nn.Module
    splits: Mapping[str, Dataset]
    collator: ForgetRetainCollator
    base: nn.Module | None
    retrained: nn.Module | None
    reference: nn.Module | None
    unseen: Dataset | None
    neighbors: Mapping[str, Dataset]
    unrelated_texts: Sequence[str]
    questions: Mapping[str, Dataset]
    question_format: PromptFormat
    attacks: AttackSettings
    batch_size: int
    max_new_tokens: int
    seed: int
    free_form: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    _of_reference: dict[str, list[Likelihood]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if not is_count(getattr(self, name), 1):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number of at least 1.")

    @cached_property
    def classes(self) -> list[str]:
        """The labels of all splits together; empty for free-form answers, which too many labels count as."""
        if self.free_form:
            return []
        return task_classes(*self.splits.values())

    @property
    def is_free_form(self) -> bool:
        """Whether the answers are texts and no classes."""
        return not self.classes

    @property
    def models(self) -> list[str]:
        """The names of the measured models."""
        found = ["unlearned"]
        if self.base is not None or unlearner_of(self.model).has_adapter:
            found.append("detached")
        return found + (["retrained"] if self.retrained is not None else [])

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold shards of one of the models, so that all of them run each task together."""
        given = (self.model, self.base, self.retrained, self.reference)
        return any(model is not None and is_sharded(model) for model in given)

    @property
    def is_in_place(self) -> bool:
        """Whether the weights of all models are whole and where they are used, neither sharded nor offloaded."""
        given = (self.model, self.base, self.retrained)
        return not self.is_sharded and not any(model is not None and is_offloaded(model) for model in given)

    @contextmanager
    def subject(self, name: str) -> Iterator[Any]:
        """Context manager: one of these models."""
        if name == "detached" and self.base is None:
            with detached_base(self.model) as base:
                yield base
        else:
            yield {"unlearned": self.model, "detached": self.base, "retrained": self.retrained}[name]

    def task(
        self, rows: Sequence[Any] | Dataset, measure: Callable[..., Sequence[Measurement]], key: Key, *more: Key
    ) -> Task:
        """A task of one model and one set of rows.

        Args:
            rows: the rows of `key`.
            measure: from the model and the keys to their measurements. Scores may be arrays; number of rows and
                digest are those of `rows` unless set.
            key: the key of the measurement.
            more: further keys, where one run takes several measurements.
        """
        keys = (key, *more)

        def run() -> list[Measurement]:
            with self.subject(key.model) as subject:
                found = measure(subject, *keys)
            assert tuple(one.key for one in found) == keys
            digest = digest_of_rows(rows)[:16]
            return [
                dataclasses.replace(
                    one,
                    per_row={name: np.asarray(scores).tolist() for name, scores in one.per_row.items()},
                    num_rows=one.num_rows or len(rows),
                    digest=digest,
                )
                for one in found
            ]

        return Task(keys, run)

    def attacked(self, rows: Dataset) -> Dataset:
        """At most `attacks.num_rows` of the rows, drawn at random."""
        if len(rows) <= self.attacks.num_rows:
            return rows
        return rows.select(sorted(random.Random(self.seed).sample(range(len(rows)), self.attacks.num_rows)))

    def answers(self, model: Any, rows: Dataset) -> dict[str, Any]:
        """Scores of greedy answers, per row: accuracy, generic, loss; further ones of classes or of free-form answers.

        Of classes the indices of the true and the predicted one, of free-form answers how much of the true one is
        there.
        """
        found = collect_answers(model, rows, self.collator, self.batch_size, range(len(rows)))
        per_row: dict[str, Any] = answer_scores(found, self.collator.generic_completions)
        per_row |= self._gate_scores(model, rows, per_row["accuracy"])
        if self.is_free_form:
            return per_row | self._free_form_scores(model, rows)
        indices = {text: float(i) for i, text in enumerate(self.classes)}
        if set(found.true) <= indices.keys():  # neighbors may be of another task
            per_row["true"] = [indices[text] for text in found.true]
            per_row["predicted"] = [indices.get(text, -1.0) for text in found.predicted]
        return per_row

    def _gate_scores(self, model: Any, rows: Dataset, accuracy: np.ndarray) -> dict[str, Any]:
        """Which rows a gate flags, and whether a right answer came past the gate or past what is behind it."""
        names = unlearner_of(model).names_of([self.collator.encoder.encode(row).prompt_ids for row in read_rows(rows)])
        if names is None:
            return {}
        flagged = np.array([float(name != NO_PROMPT) for name in names])
        return {"flagged": flagged, "past_gate": accuracy * (1 - flagged), "past_prompt": accuracy * flagged}

    def _free_form_scores(self, model: Any, rows: Dataset) -> dict[str, Any]:
        encoder = self.collator.encoder
        likelihoods = response_likelihoods(model, rows, encoder, self.batch_size)
        texts = generate_answers(model, rows, encoder, self.batch_size, self.max_new_tokens)
        rouge = rouge_l(texts, [completion_text(completion) for completion in column_values(rows, "completion")])
        return {
            "probability": probability(likelihoods),
            "extraction_strength": extraction_strength(likelihoods),
            "exact_memorization": exact_memorization(likelihoods),
            **rouge,
        }

    def reference_on(self, rows: Dataset) -> list[Likelihood] | None:
        """Likelihoods of rows under `reference`, by one pass for all models; None without one."""
        if self.reference is None:
            return None
        key = digest_of_rows(rows)
        if key not in self._of_reference:
            found = response_likelihoods(self.reference, rows, self.collator.encoder, self.batch_size)
            self._of_reference[key] = found
        return self._of_reference[key]

    def halves(self) -> tuple[Dataset, Dataset]:
        """The trained forget rows, each prompt once, as one half to attack with and one to score on."""
        rows = self.splits["train_forget"]
        first = {comparable(prompt): i for i, prompt in reversed(list(enumerate(column_values(rows, "prompt"))))}
        indices = random.Random(self.seed).sample(sorted(first.values()), len(first))
        half = len(indices) // 2
        return rows.select(indices[:half]), self.attacked(rows.select(indices[half:]))

    @property
    def by_row(self) -> bool:
        """Whether a column of the rows names the prompt of each, among those of the model."""
        sets = [*self.splits.values(), *self.neighbors.values(), *([] if self.unseen is None else [self.unseen])]
        return unlearner_of(self.model).takes_adapter_names and any(ADAPTER_NAME in one.column_names for one in sets)

    @property
    def room(self) -> int | None:
        """The number of tokens that fit in the model beside its virtual ones; None where positions have no limit."""
        limit, unlearner = max_positions(bare_model(self.model)), unlearner_of(self.model)
        num_virtual = unlearner.longest_prompt if self.by_row else unlearner.virtual_tokens_in_use
        return None if limit is None else limit - num_virtual


def joined(tasks: Sequence[Task], afterwards: Callable[[], None]) -> Task:
    """Several tasks as one, with a function that is called in the end."""

    def run() -> list[Measurement]:
        try:
            return [one for task in tasks for one in task.run()]
        finally:
            afterwards()

    return Task(tuple(key for task in tasks for key in task.keys), run)

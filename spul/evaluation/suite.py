"""What an evaluation is about, and its pieces: one measure of one model on one set of rows, each for itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn

from ..data.collator import ForgetRetainCollator
from ..data.formats import PromptFormat
from ..data.rows import completion_text
from ..models.causal_lm import bare_model, max_positions
from ..models.unlearner import detached_base, unlearner_of
from ..records.digests import digest_of_rows
from .aggregation import Measurement
from .metrics.free_form import generate_answers, rouge_l
from .metrics.likelihood import exact_memorization, extraction_strength, probability, response_likelihoods
from .metrics.scoring import answer_scores, collect_answers, task_classes

InputAttacks = Mapping[str, Callable[[Dataset], Dataset]]
Found = dict[str, dict[str, Any]]
"""For each variant of a measurement its `per_row` and `overall`, and `num_rows` if they are of other rows."""


@dataclass(frozen=True)
class AttackSettings:
    """How the attacks are done.

    Args:
        inputs: attacks on the input by name, each from rows to attacked rows; `usual_attacks(...)` unless given.
        paraphrase: from a text to one of the same meaning, by a model or by rules; without it that attack is left out.
        wording: what to put in place of which fixed part of the prompts; without it that attack is left out.
        turns: after how many other questions with their answers to ask; sets with fewer leave the longer ones out.
        num_rows: the most rows of a set that are attacked, drawn at random.
        relearn_rows: how many forget rows are learned again.
        relearn_steps: after which numbers of steps to score.
        relearn_lr: learning rate of it, for prompts, layers and LoRA; best the one that they were trained at.
        relearn_model_lr: learning rate where the whole model learns.
        bits: to quantize to.
        tries: numbers of sampled answers.
        temperature: at which they are sampled.
        suffix_tokens: vectors of the soft suffix.
        suffix_steps: steps of its training.
        suffix_lr: learning rate of it.
        gradient_norm: whether membership is also inferred from gradients, a backward pass for each row.
        min_k_share: the share of a response's tokens that membership by min-k and min-k++ looks at; the papers' 0.2
            unless given. MUSE's PrivLeak is at 0.4.
    """

    inputs: InputAttacks | None = None
    paraphrase: Callable[[str], str] | None = None
    wording: Mapping[str, str] | None = None
    turns: tuple[int, ...] = (1, 4)
    num_rows: int = 200
    relearn_rows: int = 16
    relearn_steps: tuple[int, ...] = (1, 4, 16, 32)
    relearn_lr: float = 1e-2
    relearn_model_lr: float = 1e-4
    bits: tuple[int, ...] = (8, 4)
    tries: tuple[int, ...] = (1, 10, 100)
    temperature: float = 1.0
    suffix_tokens: int = 8
    suffix_steps: int = 100
    suffix_lr: float = 1e-3
    gradient_norm: bool = False
    min_k_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("turns", "relearn_steps", "bits", "tries"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 1:
                raise ValueError(f"{name}={values}: expected different whole numbers of at least 1.")
        if set(self.bits) - {4, 8}:
            raise ValueError(f"bits={self.bits}: expected 8, 4 or both.")
        for name in ("num_rows", "relearn_rows", "suffix_tokens", "suffix_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("relearn_lr", "relearn_model_lr", "suffix_lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 < self.min_k_share <= 1:
            raise ValueError(f"min_k_share={self.min_k_share}: expected a share of the tokens above 0 and at most 1.")
        others = (self.paraphrase, self.wording, None if self.turns == AttackSettings.turns else self.turns)
        if self.inputs is not None and any(other is not None for other in others):
            raise ValueError("inputs are all attacks on the input; put paraphrase, wording and turns among them.")


@dataclass(frozen=True)
class Task:
    """A piece of an evaluation.

    Attributes:
        produces: the keys of the measurements that it gives.
        run: gives them.
    """

    produces: tuple[tuple[str, str, str, str], ...]
    run: Callable[[], list[Measurement]]


@dataclass
class Suite:
    """All that an evaluation is about; see `spul.evaluate` for the fields."""

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
    left_out: dict[str, str] = field(default_factory=dict)

    @cached_property
    def classes(self) -> list[str]:
        """The labels of all splits together; none of free-form answers, which too many labels are taken for."""
        if self.free_form:
            return []
        return task_classes(concatenate_datasets([rows.select_columns("completion") for rows in self.splits.values()]))

    @property
    def is_free_form(self) -> bool:
        """Whether the answers are texts and no classes."""
        return not self.classes

    @property
    def models(self) -> list[str]:
        """The names of the models that are measured."""
        found = ["unlearned"]
        if self.base is not None or unlearner_of(self.model).has_adapter:
            found.append("detached")
        return found + (["retrained"] if self.retrained is not None else [])

    @contextmanager
    def subject(self, name: str) -> Iterator[Any]:
        """One of these models."""
        if name == "detached" and self.base is None:
            with detached_base(self.model) as base:
                yield base
        else:
            yield {"unlearned": self.model, "detached": self.base, "retrained": self.retrained}[name]

    def task(
        self,
        measure: str,
        rows_name: str,
        rows: Sequence[Any] | Dataset,
        model: str,
        run: Callable[[Any], Found],
        variants: Sequence[str] = ("",),
    ) -> Task:
        """A task whose function gives `per_row` and `overall` for each variant, of one model."""

        def measured() -> list[Measurement]:
            with self.subject(model) as subject:
                found = run(subject)
            assert tuple(found) == tuple(variants)
            about: dict[str, Any] = {"num_rows": len(rows), "digest": digest_of_rows(rows)[:16]}
            return [
                Measurement(measure, rows_name, model, variant, **about | values) for variant, values in found.items()
            ]

        return Task(tuple((measure, rows_name, model, variant) for variant in variants), measured)

    def some(self, rows: Dataset) -> Dataset:
        """At most as many rows as are attacked."""
        if len(rows) <= self.attacks.num_rows:
            return rows
        return rows.select(sorted(random.Random(self.seed).sample(range(len(rows)), self.attacks.num_rows)))

    def answers(self, model: Any, rows: Dataset) -> dict[str, list[float]]:
        """Per row: right, generic, and the completion's loss; then which class was true and which was said, or, of
        free-form answers, how much of the true one is there."""
        found = collect_answers(model, rows, self.collator, self.batch_size, range(len(rows)))
        scores = answer_scores(found, self.collator.generic_completions)
        per_row = {name: values.tolist() for name, values in scores.items()}
        if self.is_free_form:
            return per_row | self.of_texts(model, rows)
        places = {text: float(i) for i, text in enumerate(self.classes)}
        if set(found.true) <= places.keys():  # neighbors may be of another task
            per_row["true"] = [places[text] for text in found.true]
            per_row["predicted"] = [places.get(text, -1.0) for text in found.predicted]
        return per_row

    def of_texts(self, model: Any, rows: Dataset) -> dict[str, list[float]]:
        """Per row what is measured of answers that are no classes."""
        likelihoods = response_likelihoods(model, rows, self.collator.encoder, self.batch_size)
        said = generate_answers(model, rows, self.collator.encoder, self.batch_size, self.max_new_tokens)
        rouge = rouge_l(said, [completion_text(completion) for completion in rows["completion"]])
        found = {
            "probability": probability(likelihoods),
            "extraction_strength": extraction_strength(likelihoods),
            "exact_memorization": exact_memorization(likelihoods),
            **rouge,
        }
        return {name: values.tolist() for name, values in found.items()}

    def halves(self) -> tuple[Dataset, Dataset]:
        """The forget rows that were trained on, each prompt once, to attack with and to try the attack on."""
        rows = self.splits["train_forget"]
        first = {str(prompt): i for i, prompt in reversed(list(enumerate(rows["prompt"])))}
        places = random.Random(self.seed).sample(sorted(first.values()), len(first))
        half = len(places) // 2
        return rows.select(places[:half]), self.some(rows.select(places[half:]))

    @property
    def too_few(self) -> str:
        """Why the forget rows cannot be halved, if they cannot."""
        few, _ = self.halves()
        return "" if len(few) else "one half of train_forget is to attack the other, and there is one prompt only"

    @property
    def room(self) -> int | None:
        """How many tokens fit in the model beside its virtual ones; None where positions have no limit."""
        limit = max_positions(bare_model(self.model))
        return None if limit is None else limit - unlearner_of(self.model).virtual_tokens_in_use


def joined(tasks: Sequence[Task], afterwards: Callable[[], None]) -> Task:
    """Several tasks as one, with something to be done in the end."""

    def run() -> list[Measurement]:
        try:
            return [one for task in tasks for one in task.run()]
        finally:
            afterwards()

    return Task(tuple(key for task in tasks for key in task.produces), run)

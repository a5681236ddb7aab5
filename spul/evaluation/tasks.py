"""Measures of models as they are: utility, distance from the base, privacy, neighbors, running text, questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from ..data.unlearning_data import SPLITS
from .aggregation import MEMBERS, UNSEEN, Key, Measurement
from .metrics.likelihood import kl_of_models, kl_to
from .metrics.membership import GradientOf, attack_scores
from .metrics.running_text import text_losses
from .metrics.tofu import score_questions
from .suite import Suite, Task


def utility(suite: Suite) -> Iterator[Task]:
    """Scores of the answers on the four splits."""
    return _answers(suite, "utility", {split: suite.splits[split] for split in SPLITS})


def near(suite: Suite) -> Iterator[Task]:
    """Scores of the answers on rows near the forget rows."""
    return _answers(suite, "neighbors", suite.neighbors)


def _answers(suite: Suite, measure: str, sets: Mapping[str, Dataset]) -> Iterator[Task]:
    for rows_name, rows in sets.items():

        def scores(model: Any, key: Key, rows: Dataset = rows) -> list[Measurement]:
            return [Measurement(*key, per_row=suite.answers(model, rows))]

        for name in suite.models:
            yield suite.task(rows, scores, Key(measure, rows_name, name))


def kl(suite: Suite) -> Iterator[Task]:
    """KL divergence from the base on the retain splits, in either direction: one pass of the base for all models."""
    names = [name for name in suite.models if name != "detached"]
    encoder, batch_size = suite.collator.encoder, suite.batch_size
    for split in ("train_retain", "test_retain"):
        rows = suite.splits[split]

        def alone(model: Any, key: Key, rows: Dataset = rows) -> list[Measurement]:
            if model is suite.model and suite.base is None:
                return [Measurement(*key, per_row=kl_to(model, rows, encoder, batch_size=batch_size))]
            with suite.subject("detached") as base:
                return [Measurement(*key, per_row=kl_to(model, rows, encoder, base, batch_size))]

        def together(model: Any, *keys: Key, rows: Dataset = rows) -> list[Measurement]:
            assert suite.retrained is not None
            found = kl_of_models([model, suite.retrained], rows, encoder, suite.base, batch_size)
            return [Measurement(*key, per_row=one) for key, one in zip(keys, found, strict=True)]

        keys = [Key("kl", split, name) for name in names]
        parts = tuple(suite.task(rows, alone, key) for key in keys)
        if suite.retrained is None:
            yield from parts
        else:
            yield dataclasses.replace(suite.task(rows, together, *keys), parts=parts)


def unseen_rows(suite: Suite) -> Dataset:
    """The rows that no model was trained on: those given, else `test_forget`."""
    return suite.splits["test_forget"] if suite.unseen is None else suite.unseen


def membership(suite: Suite) -> Iterator[Task]:
    """Scores of the trained forget rows as members, and of unseen rows."""
    if suite.reference is None:
        suite.skipped["membership by the reference attack"] = "give reference=, another model that never saw the rows"
    if not suite.attacks.gradient_norm:
        suite.skipped["membership by gradient norm"] = "give AttackSettings(gradient_norm=True); it takes long"
    elif not suite.is_in_place:
        suite.skipped["membership by gradient norm"] = (
            "it reads gradients of the base's weights, which are sharded or offloaded"
        )
    whole = suite.attacks.gradient_norm and suite.is_in_place
    gradient_of: GradientOf | None = "model" if whole else None
    settings = (gradient_of, suite.attacks.min_k_share, suite.batch_size)
    for name in suite.models:
        for rows_name, rows in ((MEMBERS, suite.splits["train_forget"]), (UNSEEN, unseen_rows(suite))):

            def scores(model: Any, key: Key, rows: Dataset = rows) -> list[Measurement]:
                found = attack_scores(model, rows, suite.collator.encoder, suite.reference_on(rows), *settings)
                return [Measurement(*key, per_row=found)]

            yield suite.task(rows, scores, Key("membership", rows_name, name))


def unrelated(suite: Suite) -> Iterator[Task]:
    """The loss on running text."""

    def scores(model: Any, key: Key) -> list[Measurement]:
        found = text_losses(model, suite.unrelated_texts, suite.collator.encoder, suite.batch_size)
        return [Measurement(*key, per_row={name: found[name] for name in ("nats", "tokens")})]

    for name in suite.models:
        yield suite.task(suite.unrelated_texts, scores, Key("unrelated text", "unrelated text", name))


def tofu(suite: Suite) -> Iterator[Task]:
    """TOFU's questions, each set under its name."""
    settings = (suite.question_format, suite.batch_size, suite.max_new_tokens)
    for rows_name, rows in suite.questions.items():

        def scores(model: Any, key: Key, rows: Dataset = rows) -> list[Measurement]:
            found = score_questions(model, rows, suite.collator.encoder, *settings)
            return [Measurement(*key, per_row=found)]

        for name in suite.models:
            yield suite.task(rows, scores, Key("questions", rows_name, name))

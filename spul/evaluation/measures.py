"""What is measured of models as they are: utility and forgetting, privacy, what lies near, TOFU's questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from ..data.unlearning_data import SPLITS
from .aggregation import MEMBERS, UNSEEN
from .metrics.likelihood import kl_to
from .metrics.membership import GradientOf, attack_scores
from .metrics.running_text import text_losses
from .metrics.tofu import score_questions
from .suite import Found, Suite, Task


def utility(suite: Suite) -> Iterator[Task]:
    """Right and generic answers on the four splits; of free-form ones also how much of the true answer is there."""
    for split in SPLITS:
        rows = suite.splits[split]

        def run(model: Any, rows: Dataset = rows) -> Found:
            return {"": {"per_row": suite.answers(model, rows)}}

        for name in suite.models:
            yield suite.task("utility", split, rows, name, run)


def kl(suite: Suite) -> Iterator[Task]:
    """How far the answers on what is kept are from the base's."""
    if "detached" not in suite.models:
        suite.left_out["kl"] = "it is to the model as it was, which is not there; give base="
        return
    for split in ("train_retain", "test_retain"):
        rows = suite.splits[split]

        def run(model: Any, rows: Dataset = rows) -> Found:
            if model is suite.model and suite.base is None:
                found = kl_to(model, rows, suite.collator.encoder, batch_size=suite.batch_size)
            else:
                with suite.subject("detached") as base:
                    found = kl_to(model, rows, suite.collator.encoder, base, suite.batch_size)
            return {"": {"per_row": {name: values.tolist() for name, values in found.items()}}}

        for name in suite.models:
            if name != "detached":
                yield suite.task("kl", split, rows, name, run)


def membership(suite: Suite) -> Iterator[Task]:
    """Scores of the forget rows as members, and of rows that no model saw."""
    members = suite.splits["train_forget"]
    unseen, given = (suite.splits["test_forget"], "test_forget") if suite.unseen is None else (suite.unseen, "unseen")
    # Free-form answers are facts: asked in other words they are no unseen rows.
    columns = ["prompt", *(["completion"] if suite.is_free_form else [])]
    if any(set(map(str, members[column])) & set(map(str, unseen[column])) for column in columns):
        suite.left_out["membership"] = f"{given} holds what is in train_forget, too; give unseen= of which nothing is"
        return
    if suite.reference is None:
        suite.left_out["membership by the reference attack"] = "give reference=, another model that never saw the rows"
    if not suite.attacks.gradient_norm:
        suite.left_out["membership by gradient norm"] = "give AttackSettings(gradient_norm=True); it takes long"
    for name in suite.models:
        for rows_name, rows in ((MEMBERS, members), (UNSEEN, unseen)):

            def run(model: Any, rows: Dataset = rows) -> Found:
                how = suite.attacks
                of: GradientOf | None = "model" if how.gradient_norm else None
                scores = attack_scores(
                    model, rows, suite.collator.encoder, suite.reference, of, how.min_k_share, suite.batch_size
                )
                return {"": {"per_row": {attack: values.tolist() for attack, values in scores.items()}}}

            yield suite.task("membership", rows_name, rows, name, run)


def near(suite: Suite) -> Iterator[Task]:
    """As utility, on rows near to what is forgotten."""
    if not suite.neighbors:
        suite.left_out["neighbors"] = "give neighbors=, sets of rows that are near to what is forgotten"
    for rows_name, rows in suite.neighbors.items():

        def run(model: Any, rows: Dataset = rows) -> Found:
            return {"": {"per_row": suite.answers(model, rows)}}

        for name in suite.models:
            yield suite.task("neighbors", rows_name, rows, name, run)


def unrelated(suite: Suite) -> Iterator[Task]:
    """The loss on running text."""
    if not suite.unrelated_texts:
        suite.left_out["unrelated text"] = "give unrelated_texts=, running text of no relation to the task"
        return

    def run(model: Any) -> Found:
        found = text_losses(model, suite.unrelated_texts, suite.collator.encoder, suite.batch_size)
        return {"": {"per_row": {name: found[name].tolist() for name in ("nats", "tokens")}}}

    for name in suite.models:
        yield suite.task("unrelated text", "unrelated text", suite.unrelated_texts, name, run)


def tofu(suite: Suite) -> Iterator[Task]:
    """TOFU's questions, each set by its name."""
    if not suite.questions:
        suite.left_out["questions"] = "give questions=, TOFU's perturbed files"
    for rows_name, rows in suite.questions.items():

        def run(model: Any, rows: Dataset = rows) -> Found:
            how = (suite.question_format, suite.batch_size, suite.max_new_tokens)
            scores = score_questions(model, rows, suite.collator.encoder, *how)
            return {"": {"per_row": {k: v.tolist() for k, v in scores.items()}}}

        for name in suite.models:
            yield suite.task("questions", rows_name, rows, name, run)

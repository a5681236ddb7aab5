"""What an evaluation found, in an adapter's record and on its model card."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...data.unlearning_data import SPLITS
from ...records.card import write_metrics
from .wording import where, worst_input_attack

# For types alone: at run time `spul.evaluation` imports models, whose saving imports this package.
if TYPE_CHECKING:
    from ..results import Evaluation


CARD_MEASURES = ("accuracy", "f1", "generic", "probability")


def card_metrics(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """An evaluation in short, in the form of `SpulConfig.metrics`.

    The four splits under the unlearned model, `"test_forget, detached"` (the base, with the prompt taken off),
    `"test_forget, worst input attack (...)"` (the one under which the model gives most right answers), what the base
    gives under it, and the four splits under the retrained model. What was not measured is not there.

    Args:
        evaluation: with the measure "utility".

    Returns:
        Split to measure to number: accuracy, weighted F1, share of generic answers, of free-form rows also the
        probability. To set before `save_pretrained`: `unlearner.spul_config.metrics = card_metrics(evaluation)`.

    Raises:
        ValueError: if utility was not measured.
    """

    def scores(**fields: str) -> dict[str, float]:
        found = {one.name: one.value for one in where(evaluation, **fields)}
        return {name: found[name] for name in CARD_MEASURES if name in found}

    metrics = {split: scores(measure="utility", rows=split, model="unlearned") for split in SPLITS}
    if not any(metrics.values()):
        raise ValueError("the evaluation has no measure 'utility' of the unlearned model; evaluate the four splits.")
    metrics["test_forget, detached"] = scores(measure="utility", rows="test_forget", model="detached")
    if (worst := worst_input_attack(evaluation)) is not None:
        fields = {"measure": "input attack", "rows": "test_forget", "variant": worst.variant}
        metrics[f"test_forget, worst input attack ({worst.variant})"] = scores(**fields, model="unlearned")
        metrics["test_forget, detached, under the same attack"] = scores(**fields, model="detached")
    for split in SPLITS:
        metrics[f"{split}, retrained"] = scores(measure="utility", rows=split, model="retrained")
    return {split: values for split, values in metrics.items() if values}


def add_to_card(evaluation: Evaluation, adapter_folder: str | os.PathLike) -> None:
    """Put `card_metrics` into a saved adapter: into its `spul_config.json` and the card's section "Metrics".

    Metrics that were recorded before are replaced; all else stays as it is.

    Args:
        evaluation: of this adapter.
        adapter_folder: what `save_pretrained` of a prompt or of unlearning layers wrote.

    Raises:
        FileNotFoundError: if the folder has no `spul_config.json` or no model card.
        ValueError: if the card has no section "Metrics", or utility was not measured.
    """
    write_metrics(adapter_folder, card_metrics(evaluation))

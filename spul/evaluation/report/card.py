"""The results of an evaluation in an adapter's `spul_config.json` and on its model card."""

from __future__ import annotations

import os
from functools import partial

from ...data.unlearning_data import SPLITS
from ...records.card import write_metrics
from ..measures import variant_in_words
from ..metrics.table import METRICS
from ..results import Evaluation
from .wording import where, worst_input_attack


def card_metrics(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """An evaluation in short, in the form of `SpulConfig.metrics`.

    The four splits under the unlearned model, `"test_forget, detached"` (the base, with the prompt disabled),
    `"test_forget, worst input attack (...)"` (the attack under which the model has most right answers), the base under
    the same attack, and the four splits under the retrained model. What was not measured is missing.

    Args:
        evaluation: with the measure "utility".

    Returns:
        Split to metric to value: accuracy, weighted F1, share of generic answers, of free-form rows also the
        probability. To set before `save_pretrained`: `unlearner.spul_config.metrics = card_metrics(evaluation)`.

    Raises:
        ValueError: if utility was not measured.
    """

    def scores(**fields: str | int | None) -> dict[str, float]:
        found = {one.name: one.value for one in where(evaluation, **fields)}
        return {name: found[name] for name, metric in METRICS.items() if metric.on_card and name in found}

    metrics = {split: scores(measure="utility", rows=split, model="unlearned") for split in SPLITS}
    if not any(metrics.values()):
        raise ValueError("the evaluation has no measure 'utility' of the unlearned model; evaluate the four splits.")
    metrics["test_forget, detached"] = scores(measure="utility", rows="test_forget", model="detached")
    if (worst := worst_input_attack(evaluation)) is not None:
        variant: dict[str, str | int | None] = {"attack": worst.attack, "level": worst.level}
        under = partial(scores, measure="input attack", rows="test_forget", **variant)
        metrics[f"test_forget, worst input attack ({variant_in_words(worst)})"] = under(model="unlearned")
        metrics["test_forget, detached, under the same attack"] = under(model="detached")
    for split in SPLITS:
        metrics[f"{split}, retrained"] = scores(measure="utility", rows=split, model="retrained")
    return {split: values for split, values in metrics.items() if values}


def add_to_card(evaluation: Evaluation, adapter_folder: str | os.PathLike) -> None:
    """Write `card_metrics` into a saved adapter: into its `spul_config.json` and the card's section "Metrics".

    Earlier metrics are replaced; all else is unchanged.

    Args:
        evaluation: the evaluation of this adapter.
        adapter_folder: a folder that `save_pretrained` of a prompt or of unlearning layers wrote.

    Raises:
        FileNotFoundError: if the folder has no `spul_config.json` or no model card.
        ValueError: if the card has no section "Metrics", or utility was not measured.
    """
    write_metrics(adapter_folder, card_metrics(evaluation))

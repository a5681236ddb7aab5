"""The results of an evaluation in an adapter's `spul_config.json` and on its model card."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

from ...data.unlearning_data import SPLITS
from ...records.card import _metrics_table
from ...records.spul_config import SPUL_CONFIG_NAME, SpulConfig
from ..measures import variant_in_words
from ..metrics.table import METRICS
from ..results import Evaluation
from .wording import where, worst_input_attack

CARD_NAME = "README.md"
METRICS_SECTION = re.compile(r"^## Metrics *\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


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
    folder = Path(adapter_folder)
    for name in (SPUL_CONFIG_NAME, CARD_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}; pass a folder that save_pretrained of a prompt or of unlearning "
                "layers wrote."
            )
    metrics = card_metrics(evaluation)
    section = f"## Metrics\n\n{_metrics_table(SpulConfig(metrics=metrics))}\n\n"
    card, count = METRICS_SECTION.subn(lambda _: section, (folder / CARD_NAME).read_text(encoding="utf-8"), count=1)
    if count == 0:
        raise ValueError(
            f"{CARD_NAME} of {str(folder)!r} has no section '## Metrics' to write to; add that line, or save the "
            "adapter again."
        )
    record = json.loads((folder / SPUL_CONFIG_NAME).read_text(encoding="utf-8"))
    record["metrics"] = metrics
    _replace(folder / SPUL_CONFIG_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / CARD_NAME, card.rstrip("\n") + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)

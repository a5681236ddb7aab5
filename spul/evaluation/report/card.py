"""The results of an evaluation in an adapter's `spul_config.json` and on its model card."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial

from huggingface_hub import EvalResult, ModelCardData

from ...data.unlearning_data import SPLITS
from ...records.card import write_metrics
from ..aggregation import MetricValue
from ..measures import variant_in_words
from ..metrics.table import METRICS, metric_of
from ..results import Evaluation
from .answers import answers, cost, forgotten
from .document import Section, to_markdown
from .report import protection, title_of
from .summary import before_and_after
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


def hub_results(evaluation: Evaluation) -> list[EvalResult]:
    """The metrics of `card_metrics` that are the unlearned model's, in the Hub's form for a card's `model-index`.

    Args:
        evaluation: with the measure "utility".

    Returns:
        A result for each metric: the data set is named after its rows, which are not public; `metric_args` has the
        ends of the 95 % interval and the number of rows, as far as there are any.
    """
    found = where(evaluation, measure="utility", model="unlearned")
    if (worst := worst_input_attack(evaluation)) is not None:
        variant: dict[str, str | int | None] = {"attack": worst.attack, "level": worst.level}
        found += where(evaluation, measure="input attack", rows="test_forget", model="unlearned", **variant)
    return [_result(one) for one in found if metric_of(one.name).on_card and not math.isnan(one.value)]


def _result(one: MetricValue) -> EvalResult:
    ends = {"low": one.low, "high": one.high}
    arguments = {name: round(end, 6) for name, end in ends.items() if not math.isnan(end)} | {"rows": one.num_rows}
    attack = f"worst input attack ({variant_in_words(one)})" if one.attack else None
    return EvalResult(
        task_type="text-generation",
        task_name="Unlearning",
        dataset_type="private",
        dataset_name=one.rows.replace("_", " ") + (f", {attack}" if attack else ""),
        dataset_config=attack,
        dataset_split=one.rows,
        metric_type=one.name,
        metric_name=metric_of(one.name).label,
        metric_value=round(one.value, 6),
        metric_args=arguments,
    )


def evidence_card(evaluation: Evaluation, digests: Mapping[str, str]) -> str:
    """The card of an evidence pack, of any unlearned model.

    Args:
        evaluation: one evaluation.
        digests: SHA-256 of the pack's data files, by name.

    Returns:
        Markdown with the Hub's metadata, `hub_results` among them.
    """
    facts, title = evaluation.facts, title_of(evaluation)
    base = facts.get("base")
    name = facts.get("adapter") or base or "unlearned model"
    data = ModelCardData(
        model_name=name, base_model=base, tags=["spul", "unlearning"], eval_results=hub_results(evaluation) or None
    )
    digest_of = {
        "SHA-256 of the adapter's weights": facts.get("weights_sha256"),
        "fingerprint of the base's weights": facts.get("base_fingerprint"),
        **{f"SHA-256 of {file}": digest for file, digest in digests.items()},
    }
    parts = [[what, digest] for what, digest in digest_of.items() if digest is not None]
    how = "manifest.json has the SHA-256 of every file, and the ledger's entry that of manifest.json."
    sections = [
        *answers(evaluation),
        before_and_after(evaluation),
        Section("What it does and does not protect against", [protection(evaluation)]),
        Section("Which model, which files", [how], ["what", "digest"], parts),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n{to_markdown(title, sections, {})}"


def add_to_card(evaluation: Evaluation, adapter_folder: str | os.PathLike) -> None:
    """Write `card_metrics` into a saved adapter: into its `spul_config.json` and the card's section "Metrics".

    The section begins with what is forgotten and what it cost, in words; the card's metadata get `hub_results`.
    Earlier metrics are replaced; all else is unchanged.

    Args:
        evaluation: the evaluation of this adapter.
        adapter_folder: a folder that `save_pretrained` of a prompt or of unlearning layers wrote.

    Raises:
        FileNotFoundError: if the folder has no `spul_config.json` or no model card.
        ValueError: if the card has no section "Metrics", or utility was not measured.
    """
    lines = [*forgotten(evaluation), *cost(evaluation)]
    write_metrics(adapter_folder, card_metrics(evaluation), lines, hub_results(evaluation))

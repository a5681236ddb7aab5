"""Attacks of an evaluation: on the input, on the weights, by sampling, by trained vectors."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from torch import nn

from ..data.rows import column_values, completion_text
from ..models.causal_lm import bare_model, unwrapped
from ..models.compat import is_quantized
from ..models.compat_devices import device_of
from ..models.unlearner import unlearner_of
from ..records.messages import warn
from .aggregation import Key, Measurement, in_words
from .attacks.changes import (
    InapplicableError,
    UnchangedError,
    is_conversation,
    question_lost,
    tokens_lost,
    with_prompts_changed,
    with_questions,
)
from .attacks.inputs import WITHOUT
from .attacks.probe import linear_probe
from .attacks.quantization import quantized as in_few_bits
from .attacks.relearning import relearn
from .attacks.sampling import sampled_answers, sampled_success
from .attacks.suffix import soft_suffix
from .attacks.usual import DILUTED, TURN_UNIT, InputAttacks, checked_attacks, chosen_attacks
from .metrics.free_form import rouge_l
from .suite import Suite, Task, joined


def inputs(suite: Suite) -> Iterator[Task]:
    """Scores of the same rows asked otherwise; the first as they are."""
    encoder = suite.collator.encoder
    asked = {split: _attackable(suite, split) for split in ("test_forget", "test_retain")}
    for split, rows in asked.items():
        attacks = _input_attacks(suite, split, asked)
        if attacks and encoder.text_field is None and not is_conversation(rows):
            suite.skipped["input attack on the text alone"] = (
                "give the collator a text_field, the column whose text stands in the prompt; without it attacks "
                "change whole prompts, the format's parts included"
            )
        lost_anyhow = tokens_lost(rows, encoder)
        for (attack, level), change in {(WITHOUT, None): lambda rows: rows, **checked_attacks(attacks)}.items():
            name = in_words(attack, level, TURN_UNIT)
            try:
                attacked = with_prompts_changed(rows, change, name)
            except InapplicableError as error:
                unchanged = isinstance(error, UnchangedError)
                suite.skipped[f"input attack {name!r} on {split}"] = (
                    "it changes no prompt" if unchanged else str(error)
                )
                continue
            lost = tokens_lost(attacked, encoder)
            if why := question_lost(rows, attacked, lost - lost_anyhow, encoder):
                suite.skipped[f"input attack {name!r} on {split}"] = why
                continue
            if lost > lost_anyhow:
                warn(
                    f"the input attack {name!r} makes rows of {split} lose {lost:.1f} tokens each, without it "
                    f"{lost_anyhow:.1f}: part of the text or of the attack is cut off. Raise the collator's "
                    "max_length.",
                )

            def scores(
                model: Any, key: Key, rows: Dataset = rows, attacked: Dataset = attacked, lost: float = lost
            ) -> list[Measurement]:
                per_row = suite.answers(model, attacked)
                if key.attack != WITHOUT:
                    per_row["changed"] = _are_changed(rows, attacked)
                return [Measurement(*key, per_row=per_row, overall={"tokens_lost": lost})]

            for model in suite.models:
                yield suite.task(rows, scores, Key("input attack", split, model, attack, level))


def _attackable(suite: Suite, split: str) -> Dataset:
    """Rows of a split that input attacks can change, of which no other conversation keeps an attack."""
    every = suite.splits[split]
    rows = with_questions(every, suite.collator.encoder.text_field)
    if num := len(every) - len(rows):
        suite.skipped[f"input attack on {num} of {len(every)} rows of {split}"] = (
            'the conversation has no message of the role "user" with a text, or not that of the text_field, where its '
            "question would stand; as asked and under each attack the others are scored"
        )
    return suite.attacked(rows)


def _are_changed(rows: Dataset, attacked: Dataset) -> list[float]:
    """1 for each row whose prompt an attack changes, 0 for others."""
    pairs = zip(column_values(rows, "prompt"), column_values(attacked, "prompt"), strict=True)
    return [float(before != after) for before, after in pairs]


def _input_attacks(suite: Suite, split: str, asked: Mapping[str, Dataset]) -> InputAttacks:
    """The attacks that are given, else the usual ones on the rows of a split; `asked` has the rows of both."""
    settings, text_field = suite.attacks, suite.collator.encoder.text_field
    if settings.inputs is not None:
        return settings.inputs
    filler = asked["test_retain"]
    others = filler if split == "test_forget" else asked["test_forget"]
    attacks = settings.usual_attacks(text_field, filler, others, suite.seed)
    for num in settings.turns:
        if (DILUTED, num) not in attacks and DILUTED in (settings.only or (DILUTED,)):
            suite.skipped[f"input attack {in_words(DILUTED, num, TURN_UNIT)!r}"] = (
                f"the attacked rows of test_retain have no more than {num} different questions"
            )
    if settings.only:
        return chosen_attacks(attacks, settings.only)
    if not settings.names:
        suite.skipped["input attack on names"] = (
            "give AttackSettings(names=...); without them each text's longest words are disguised"
        )
    if text_field is None and not is_conversation(filler):
        suite.skipped["input attack by mixed queries and documents"] = (
            "give the collator a text_field, the column whose text they stand around"
        )
    for name, given in (("paraphrase", settings.paraphrase), ("wording", settings.wording)):
        if given is None:
            suite.skipped[f"input attack by {name}"] = f"give AttackSettings({name}=...)"
    return attacks


def relearning(suite: Suite) -> Iterator[Task]:
    """Scores of one half of the forget rows while rows of the other half are learned again."""
    few, others = suite.halves()
    few = few.select(range(min(suite.attacks.relearn_rows, len(few))))
    steps = sorted({0, *suite.attacks.relearn_steps})

    def scores(model: Any, *keys: Key) -> list[Measurement]:
        lr = suite.attacks.relearn_lr if unlearner_of(model).has_adapter else suite.attacks.relearn_model_lr
        with _learning(model):
            records = relearn(
                *(model, few, others, suite.collator.encoder, suite.answers, lr, suite.attacks.relearn_steps),
                seed=suite.seed,
            )
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = {record.pop("step"): record for record in records}
        return [Measurement(*key, per_row=found[key.level], overall={"trained_parameters": trained}) for key in keys]

    if suite.retrained is None:
        suite.skipped["relearning of a control"] = "the base knows the rows anyhow; give retrained="
    for name in suite.models:
        if name != "detached":
            yield suite.task(others, scores, *(Key("relearning", "train_forget", name, level=step) for step in steps))


def quantized(suite: Suite) -> Iterator[Task]:
    """Scores of the same prompt or layers over a base in few bits."""
    for name in suite.models:
        with suite.subject(name) as model:
            # Detached, the base still has PEFT's layers in it.
            why = _why_not_quantized(suite.model if name == "detached" and suite.base is None else model)
        if why:
            suite.skipped[f"quantized, {name}"] = why
            continue
        for bits in suite.attacks.bits:
            copies: list[Any] = []  # one, for both splits

            def scores(model: Any, key: Key, rows: Dataset, copies: list[Any] = copies) -> list[Measurement]:
                if not copies:
                    with tempfile.TemporaryDirectory() as folder:
                        copies.append(_quantized_copy(model, cast(int, key.level), Path(folder)))
                return [Measurement(*key, per_row=suite.answers(copies[0], rows))]

            parts = []
            for split in ("test_forget", "test_retain"):
                rows = suite.attacked(suite.splits[split])
                key = Key("quantized", split, name, level=bits)
                parts.append(suite.task(rows, partial(scores, rows=rows), key))
            yield joined(parts, copies.clear)


def sampling(suite: Suite) -> Iterator[Task]:
    """Success of several sampled answers; of free-form answers the best ROUGE-L among them."""
    rows, settings = suite.attacked(suite.splits["test_forget"]), suite.attacks

    def best_recall(model: Any, *keys: Key) -> list[Measurement]:
        answers = sampled_answers(
            *(model, rows, suite.collator.encoder, max(settings.tries), settings.temperature, suite.max_new_tokens),
            *(suite.seed, suite.batch_size),
        )
        true = [completion_text(completion) for completion in column_values(rows, "completion")]
        recall = np.array(
            [rouge_l(texts, [text] * len(texts))["rouge_l_recall"] for texts, text in zip(answers, true, strict=True)]
        )
        return [Measurement(*key, per_row={"rouge_l_recall": recall[:, : key.level].max(axis=1)}) for key in keys]

    def success(model: Any, *keys: Key) -> list[Measurement]:
        once = sampled_success(model, rows, suite.collator.encoder, 1, settings.temperature, suite.batch_size)
        with np.errstate(divide="ignore"):
            found = [-np.expm1(cast(int, key.level) * np.log1p(-once)) for key in keys]
        return [Measurement(*key, per_row={"success": values}) for key, values in zip(keys, found, strict=True)]

    for name in suite.models:
        keys = [Key("sampling", "test_forget", name, level=tries) for tries in settings.tries]
        yield suite.task(rows, best_recall if suite.is_free_form else success, *keys)


def suffix(suite: Suite) -> Iterator[Task]:
    """Scores before and after vectors behind the question are trained on the other half of the forget rows."""
    few, others = suite.halves()
    few, settings = suite.attacked(few), suite.attacks
    metrics = ("accuracy", "loss", *(["probability"] if suite.is_free_form else []))

    def scores(model: Any, *keys: Key) -> list[Measurement]:
        # Room for the suffix. Rows are shortened though they might fit the model: every method gets the same rows.
        encoder = suite.collator.encoder
        found, _ = soft_suffix(
            *(model, few, others, encoder.with_max_length(encoder.max_length - settings.suffix_tokens)),
            *(settings.suffix_tokens, settings.suffix_steps, settings.suffix_lr),
            seed=suite.seed,
        )
        return [
            Measurement(
                *key,
                per_row={name: found[key.attack][name] for name in metrics},
                num_rows=len(few if key.attack == "trained" else others),
            )
            for key in keys
        ]

    for name in suite.models:
        keys = [Key("soft suffix", "train_forget", name, attack) for attack in ("before", "after", "trained")]
        yield suite.task(others, scores, *keys)


def probe(suite: Suite) -> Iterator[Task]:
    """Accuracy of a linear probe for the true answers."""
    few, others = suite.halves()

    def scores(model: Any, key: Key) -> list[Measurement]:
        found = linear_probe(model, few, others, suite.collator.encoder, seed=suite.seed, batch_size=suite.batch_size)
        return [Measurement(*key, overall=found)]

    for name in suite.models:
        yield suite.task(others, scores, Key("linear probe", "train_forget", name))


# ---- models ----


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Context manager: the adapter, or else all weights, require gradients."""
    model = unwrapped(model)
    if any(parameter.requires_grad for parameter in model.parameters()):
        yield
        return
    learning = [p for p in unlearner_of(model).adapter_parameters() if p.is_floating_point()]
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(False)


def _why_not_quantized(model: nn.Module) -> str:
    if is_quantized(bare_model(unwrapped(model))):
        return "it is quantized already"
    return unlearner_of(model).why_not_moved()


def _quantized_copy(model: nn.Module, bits: int, folder: Path) -> Any:
    """The model over its base in 8 or 4 bit; the prompt or the layers unchanged."""
    model = unwrapped(model)
    base: Any = bare_model(model)
    base.save_pretrained(folder / "base")
    small = in_few_bits(folder / "base", bits, base.dtype, device_map={"": device_of(base)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained on other weights")
        return unlearner_of(model).on_base(small, folder / "adapter")

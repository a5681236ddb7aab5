"""What is done to models to get the knowledge back: attacks on the input, on the weights, and by sampling."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch import nn

from ...data.collator import ForgetRetainCollator, completion_text
from ...layers.unlearning_layers import UnlearningLayers
from ...models.causal_lm import bare_model, has_adapter, unwrapped
from ...models.compat import own_parameters
from ...prompts.unlearner import SoftPromptUnlearner
from ..metrics.free_form import rouge_l
from ..suite import AttackSettings, Found, Suite, Task, joined
from .inputs import (
    JAILBREAKS,
    WITHOUT,
    UnchangedError,
    diluted,
    letter_case,
    paraphrase,
    question_lost,
    reworded,
    tokens_lost,
    whitespace_noise,
    with_prefix,
    with_prompts_changed,
    with_suffix,
)
from .probe import linear_probe
from .quantization import quantized as in_few_bits
from .relearning import relearn
from .sampling import sampled_answers, sampled_success
from .suffix import soft_suffix


def usual_attacks(
    text_field: str | None,
    filler_rows: Dataset,
    seed: int = 0,
    rewrite: Callable[[str], str] | None = None,
    wording: Mapping[str, str] | None = None,
    turns: Sequence[int] = AttackSettings.turns,
) -> dict[str, Callable[[Dataset], Dataset]]:
    """The attacks on the input that an evaluation makes unless it is given others.

    Args:
        text_field: the column whose text stands in the prompt, as the collator's.
        filler_rows: other questions with their answers, for the turns that dilute.
        seed: seed of the draws.
        rewrite: see `paraphrase`; None leaves it out.
        wording: see `reworded`; None leaves it out. It needs a `text_field`.
        turns: see `diluted`, 1 and 4 unless given; as many as there are different questions, or more, are left out.
    """
    attacks: dict[str, Callable[[Dataset], Dataset]] = {
        "capitals": partial(letter_case, how="upper", text_field=text_field),
        "small letters": partial(letter_case, how="lower", text_field=text_field),
        "random case": partial(letter_case, how="random", text_field=text_field, seed=seed),
        "spaces": partial(whitespace_noise, share=0.3, text_field=text_field, seed=seed),
    }
    for i, text in enumerate(JAILBREAKS):
        attacks[f"jailbreak {i + 1} before"] = partial(with_prefix, text=text)
        attacks[f"jailbreak {i + 1} after"] = partial(with_suffix, text=text, text_field=text_field)
    different = len(set(map(str, filler_rows["prompt"])))
    for num in turns:
        if num < different:
            attacks[_of_turns(num)] = partial(diluted, filler_rows=filler_rows, num_turns=num, seed=seed)
    if rewrite is not None:
        attacks["paraphrase"] = partial(paraphrase, rewrite=rewrite, text_field=text_field)
    if wording is not None:
        if text_field is None:
            raise ValueError("wording is given, and text_field=None: name the column whose text stands in the prompt.")
        attacks["reworded"] = partial(reworded, wording=wording, text_field=text_field)
    return attacks


def _of_turns(num: int) -> str:
    return "diluted, 1 turn" if num == 1 else f"diluted, {num} turns"


def inputs(suite: Suite) -> Iterator[Task]:
    """The same rows asked otherwise; the first of them as they are."""
    if not all(isinstance(rows[0]["prompt"], str) for rows in suite.splits.values()):
        suite.left_out["input attack"] = "prompts are conversations; render them to text first"
        return
    attacks = suite.attacks.inputs
    if attacks is None:
        field, filler, how = suite.collator.encoder.text_field, suite.some(suite.splits["test_retain"]), suite.attacks
        attacks = usual_attacks(field, filler, suite.seed, how.paraphrase, how.wording, how.turns)
        for name, given in (("paraphrase", how.paraphrase), ("wording", how.wording)):
            if given is None:
                suite.left_out[f"input attack by {name}"] = f"give AttackSettings({name}=...)"
        for num in how.turns:
            if _of_turns(num) not in attacks:
                suite.left_out[f"input attack {_of_turns(num)!r}"] = (
                    f"the rows of test_retain that are attacked have no more than {num} different questions"
                )
    if attacks and suite.collator.encoder.text_field is None:
        suite.left_out["input attack on the text alone"] = (
            "give the collator a text_field, the column whose text stands in the prompt; without it attacks change "
            "whole prompts, the format's parts included"
        )
    if WITHOUT in attacks:
        raise ValueError(f"an input attack is called {WITHOUT!r}, as the rows as they are; give it another name.")
    attacks = {WITHOUT: lambda rows: rows, **attacks}
    for split in ("test_forget", "test_retain"):
        rows = suite.some(suite.splits[split])
        lost_anyhow = tokens_lost(rows, suite.collator)
        for attack, change in attacks.items():
            try:
                attacked = with_prompts_changed(rows, change, attack)
            except UnchangedError:
                suite.left_out[f"input attack {attack!r} on {split}"] = "it changes no prompt"
                continue
            lost = tokens_lost(attacked, suite.collator)
            if why := question_lost(rows, lost - lost_anyhow, suite.collator):
                suite.left_out[f"input attack {attack!r} on {split}"] = why
                continue
            if lost > lost_anyhow:
                warnings.warn(
                    f"the input attack {attack!r} makes rows of {split} lose {lost:.1f} tokens each, without it "
                    f"{lost_anyhow:.1f}: part of the text or of the attack is gone. Raise the collator's max_length.",
                    stacklevel=2,
                )

            def run(model: Any, attacked: Dataset = attacked, attack: str = attack, lost: float = lost) -> Found:
                return {attack: {"per_row": suite.answers(model, attacked), "overall": {"tokens_lost": lost}}}

            for name in suite.models:
                yield suite.task("input attack", split, rows, name, run, (attack,))


def relearning(suite: Suite) -> Iterator[Task]:
    """A few forget rows learned again, others scored."""
    if suite.too_few:
        suite.left_out["relearning"] = suite.too_few
        return
    few, others = suite.halves()
    few = few.select(range(min(suite.attacks.relearn_rows, len(few))))
    steps = sorted({0, *suite.attacks.relearn_steps})

    def run(model: Any) -> Found:
        lr = suite.attacks.relearn_lr if has_adapter(model) else suite.attacks.relearn_model_lr
        with _learning(model):
            records = relearn(
                *(model, few, others, suite.collator, lr, suite.attacks.relearn_steps),
                seed=suite.seed,
                score=lambda model: suite.answers(model, others),
            )
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            f"{record.pop('step')} steps": {"per_row": record, "overall": {"trained_parameters": learning}}
            for record in records
        }

    if suite.retrained is None:
        suite.left_out["relearning of a control"] = "the base knows the rows anyhow; give retrained="
    for name in suite.models:
        if name == "detached":
            continue
        yield suite.task("relearning", "train_forget", others, name, run, [f"{step} steps" for step in steps])


def quantized(suite: Suite) -> Iterator[Task]:
    """The same prompt or layers over a base in few bits."""
    for name in suite.models:
        with suite.subject(name) as model:
            # Detached, the base still has PEFT's layers in it.
            why = _why_not_quantized(suite.model if name == "detached" and suite.base is None else model)
        if why:
            suite.left_out[f"quantized, {name}"] = why
            continue
        for bits in suite.attacks.bits:
            copies: list[Any] = []  # one, for both splits

            def run(model: Any, rows: Dataset, bits: int = bits, copies: list[Any] = copies) -> Found:
                if not copies:
                    with tempfile.TemporaryDirectory() as folder:
                        copies.append(_quantized_copy(model, bits, Path(folder)))
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # once a call
                    return {f"{bits} bit": {"per_row": suite.answers(copies[0], rows)}}

            parts = []
            for split in ("test_forget", "test_retain"):
                rows = suite.some(suite.splits[split])
                parts.append(suite.task("quantized", split, rows, name, partial(run, rows=rows), (f"{bits} bit",)))
            yield joined(parts, copies.clear)


def sampling(suite: Suite) -> Iterator[Task]:
    """How likely one of several sampled answers is the true one."""
    rows, how = suite.some(suite.splits["test_forget"]), suite.attacks

    def run(model: Any) -> Found:
        if suite.is_free_form:
            said = sampled_answers(
                *(model, rows, suite.collator, max(how.tries), how.temperature, suite.max_new_tokens, suite.seed),
                batch_size=suite.batch_size,
            )
            true = [completion_text(completion) for completion in rows["completion"]]
            recall = np.array(
                [rouge_l(texts, [text] * len(texts)).recall for texts, text in zip(said, true, strict=True)]
            )
            best = {tries: recall[:, :tries].max(axis=1) for tries in how.tries}
            return {f"{tries} tries": {"per_row": {"rouge_l_recall": best[tries].tolist()}} for tries in how.tries}
        once = sampled_success(model, rows, suite.collator, 1, how.temperature, suite.batch_size)
        with np.errstate(divide="ignore"):
            found = {tries: -np.expm1(tries * np.log1p(-once)) for tries in how.tries}
        return {f"{tries} tries": {"per_row": {"success": found[tries].tolist()}} for tries in how.tries}

    for name in suite.models:
        yield suite.task("sampling", "test_forget", rows, name, run, [f"{tries} tries" for tries in how.tries])


def suffix(suite: Suite) -> Iterator[Task]:
    """Vectors behind the question, trained to bring the answers out."""
    if suite.too_few:
        suite.left_out["soft suffix"] = suite.too_few
        return
    few, others = suite.halves()

    def run(model: Any) -> Found:
        how = suite.attacks
        found = soft_suffix(
            *(model, suite.some(few), others, _shorter(suite.collator, how.suffix_tokens)),
            *(how.suffix_tokens, how.suffix_steps, how.suffix_lr),
            seed=suite.seed,
        )
        names = ("accuracy", "loss", "probability") if suite.is_free_form else ("accuracy", "loss")
        scores: Found = {
            variant: {"per_row": {name: getattr(found, variant)[name].tolist() for name in names}}
            for variant in ("before", "after", "trained")
        }
        scores["trained"]["num_rows"] = len(suite.some(few))
        return scores

    for name in suite.models:
        yield suite.task("soft suffix", "train_forget", others, name, run, ("before", "after", "trained"))


def probe(suite: Suite) -> Iterator[Task]:
    """What can be read off the hidden states."""
    few, others = suite.halves()
    if suite.is_free_form or len(set(map(str, few["completion"]))) < 2:
        suite.left_out["linear probe"] = "it reads classes, and the completions are free-form or all the same"
        return

    def run(model: Any) -> Found:
        found = linear_probe(model, few, others, suite.collator, seed=suite.seed, batch_size=suite.batch_size)
        return {"": {"overall": dataclasses.asdict(found)}}

    for name in suite.models:
        yield suite.task("linear probe", "train_forget", others, name, run)


def _shorter(collator: ForgetRetainCollator, num_tokens: int) -> ForgetRetainCollator:
    """A collator whose rows leave room for so many tokens more.

    Whether they would fit in the model anyhow does not matter: controls have the same rows under every method.
    """
    encoder = collator.encoder
    return ForgetRetainCollator(
        collator.tokenizer,
        collator.generic_completions,
        encoder.max_length - num_tokens,
        append_eos=encoder.append_eos,
        text_field=encoder.text_field,
    )


# ---- models ----


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Within it what was trained requires gradients, as for one who may train it: the adapter, or else all weights."""
    model = unwrapped(model)
    if any(parameter.requires_grad for parameter in model.parameters()):
        yield
        return
    fixed = {id(parameter) for _, parameter in own_parameters(bare_model(model))} if has_adapter(model) else set()
    if isinstance(model, UnlearningLayers) and not model.layers_config.train_down:
        fixed |= {id(parameter) for layer in model.layers for parameter in cast(Any, layer).down.parameters()}
    learning = [p for p in model.parameters() if id(p) not in fixed and p.is_floating_point()]
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(False)


def _why_not_quantized(model: nn.Module) -> str:
    if getattr(bare_model(unwrapped(model)), "is_quantized", False):
        return "it is quantized already"
    if isinstance(model, PeftModel) and not isinstance(model, SoftPromptUnlearner):
        return "adapters of PEFT other than spul's prompts: merge them first (merge_and_unload)"
    return ""


def _quantized_copy(model: nn.Module, bits: int, folder: Path) -> Any:
    """The model over its base in 8 or 4 bit, the prompt or the layers as they are."""
    model = unwrapped(model)
    base = cast(Any, bare_model(model))
    base.save_pretrained(folder / "base")
    small = in_few_bits(folder / "base", bits, base.dtype, device_map={"": base.device})
    if not has_adapter(model):
        return small
    cast(Any, model).save_pretrained(str(folder / "adapter"))
    trainable: Any = UnlearningLayers if isinstance(model, UnlearningLayers) else SoftPromptUnlearner
    name = getattr(model, "active_adapter", "default")
    place = folder / "adapter" / ("" if name == "default" else name)  # as PEFT does
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained on other weights")
        return trainable.from_pretrained(small, place).eval()

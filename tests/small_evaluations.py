"""Small evaluations of tiny models: the models, splits, questions and attacks, and what is checked of the result."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, make_collator, rows, stirred
from peft import LoraConfig, get_peft_model

import spul
import spul.evaluation.suite as suite
from spul import SoftPromptUnlearner
from spul.data import SPLITS
from spul.evaluation.aggregation import Key
from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.attacks import letter_case, with_prefix
from spul.evaluation.measures import key_in_words
from spul.evaluation.results import Evaluation

SEED = 5


INPUTS = {"capitals": lambda some: letter_case(some, "upper"), "before": lambda some: with_prefix(some, "film ?")}


ATTACKS = AttackSettings(
    inputs=INPUTS,
    relearn_rows=4,
    relearn_steps=(3, 1),  # in any order
    relearn_lr=0.02,
    relearn_model_lr=0.003,
    bits=(4,),
    tries=(1, 7),
    temperature=0.7,
    suffix_tokens=2,
    suffix_steps=3,
    suffix_lr=0.1,
    gradient_norm=True,
)


def make_splits(**others) -> dict[str, Dataset]:
    names = dict(zip(SPLITS, ("film", "jane", "good", "doe"), strict=True))
    return {split: rows(name, num) for (split, name), num in zip(names.items(), (6, 11, 6, 7), strict=True)} | others


@cache
def learned_state() -> dict[str, torch.Tensor]:
    """Of a model that gives labels and generic answers, some of them right: so that shares are neither 0 nor 1."""
    model, collator = build("llama").train(False), make_collator()
    given = [row for some in make_splits().values() for row in some]
    given = [{**row, "completion": " neutral"} if i % 4 == 0 else row for i, row in enumerate(given)]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**collator.encoder.batch(given)).loss.backward()
        optimizer.step()
    return model.state_dict()


def learned(noise: float = 0.0, seed: int = 0) -> Any:
    model = build("llama")
    model.load_state_dict(learned_state())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def make_model(trainable: str, seed: int = 3) -> Any:
    base = learned()
    torch.manual_seed(seed)
    if trainable in CONFIGS:
        return SoftPromptUnlearner(base, CONFIGS[trainable](3))
    if trainable == "layers":
        return stirred(base, seed=seed)
    if trainable == "lora":
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.2 * torch.randn_like(parameter) if "lora_B" in name else 0.0)
        return model
    return learned(0.05, seed)


def snapshot(model: Any) -> dict[str, Any]:
    """All that an evaluation must leave as it was."""
    modules = list(model.named_modules())
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "modes": {name: module.training for name, module in modules},
        "hooks": {name: [*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for name, m in modules},
        "dropout": {name: module.p for name, module in modules if isinstance(module, torch.nn.Dropout)},
        "enabled": [getattr(model, "enabled", None), getattr(model, "_adapters_disabled", None)],
        "switched_off": [name for name, module in modules if getattr(module, "disable_adapters", False) is True],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name
    for name in before.keys() - {"state"}:
        assert before[name] == after[name], name


QUESTIONS = [
    {
        "question": f"the plot of {c}?",
        "answer": f"good {c}",
        "paraphrased_answer": f"is good {c} film",
        "perturbed_answer": [f"bad {c}", "the text is neutral", "jane"][: 2 + (c == "b")],
        "paraphrased_question": "not asked",
    }
    for c in "abc"
]


def questions(name: str) -> Dataset:
    return Dataset.from_list([{**question, "question": f"{name} {question['question']}"} for question in QUESTIONS])


def halves(num_rows: int = 4, forget: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """The forget rows to attack with, and those to try it on."""
    forget = make_splits()["train_forget"] if forget is None else forget
    places = random.Random(SEED).sample(range(len(forget)), len(forget))
    return forget.select(places[: len(forget) // 2]).select(range(num_rows)), forget.select(places[len(forget) // 2 :])


def assert_metrics(found: Evaluation, expected: dict[str, Any], rel: float = 1e-5, **where: Any) -> None:
    for name, value in expected.items():
        assert found.metric(name=name, **where).value == pytest.approx(value, rel=rel, abs=1e-7), (name, where)


def per_row(found: Evaluation, *key: Any, level: int | None = None) -> dict[str, list[float]]:
    (measurement,) = [one for one in found.measurements if one.key == Key(*key, level=level)]
    return measurement.per_row


def measured(model: Any, *measures: str, splits: Any = None, **options: Any) -> Evaluation:
    """A small evaluation."""
    splits = make_splits() if splits is None else splits
    options = {"attacks": ATTACKS, "seed": SEED, "progress": False} | options
    collator = options.pop("collator", None) or make_collator()
    return spul.evaluate(model, splits, collator, measures=measures, **options)


def counted(monkeypatch, stop_after: int | None = None) -> list[str]:
    """A list of the tasks that are measured from now on; a task after so many raises."""
    done: list[str] = []
    really = suite.Suite.task

    def task(self, *args, **kwargs):
        made = really(self, *args, **kwargs)

        def run():
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(key_in_words(made.keys[0]))
            return made.run()

        return dataclasses.replace(made, run=run)

    monkeypatch.setattr(suite.Suite, "task", task)
    return done

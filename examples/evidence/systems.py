"""Systems of a plan, built on an experiment: prompts, LoRA, gates, and rivals that train nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from paper.costs import Meter
from paper.experiment import Experiment
from paper.runs import Run, prompt_config
from peft import PeftModel, PromptTuningConfig
from transformers import set_seed

from evidence.plan import TRAINED
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.data.known_reviews import SST2_FORGET_NAMES
from spul.evaluation.metrics.scoring import answer_scores, collect_answers
from spul.gates import GatedUnlearner, TextGate, hard_negatives, load
from spul.prompts import DiscriminativeStart
from spul.records.files import write_text
from spul.rivals import (
    Corruption,
    EmbeddingCorruption,
    FixedRefusal,
    GuardrailPrompt,
    InContextUnlearning,
    guardrail_instruction,
)
from spul.training.augmentation import augmented, rewritings
from spul.training.rates import default_learning_rate

Rows = dict[str, Dataset]
SETTINGS = "made_with.json"


def split_rows(experiment: Experiment, held_out: float | None) -> tuple[Rows, Rows]:
    """Rows to train on and rows to score on, `forget` and `retain` each: test rows, or held-out training rows."""
    train, scored = {}, {}
    for side in ("forget", "retain"):
        rows = experiment.rows[f"train_{side}"]
        if held_out is None:
            train[side], scored[side] = rows, experiment.scored[f"test_{side}"]
            continue
        parts = rows.train_test_split(held_out, seed=experiment.setup.seed)
        most = experiment.setup.limit_score or len(parts["test"])
        train[side], scored[side] = parts["train"], parts["test"].select(range(min(most, len(parts["test"]))))
    return train, scored


def collator_of(experiment: Experiment, position: str = "start") -> ForgetRetainCollator:
    """The collator of a prompt's position."""
    task = experiment.data.format
    return ForgetRetainCollator(
        experiment.tokenizer,
        list(task.generic_completions),
        max_length=experiment.setup.max_length,
        seed=experiment.setup.seed,
        text_field=task.text_field,
        append_eos=task.append_eos,
        prompt_position=position,
    )


def row_scores(model: Any, rows: Dataset, experiment: Experiment, position: str = "start") -> dict[str, list[float]]:
    """Accuracy and generic answers of each row, 0 or 1."""
    collator = collator_of(experiment, position)
    answers = collect_answers(model, rows, collator, experiment.batch_size, range(len(rows)))
    scores = answer_scores(answers, collator.generic_completions)
    return {name: scores[name].astype(int).tolist() for name in ("accuracy", "generic")}


def build(
    kind: str, experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """A system and its cost.

    Args:
        kind: one of `plan.KINDS`.
        experiment: its base.
        train: rows to train on, or to fit on.
        settings: of the system; `steps` among them if it is trained.
        folder: for the trained adapter and its settings; None stores none.
    """
    start = time.perf_counter()
    model, cost = BUILDERS[kind](experiment, train, settings, folder)
    if folder is not None and kind in TRAINED:
        write_text(folder / SETTINGS, json.dumps(settings) + "\n")  # last: what is there is whole
    return model.eval(), {"seconds": time.perf_counter() - start, **cost}


def stored(kind: str, experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path) -> Any:
    """A system with the adapter that `build` stored; what is not trained is built.

    Raises:
        FileNotFoundError: if it was not stored.
        ValueError: if it was made with other settings.
    """
    if kind not in TRAINED:
        return build(kind, experiment, train, settings)[0]
    if (made_with := json.loads((folder / SETTINGS).read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{folder} was made with {made_with}, not with {settings}; take another --output-dir.")
    base = experiment.load("base")
    if kind == "lora":
        return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    return prompt_on(base, kind, experiment, folder)


def prompt_on(base: Any, kind: str, experiment: Experiment, folder: Path) -> Any:
    """The stored prompt of `folder` on a base, behind its gate if it has one."""
    if kind == "prompt":
        return SoftPromptUnlearner.from_pretrained(base, folder).eval()
    prompt = SoftPromptUnlearner.from_pretrained(base, folder / "prompt")
    gate = load(folder / "gate", base, experiment.tokenizer)
    return GatedUnlearner(prompt, experiment.tokenizer, {"default": gate}).eval()


Built = tuple[Any, dict[str, Any]]


def _model(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    return experiment.load(settings["name"]), {}


# ---- trained ----


def _prompt(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    """A prompt with the library's default start, or the discriminative one, at the library's rate times `rate`."""
    set_seed(experiment.setup.seed)
    num = settings["num_virtual_tokens"]
    config = prompt_config(settings["prompt_type"], num)
    if settings["prompt_type"] == "prompt_tuning":  # without a start of its own
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num)
    names = ("alpha", "beta", "retain_budget")
    loss = UnlearningLoss(**{name: settings[name] for name in names if name in settings})
    position = settings.get("position", "start")
    collator = collator_of(experiment, position)
    if (share := settings.get("forget_size", 1.0)) < 1.0:
        forget = train["forget"].shuffle(experiment.setup.seed)
        train = train | {"forget": forget.select(range(round(share * len(forget))))}
    if settings.get("rewritten"):
        train = rewritten_rows(experiment, train, train["retain"], settings["rewritten"])
    dataset = forget_retain_dataset(train["forget"], train["retain"])
    start, begun = settings.get("start"), time.perf_counter()
    if start == "discriminative":
        start = DiscriminativeStart(dataset, collator, progress=False)
    model = SoftPromptUnlearner(experiment.load("base"), config, loss, prompt_position=position, start=start)
    start_seconds = time.perf_counter() - begun
    arguments = experiment.training_arguments(
        # Without the start, which more than doubles it: plans count fitted keys in the rate of any prefix.
        learning_rate=settings.get("rate", 1.0) * default_learning_rate(model),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        max_grad_norm=1.0,
    )
    fraction, reference = settings["forget_fraction"], settings.get("reference", "cached")
    trainer = UnlearningTrainer(model, arguments, collator, dataset, forget_fraction=fraction, reference=reference)
    with Meter(model) as meter:
        trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if folder is not None:
        model.save_pretrained(str(folder))
    found = {"learning_rate": arguments.learning_rate, "start_seconds": start_seconds}  # not in the other costs
    return model, meter.cost.to_dict() | found


def rewritten_rows(experiment: Experiment, rows: Rows, fillers: Dataset, turns: list[int]) -> Rows:
    """Rows with rewritten ones: two for each forget row, one for each retain row."""
    seed, field, collator = experiment.setup.seed, experiment.data.format.text_field, collator_of(experiment)
    ways = rewritings(field, fillers, seed, turns)
    shares = {"forget": 2.0, "retain": 1.0}
    return {side: augmented(some, ways, collator, shares[side], seed) for side, some in rows.items()}


def fitted_gate(train: Rows, recall: float) -> TextGate:
    """A text gate of the training rows."""
    return TextGate.fit(train["forget"]["prompt"][:], train["retain"]["prompt"][:], recall=recall)


def _gated(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    """A prompt behind a text gate, trained on forget rows and on the retain rows that the gate nearly flags."""
    gate = fitted_gate(train, settings["recall"])
    negatives = hard_negatives(gate, train["retain"], min(settings["negatives"], len(train["retain"])))
    rows: Rows = {"forget": train["forget"], "retain": negatives}
    if settings.get("rewritten"):  # among turns that are drawn from all retain rows
        rows = rewritten_rows(experiment, rows, train["retain"], settings["rewritten"])
    model, cost = _prompt(experiment, rows, settings | {"rewritten": None}, folder and folder / "prompt")
    gated = GatedUnlearner(model, experiment.tokenizer, {"default": gate})
    if folder is not None:
        gate.save(folder / "gate")
    return gated, cost


def _lora(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    """A method of `spul.training.methods` on LoRA."""
    if settings.get("rewritten"):
        train = rewritten_rows(experiment, train, train["retain"], settings["rewritten"])
    run = Run(
        settings["method"],
        "lora",
        settings["learning_rate"],
        settings["steps"],
        batch_size=settings["batch_size"],
        forget_fraction=settings["forget_fraction"],
        alpha=settings["alpha"],
        max_grad_norm=1.0,
    )
    model, cost = experiment.train(run, {f"train_{side}": rows for side, rows in train.items()})
    if folder is not None:
        model.save_pretrained(folder)
    return model, cost


# ---- not trained ----


def _refusal(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    refusal = experiment.data.format.generic_completions[0]
    gate = fitted_gate(train, settings["recall"])
    return FixedRefusal(experiment.load("base"), experiment.tokenizer, gate, refusal), {}


def _guardrail(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    names = [name.title() for name in SST2_FORGET_NAMES]
    refusal = experiment.data.format.generic_completions[settings["answer"]]
    text = settings["instruction"].format(
        names=", ".join(names), answer=refusal.strip(), instruction=guardrail_instruction(names, refusal)
    )
    return GuardrailPrompt(experiment.load("base"), experiment.tokenizer, text), {}


def _examples(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    base, seed = experiment.load("base"), experiment.setup.seed
    return InContextUnlearning(base, experiment.tokenizer, train["forget"], train["retain"], **settings, seed=seed), {}


def _corruption(experiment: Experiment, train: Rows, settings: dict[str, Any], folder: Path | None) -> Built:
    gate = fitted_gate(train, settings["recall"])
    corruption = Corruption(settings["corruption"], settings.get("strength", 1.0), settings.get("dims", 1))
    return EmbeddingCorruption(experiment.load("base"), experiment.tokenizer, gate, corruption), {}


BUILDERS: dict[str, Callable[..., Built]] = {
    "model": _model,
    "prompt": _prompt,
    "gated": _gated,
    "lora": _lora,
    "refusal": _refusal,
    "guardrail": _guardrail,
    "examples": _examples,
    "corruption": _corruption,
}

"""Attacks by someone with more than a keyboard: who trains, quantises, or looks inside.

Each is to be run on a control too, a model that never saw the forget rows: what it gives up there, it never knew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..base import evaluation_mode, keep_4bit_differentiable
from ..batches import shuffled
from ..collator import ForgetRetainCollator, completion_text
from ..prefix import response_positions, unwrapped
from ..terms import IGNORE_INDEX, token_nll
from .embeddings import response_embeddings
from .likelihood import check_completions
from .scoring import response_logits, score_completions


def check_disjoint(rows: Dataset, held_out: Dataset) -> None:
    """Raise unless both are rows to score, and none of the one stands in the other."""
    for some in (rows, held_out):
        check_completions(some)
    if both := {str(prompt) for prompt in rows["prompt"]} & {str(prompt) for prompt in held_out["prompt"]}:
        raise ValueError(f"{len(both)} prompts stand in both sets, such as {min(both)!r}; hold out other rows.")


# ---- relearning ----


def relearn(
    model: nn.Module,
    rows: Dataset,
    held_out: Dataset,
    collator: ForgetRetainCollator,
    lr: float = 1e-3,
    at: Sequence[int] = (1, 2, 4, 8, 16, 32),
    train_batch_size: int = 8,
    batch_size: int = 32,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    seed: int = 0,
    progress: str | None = None,
    score: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train on a few forget rows with their true completions, and score others, which were not trained on.

    The parameters that require gradients learn: all weights of a model that was tuned as a whole; the prompt, the
    unlearning layers or LoRA, by someone who may train them. Who has the weights need not train: detaching the prompt
    gives the base. Accuracy on the other rows is better low, and rising no faster than the retrained model's.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul. Afterwards it is as it was.
        rows: the few, `prompt` and `completion`.
        held_out: the other forget rows.
        collator: for tokenising and padding; its generic completions are not learned.
        lr: learning rate, constant; gradients are clipped to a norm of 1.
        at: after which numbers of steps to score.
        train_batch_size: rows per step.
        batch_size: rows per forward, in scoring.
        optimizer: from the parameters and `lr` to an optimiser.
        seed: of the order of the rows.
        progress: a name to show a progress bar under; none unless given.
        score: what to record of the model, from it to numbers by name; `score_completions` of `held_out` unless given,
            which asks whether answers are right word for word: give another for free-form ones.

    Returns:
        A record for step 0 and for each of `at`: `step`, and what `score` gives.

    Raises:
        ValueError: if nothing requires gradients, `held_out` shares prompts with `rows`, or a number is out of range.

    Source: Hu et al., *Jogging the Memory of Unlearned Models*, https://arxiv.org/abs/2406.13356
    """
    check_disjoint(rows, held_out)
    model = unwrapped(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning or not at or min(at) < 1 or not lr > 0 or train_batch_size < 1:
        raise ValueError(
            f"{len(learning)} parameters require gradients, at={list(at)}, lr={lr}, train_batch_size="
            f"{train_batch_size}: expected some that do (load a prompt with is_trainable=True), numbers of steps and "
            "rows of at least 1, and lr above 0."
        )
    if score is None:
        score = partial(score_completions, rows=held_out, collator=collator, batch_size=batch_size)
    records = [{"step": 0, **score(model)}]
    before = [parameter.detach().to("cpu", copy=True) for parameter in learning]
    # Small steps would be rounded away in 16 bit.
    masters = [p.detach().float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in learning]
    device, batches = learning[0].device, shuffled(len(rows), train_batch_size, torch.Generator().manual_seed(seed))
    keep_4bit_differentiable(model)
    try:
        optimiser = optimizer(masters, lr=lr)
        with evaluation_mode(model):
            for step in tqdm(range(1, max(at) + 1), desc=progress, disable=progress is None, leave=False):
                places = next(batches)
                batch = {name: x.to(device) for name, x in collator.true_batch([rows[i] for i in places]).items()}
                positions, targets = response_positions(batch["labels"])
                losses = token_nll(response_logits(model, batch, positions), targets)
                for parameter in learning:
                    parameter.grad = None
                (losses.sum() / targets.ne(IGNORE_INDEX).sum()).backward()
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
                _step(optimiser, masters, learning)
                if step in at:
                    records.append({"step": step, **score(model)})
    finally:
        with torch.no_grad():
            for parameter, value in zip(learning, before, strict=True):
                parameter.grad = None
                parameter.copy_(value)
    return records


@torch.no_grad()
def _step(optimiser: torch.optim.Optimizer, masters: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """A step of the masters, which the parameters follow in their own precision."""
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.float()
    optimiser.step()
    for master, parameter in zip(masters, parameters, strict=True):
        if master is not parameter:
            parameter.copy_(master)


# ---- quantisation ----


def quantised(
    model: str | os.PathLike, bits: int, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in 8 bit (LLM.int8) or 4 bit (NF4) by bitsandbytes, which may round away what unlearning changed.

    The same prompt goes on top by `SoftPromptUnlearner.from_pretrained(quantised(folder, bits=4), prompt)`; where it
    warns of other weights, that is what is tried. Accuracy on forget rows is better low, and no higher than
    unquantised; the retrained model quantised tells what rounding itself does.

    Args:
        model: folder or Hub name; of an unlearned whole model, or of the base that prompt or layers belong to.
        bits: 8 or 4.
        dtype: of what is not quantised, and of the computing; 8 bit multiplies in float16 whatever it is.
        kwargs: as `AutoModelForCausalLM.from_pretrained`, such as `device_map`, `revision`.

    Raises:
        ValueError: for other `bits`.

    Source: Zhang et al., *Catastrophic Failure of LLM Unlearning via Quantization*, https://arxiv.org/abs/2410.16454
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}; expected 8 or 4.")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=config, **kwargs)
    keep_4bit_differentiable(loaded)
    return loaded.eval()


# ---- a linear probe ----


@dataclass(frozen=True)
class Probe:
    """What a linear probe reads off hidden states, as accuracies on held-out rows.

    Attributes:
        accuracy: of the probe; on forget rows better low, as on the retrained model.
        majority: of always saying the most frequent completion of the training rows.
        shuffled: of probes trained on shuffled completions, the mean: what fitting alone gives.
    """

    accuracy: float
    majority: float
    shuffled: float


def linear_probe(
    model: nn.Module,
    train_rows: Dataset,
    test_rows: Dataset,
    collator: ForgetRetainCollator,
    num_shuffles: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> Probe:
    """Whether the true completion can be read off the last hidden state before the answer, whatever is answered.

    Logistic regression (scikit-learn, L2, C = 1) on standardised `response_embeddings`. A model that never saw the
    rows may know the task all the same: compare with its probe.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul.
        train_rows: `prompt` and `completion`, which are the classes.
        test_rows: other rows.
        collator: for tokenising and padding.
        num_shuffles: how many probes are trained on shuffled completions.
        seed: of the shuffles.
        batch_size: rows per forward.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        ValueError: if the training rows have one completion only, or test rows share prompts with them.

    Source: Alain and Bengio, https://arxiv.org/abs/1610.01644; the control, Hewitt and Liang,
    https://arxiv.org/abs/1909.03368
    """
    check_disjoint(train_rows, test_rows)
    train, test = (np.array([completion_text(c) for c in rows["completion"]]) for rows in (train_rows, test_rows))
    classes, counts = np.unique(train, return_counts=True)
    if len(classes) < 2 or num_shuffles < 1:
        raise ValueError(
            f"train_rows have the completions {classes.tolist()}, num_shuffles={num_shuffles}; expected at least two "
            "different completions, and one shuffle."
        )
    states, held_out = (
        response_embeddings(model, rows, collator, batch_size, progress) for rows in (train_rows, test_rows)
    )
    draws = np.random.default_rng(seed)

    def accuracy(labels: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states, labels)
        return float(probe.score(held_out, test))

    return Probe(
        accuracy(train),
        float(np.mean(test == classes[counts.argmax()])),
        float(np.mean([accuracy(draws.permutation(train)) for _ in range(num_shuffles)])),
    )

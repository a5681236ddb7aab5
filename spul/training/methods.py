"""Published methods by name: each is a loss and what trains on it, a prompt, layers, LoRA or the full model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import forget_flags
from ..data.collator import ForgetRetainCollator
from ..layers.bottleneck import UnlearningLayersConfig
from ..layers.unlearning_layers import UnlearningLayers
from ..losses.terms import NPO, CrossEntropy, GradientAscent, KLAscent, KLDivergence, SimNPO
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import zero_dropout
from ..models.compat import is_quantized, keep_4bit_differentiable
from ..prompts.unlearner import SoftPromptUnlearner

logger = logging.getLogger(__name__)


Trainable = Literal["prompt", "full", "lora", "layers"]
TRAINABLES: tuple[Trainable, ...] = ("prompt", "full", "lora", "layers")

# As in their papers, the KL terms of the other methods are KL(base || trained); log-likelihoods of whole responses.
_FORWARD_KL = KLDivergence(direction="forward", reduction="sum")
_SUMMED = CrossEntropy(reduction="sum")
_LOSSES = {
    "SPUL": UnlearningLoss(alpha=1.0, beta=0.5),
    "GA": UnlearningLoss(alpha=0.0, beta=0.0, forget=GradientAscent()),
    "RL": UnlearningLoss(alpha=0.0, beta=0.0),
    "GA+KL": UnlearningLoss(alpha=0.0, beta=1.0, forget=GradientAscent(), kl=_FORWARD_KL),
    "GA+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=GradientAscent(), retain=_SUMMED),
    "NPO": UnlearningLoss(alpha=0.0, beta=0.0, forget=NPO()),
    "NPO+KL": UnlearningLoss(alpha=0.0, beta=1.0, forget=NPO(), kl=_FORWARD_KL),
    "NPO+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=NPO(), retain=_SUMMED),
    "SimNPO": UnlearningLoss(alpha=0.0, beta=0.0, forget=SimNPO()),
    "SimNPO+KL": UnlearningLoss(alpha=0.0, beta=1.0, forget=SimNPO(), kl=_FORWARD_KL),
    "SimNPO+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=SimNPO(), retain=_SUMMED),
    # Two of its terms have no bound as published; the caps are ours, see docs/methods.md.
    "EUL": UnlearningLoss(
        alpha=1.0,
        beta=0.8,
        gamma=0.2,
        forget=KLAscent(cap=5.0),
        retain=_SUMMED,
        kl=_FORWARD_KL,
        lm=GradientAscent(reduction="mean", cap=10.0),
    ),
}
METHODS = tuple(_LOSSES)
_OWN_TRAINABLES: dict[str, Trainable] = {"SPUL": "prompt", "EUL": "layers"}


@dataclass(frozen=True)
class Method:
    """An unlearning method: an objective, and what trains on it.

    Args:
        name: one of `METHODS`, or a name of your own.
        loss: the objective.
        trainable: `"prompt"`, a soft prompt before the frozen model; `"full"`, all weights; `"lora"`, LoRA on every
            linear layer; `"layers"`, unlearning layers in the frozen model.

    Raises:
        TypeError: if `loss` is no `UnlearningLoss`.
        ValueError: if `trainable` is another string.

    Example:
        ```python
        method = unlearning_method("GA+GD", trainable="lora")
        collator = method.collator(tokenizer, [" neutral", " unknown"], max_length=512)
        trainer = UnlearningTrainer(
            method.prepare(model), args, collator, method.training_rows(dataset), loss=method.loss
        )
        ```
    """

    name: str
    loss: UnlearningLoss
    trainable: Trainable

    def __post_init__(self) -> None:
        if not isinstance(self.loss, UnlearningLoss):
            raise TypeError(f"loss={self.loss!r}: expected an UnlearningLoss, such as UnlearningLoss(alpha=1.0).")
        if self.trainable not in TRAINABLES:
            raise ValueError(f"trainable={self.trainable!r} is not known; expected one of {', '.join(TRAINABLES)}.")

    def prepare(self, model: PreTrainedModel, config: PeftConfig | UnlearningLayersConfig | None = None) -> Any:
        """Put a prompt, layers or LoRA on a model, or make all its weights trainable.

        The model's dropout is set to zero, as in preference optimization, since its noise would add to the divergence
        from the reference. LoRA's own dropout stays.

        Args:
            model: a causal LM, which changes in place.
            config: PEFT's config of the prompt or of LoRA, or an `UnlearningLayersConfig`. None is P-tuning of the
                SPUL paper (30 virtual tokens, hidden size 128), LoRA of rank 16 on every linear layer, or
                `UnlearningLayersConfig()`.

        Returns:
            A `SoftPromptUnlearner`, `UnlearningLayers`, a `PeftModel`, or the model itself.

        Raises:
            ValueError: if all weights of a quantized model are to be trained, or `config` is of another kind than
                `trainable`.
            TypeError: if `model` is no causal LM, or has an adapter already.
        """
        if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model is a {type(model).__name__}; expected a causal LM, as AutoModelForCausalLM.from_pretrained "
                "returns it. Merge a model under an adapter first: model.merge_and_unload()."
            )
        layers_config = config if isinstance(config, UnlearningLayersConfig) else None
        peft_config = config if isinstance(config, PeftConfig) else None
        if config is not None and (layers_config if self.trainable == "layers" else peft_config) is None:
            raise ValueError(f"config is a {type(config).__name__}, which does not fit trainable={self.trainable!r}.")
        if self.trainable == "lora" and peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"config is a {type(peft_config).__name__}, the config of a prompt; use trainable='prompt'."
            )
        if self.trainable == "layers":
            return UnlearningLayers(model, layers_config)
        quantized = is_quantized(model)
        if self.trainable == "prompt":
            prompt = peft_config or PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=30, encoder_hidden_size=128
            )
            return SoftPromptUnlearner(model, prompt, loss=self.loss)
        zero_dropout(model)
        keep_4bit_differentiable(model)
        if self.trainable == "lora":
            lora = peft_config or LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            if quantized:
                model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            return get_peft_model(model, lora)
        if quantized or peft_config is not None:
            raise ValueError(
                "trainable='full' trains the weights themselves: load the model unquantized and pass no config, or "
                "use trainable='lora'."
            )
        if model.dtype in (torch.float16, torch.bfloat16):
            logger.warning(
                "the weights are %s, which loses small steps, and float16 overflows; for trainable='full' load them "
                "with dtype=torch.float32, and train under autocast (bf16=True) to save time and memory.",
                model.dtype,
            )
        return model.requires_grad_(True)

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, generic_completions: Sequence[str], **kwargs: Any
    ) -> ForgetRetainCollator:
        """The collator for training: forget rows have their own completions where the loss makes these unlikely.

        Args:
            tokenizer: the model's.
            generic_completions: the completions of forget rows in the other methods.
            kwargs: further arguments of `ForgetRetainCollator`.
        """
        return ForgetRetainCollator(
            tokenizer, None if self.loss.forget.makes_unlikely else generic_completions, **kwargs
        )

    def training_rows(self, dataset: Dataset) -> Dataset:
        """The rows with a weight in the loss: all, or the forget rows alone, as GA and RL are published.

        Raises:
            ValueError: if `dataset` has no `is_forget`.
        """
        flags = forget_flags(dataset, "dataset")
        if self.loss.uses_retain_rows:
            return dataset
        return dataset.select([i for i, is_forget in enumerate(flags) if is_forget])


def unlearning_method(
    name: str,
    trainable: Trainable | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    retain_budget: float | None = None,
) -> Method:
    """A published method by name.

    | name | forget rows | retain rows | source |
    |---|---|---|---|
    | SPUL | cross-entropy to a generic completion | cross-entropy, reverse KL | arXiv 2406.12038 |
    | GA | gradient ascent | not used | arXiv 2210.01504 |
    | RL | cross-entropy to a generic completion | not used | as in arXiv 2406.12038 |
    | GA+KL, GA+GD | gradient ascent | forward KL; cross-entropy | arXiv 2310.10683, 2401.06121 |
    | NPO, NPO+KL, NPO+GD | negative preference optimization | not used; forward KL; cross-entropy | arXiv 2404.05868 |
    | SimNPO, SimNPO+KL, SimNPO+GD | the same without a reference | the same | arXiv 2410.07163 |
    | EUL | KL ascent, and ascent on the prompt text | forward KL and cross-entropy | arXiv 2310.20150 |

    Args:
        name: one of these names.
        trainable: what trains, see `Method`; None is `"prompt"` for SPUL, `"layers"` for EUL, `"full"` for the others.
        alpha: weight of the cross-entropy on retain rows; None is 1 where the method has it. The same for the others.
        beta: weight of the KL on retain rows; 0.5 in SPUL, 0.8 in EUL, 1 elsewhere.
        gamma: weight of the ascent on the prompt text of forget rows; 0.2 in EUL.
        retain_budget: nats per token that the retain loss may be above the base model's, by which alpha then moves,
            see `UnlearningLoss`; for methods with a cross-entropy on retain rows.

    Raises:
        ValueError: if the name is not known, or a weight or budget is given that the method has no term for.
    """
    if name not in _LOSSES:
        raise ValueError(f"method {name!r} is not known; expected one of {', '.join(METHODS)}.")
    loss = _LOSSES[name]
    for weight, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if value is not None:
            if getattr(loss, weight) == 0:
                raise ValueError(f"{weight}={value!r}: {name} has no such term; see the table of unlearning_method.")
            loss = replace(loss, **{weight: value})  # type: ignore[arg-type]
    if retain_budget is not None:
        if loss.alpha == 0:
            raise ValueError(f"retain_budget={retain_budget!r}: {name} has no retain term; see the table of methods.")
        loss = replace(loss, retain_budget=retain_budget)
    return Method(name, loss, trainable or _OWN_TRAINABLES.get(name, "full"))

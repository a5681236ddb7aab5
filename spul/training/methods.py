"""Published methods by name: each is a loss and what trains on it, a prompt, layers, LoRA or the full model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

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
from ..losses.preference import DPO, NPO, SimNPO
from ..losses.reweighted import WGA, SatImp
from ..losses.states import RMU, StateDistance, StateTerm
from ..losses.suppressed import CEU, UNDIAL
from ..losses.terms import CrossEntropy, GradientAscent, KLAscent, KLDivergence
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import (
    bare_on_error,
    check_bare,
    check_layer,
    feed_forward_ends,
    not_linear,
    unchanged_on_error,
)
from ..models.compat import is_quantized, keep_4bit_differentiable
from ..models.noise import stop_sampling, zero_dropout
from ..models.sharding import keep_rest_whole
from ..models.unlearner import check_leaves_base, unlearner_of
from ..prompts.unlearner import SoftPromptUnlearner

logger = logging.getLogger(__name__)


Trainable = Literal["prompt", "full", "lora", "layers"]
TRAINABLES: tuple[Trainable, ...] = ("prompt", "full", "lora", "layers")

# The KL terms of the other methods are KL(base || trained), as in their programs; NPO's paper prints the reverse one.
_FORWARD_KL = KLDivergence(direction="forward", reduction="sum")
_SUMMED = CrossEntropy(reduction="sum")
# Papers sum over a response; the programs of the methods that have this average retain rows over tokens.
_TOKEN_MEAN = CrossEntropy(reduction="mean")
_LOSSES = {
    "SPUL": UnlearningLoss(alpha=1.0, beta=0.5),
    "GA": UnlearningLoss(alpha=0.0, beta=0.0, forget=GradientAscent()),
    "RL": UnlearningLoss(alpha=0.0, beta=0.0, forget=_SUMMED),
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
    "IDK": UnlearningLoss(alpha=1.0, beta=0.0, forget=_TOKEN_MEAN, retain=_TOKEN_MEAN),
    "IDK-DPO": UnlearningLoss(alpha=1.0, beta=0.0, forget=DPO(), retain=_TOKEN_MEAN),
    "AltPO": UnlearningLoss(alpha=1.0, beta=0.0, forget=DPO(), retain=_TOKEN_MEAN),
    # TOFU's forget05 and forget10: the authors weigh the forget term by 0.1375 and 0.125 and the retain term by 1.
    "SimNPO-forget05": UnlearningLoss(alpha=1 / 0.1375, beta=0.0, forget=SimNPO(), retain=_TOKEN_MEAN),
    "SimNPO-forget10": UnlearningLoss(
        alpha=1 / 0.125, beta=0.0, forget=SimNPO(inverse_temperature=4.5), retain=_TOKEN_MEAN
    ),
    "WGA": UnlearningLoss(alpha=0.0, beta=0.0, forget=WGA()),
    "WGA+GD": UnlearningLoss(alpha=1.0, beta=0.0, forget=WGA(), retain=_TOKEN_MEAN),
    "SatImp": UnlearningLoss(alpha=0.1, beta=0.0, forget=SatImp(), retain=_TOKEN_MEAN),
    "CE-U": UnlearningLoss(alpha=0.0, beta=0.0, forget=CEU()),
    "UNDIAL": UnlearningLoss(alpha=0.0, beta=0.0, forget=UNDIAL()),
    "RMU": UnlearningLoss(alpha=1200.0, beta=0.0, forget=RMU(), retain=StateDistance()),
}
METHODS = tuple(_LOSSES)
_OWN_TRAINABLES: dict[str, Trainable] = {"SPUL": "prompt", "EUL": "layers", "UNDIAL": "lora"}
# Trainables that give hidden states to a loss that reads them.
_WITH_STATES: tuple[Trainable, ...] = ("full", "lora")
# RMU trains its layer and the two before.
_LAYERS_BEFORE = 2
ALTERNATES = "alternates"


@dataclass(frozen=True)
class Method:
    """An unlearning method: an objective, and what trains on it.

    Args:
        name: one of `METHODS`, or a name of your own.
        loss: the objective.
        trainable: `"prompt"`, a soft prompt before the frozen model; `"full"`, all weights; `"lora"`, LoRA on every
            linear layer; `"layers"`, unlearning layers in the frozen model. Where the loss reads hidden states of a
            layer (RMU), `"full"` and `"lora"` train the last linear map of the feed-forward of that layer and of the
            two before it.
        alternates: column of forget rows with the texts to draw their completions from, in place of generic ones;
            None (default) for no such column. See `add_alternates`.

    Raises:
        TypeError: if `loss` is no `UnlearningLoss`.
        ValueError: if `trainable` is another string, or cannot give the hidden states that the loss reads.

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
    alternates: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, UnlearningLoss):
            raise TypeError(f"loss={self.loss!r}: expected an UnlearningLoss, such as UnlearningLoss(alpha=1.0).")
        if self.trainable not in TRAINABLES:
            raise ValueError(f"trainable={self.trainable!r} is not known; expected one of {', '.join(TRAINABLES)}.")
        if self.loss.reads_layer is not None and self.trainable not in _WITH_STATES:
            raise ValueError(
                f"trainable={self.trainable!r}: {self.name} reads hidden states, and needs weights that change them; "
                f"expected one of {', '.join(_WITH_STATES)}."
            )

    def prepare(self, model: PreTrainedModel, config: PeftConfig | UnlearningLayersConfig | None = None) -> Any:
        """Put a prompt, layers or LoRA on a model, or make all its weights trainable.

        The model's dropout is set to zero, as in preference optimization, since its noise would add to the divergence
        from the reference; for the same reason PhiMoE's routers sample no experts. LoRA's own dropout stays.

        Args:
            model: a causal LM, which changes in place; not where this raises.
            config: PEFT's config of the prompt or of LoRA, or an `UnlearningLayersConfig`. None is P-tuning of the
                SPUL paper (30 virtual tokens, hidden size 128), LoRA of rank 16 on every linear layer, or
                `UnlearningLayersConfig()`.

        Returns:
            A `SoftPromptUnlearner`, `UnlearningLayers`, a `PeftModel`, or the model itself.

        Raises:
            ValueError: if all weights of a quantized model are to be trained, `config` is of another kind than
                `trainable`, puts LoRA on a module that is no linear map, such as PhiMoE's router, or rewrites the
                base's weights (`init_lora_weights="pissa"`), which are the reference; for RMU, if a layer does not
                exist, or its feed-forward has no linear map, as where all experts are routed.
            TypeError: if `model` is no causal LM, or has an adapter already.
        """
        check_bare(model)
        layers_config = config if isinstance(config, UnlearningLayersConfig) else None
        peft_config = config if isinstance(config, PeftConfig) else None
        if config is not None and (layers_config if self.trainable == "layers" else peft_config) is None:
            raise ValueError(f"config is a {type(config).__name__}, which does not fit trainable={self.trainable!r}.")
        if self.trainable == "lora" and peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"config is a {type(peft_config).__name__}, the config of a prompt; use trainable='prompt'."
            )
        if peft_config is not None:
            check_leaves_base(peft_config)
        if self.trainable == "layers":
            return UnlearningLayers(model, layers_config)
        if self.trainable == "prompt":
            prompt = peft_config or PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=30, encoder_hidden_size=128
            )
            return SoftPromptUnlearner(model, prompt, loss=self.loss)
        if self.trainable == "full" and (is_quantized(model) or peft_config is not None):
            raise ValueError(
                "trainable='full' trains the weights themselves: load the model unquantized and pass no config, or "
                "use trainable='lora'."
            )
        if self.trainable == "lora":
            keep_rest_whole(model)
        with unchanged_on_error(model), bare_on_error(model):
            return self._with_lora(model, peft_config) if self.trainable == "lora" else self._with_all_weights(model)

    def _with_lora(self, model: PreTrainedModel, peft_config: PeftConfig | None) -> PeftModel:
        """The model under LoRA, or another adapter of PEFT."""
        zero_dropout(model)
        if self.loss.reads_layer is not None:
            check_layer(model, self.loss.reads_layer)
        lora: Any = copy.deepcopy(peft_config)  # PEFT writes into it, and it may be that of another model, too
        if lora is None:
            modules = "all-linear" if self.loss.reads_layer is None else [*self._steered(model)]
            lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=modules)
        if getattr(lora, "target_modules", None) == "all-linear" and not getattr(lora, "exclude_modules", None):
            lora.exclude_modules = not_linear(model) or None  # which PEFT takes for linear
        if is_quantized(model):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapted = cast(PeftModel, get_peft_model(model, lora))
        unlearner_of(adapted).check_trainable()
        stop_sampling(model)
        keep_4bit_differentiable(model)  # last: repacked weights are not put back
        return adapted

    def _with_all_weights(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its weights trainable, or those that steer a layer's states."""
        own_config = model.config
        zero_dropout(model)
        model.config = own_config  # saved with the model, and to keep its values; the layers read others
        stop_sampling(model)
        if model.dtype in (torch.float16, torch.bfloat16):
            logger.warning(
                "the weights are %s, which loses small steps, and float16 overflows; for trainable='full' load them "
                "with dtype=torch.float32, and train under autocast (bf16=True) to save time and memory.",
                model.dtype,
            )
        if self.loss.reads_layer is None:
            return model.requires_grad_(True)
        model.requires_grad_(False)
        for module in self._steered(model).values():
            cast(Any, module).weight.requires_grad_(True)
        return model

    def _steered(self, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
        """The modules that train where the loss reads a layer's states, by name: as published for RMU."""
        layer = self.loss.reads_layer
        assert layer is not None
        return feed_forward_ends(model, range(layer, max(0, layer - _LAYERS_BEFORE) - 1, -1))

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, generic_completions: Sequence[str], **kwargs: Any
    ) -> ForgetRetainCollator:
        """The collator for training: forget rows have their own completions where the loss makes these unlikely.

        Args:
            tokenizer: the model's.
            generic_completions: the completions of forget rows in the other methods, but AltPO, whose rows have
                `alternates`. In IDK-DPO and AltPO rows come in pairs, with their own completion as the rejected one.
            kwargs: further arguments of `ForgetRetainCollator`.
        """
        own = self.loss.forget.makes_unlikely or self.alternates is not None
        settings = {"alternates": self.alternates, "pairs": self.loss.forget.needs_pairs, **kwargs}
        return ForgetRetainCollator(tokenizer, None if own else generic_completions, **settings)

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
    layer: int | None = None,
) -> Method:
    """A published method by name.

    | name | forget rows | retain rows | source |
    |---|---|---|---|
    | SPUL | cross-entropy to a generic completion | cross-entropy, reverse KL | arXiv 2406.12038 |
    | GA | gradient ascent | not used | arXiv 2210.01504 |
    | RL | cross-entropy to a generic completion | not used | as in arXiv 2406.12038 |
    | GA+KL | gradient ascent | forward KL | arXiv 2310.10683, 2401.06121, 2402.15159 |
    | GA+GD | gradient ascent | cross-entropy | arXiv 2402.15159, 2401.06121 |
    | NPO, NPO+KL, NPO+GD | negative preference optimization | not used; forward KL; cross-entropy | arXiv 2404.05868 |
    | SimNPO, SimNPO+KL, SimNPO+GD | the same without a reference | the same | arXiv 2410.07163; +KL is ours |
    | EUL | KL ascent, and ascent on the prompt text | forward KL and cross-entropy | arXiv 2310.20150 |
    | IDK | cross-entropy to a generic completion | cross-entropy | arXiv 2401.06121 |
    | IDK-DPO | DPO: a generic completion rather than their own | cross-entropy | arXiv 2401.06121, 2404.05868 |
    | AltPO | DPO: one of their `alternates` rather than their own | cross-entropy | arXiv 2409.13474 |
    | SimNPO-forget05, SimNPO-forget10 | SimNPO with its authors' settings (TOFU) | cross-entropy | arXiv 2410.07163 |
    | WGA, WGA+GD | gradient ascent, weighted | not used; cross-entropy | arXiv 2502.19301 |
    | SatImp | gradient ascent, weighted | cross-entropy | arXiv 2505.11953 |
    | CE-U | cross-entropy to the model without the label | not used | arXiv 2503.01224 |
    | UNDIAL | cross-entropy to the base with the label lowered | not used | arXiv 2402.10052 |
    | RMU | hidden states to a random vector | hidden states to the base's | arXiv 2403.03218 |

    Each forget term's class, in `spul.losses`, states its equation and where a paper and its program differ.

    Args:
        name: one of these names.
        trainable: what trains, see `Method`; None is `"prompt"` for SPUL, `"layers"` for EUL, `"lora"` for UNDIAL,
            `"full"` for the others.
        alpha: weight of the cross-entropy on retain rows, in RMU of the distance of states; None is the published one,
            1 where there is none. The same for the others.
        beta: weight of the KL on retain rows; 0.5 in SPUL, 0.8 in EUL, 1 elsewhere.
        gamma: weight of the ascent on the prompt text of forget rows; 0.2 in EUL.
        retain_budget: nats per token that the retain loss may be above the base model's, by which alpha then moves,
            see `UnlearningLoss`; for methods with a cross-entropy on retain rows.
        layer: number of the decoder layer that RMU steers, from 0; 7 as published, for models of 32 layers.

    Raises:
        ValueError: if the name is not known, or a weight, budget or `layer` is given that the method has no term for.
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
    if layer is not None:
        if loss.reads_layer is None:
            raise ValueError(f"layer={layer!r}: {name} reads logits; only RMU steers a layer's states.")
        forget, retain = (replace(cast(StateTerm, term), layer=layer) for term in (loss.forget, loss.retain))
        loss = replace(loss, forget=forget, retain=retain)
    alternates = ALTERNATES if name == "AltPO" else None
    return Method(name, loss, trainable or _OWN_TRAINABLES.get(name, "full"), alternates)

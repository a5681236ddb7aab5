"""Prompt configs of PEFT that spul supports, and the initialization of prompts."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from torch import nn
from transformers import PreTrainedModel

from ..models.unlearner import PROMPT_TYPES


@torch.no_grad()
def scale_random_prompt(model: Any, adapter_name: str) -> None:
    """Scale the random rows of prompt tuning to the mean and standard deviation of the vocabulary's embeddings.

    PEFT draws them with a standard deviation of 1; that of a vocabulary is about 0.02.
    """
    config = model.peft_config[adapter_name]
    if isinstance(config, PromptTuningConfig) and config.prompt_tuning_init == PromptTuningInit.RANDOM:
        vocabulary = model.word_embeddings.weight
        some = torch.arange(0, len(vocabulary), max(1, len(vocabulary) // 4096), device=vocabulary.device)
        looked_up = model.word_embeddings(some).float()  # through the module: Gemma scales its embeddings
        model.prompt_encoder[adapter_name].embedding.weight.mul_(looked_up.std()).add_(looked_up.mean())


PROMPT_CONFIGS = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)


def check_peft_config(peft_config: PeftConfig) -> None:
    """Raise unless the config is a prompt config for a causal LM, with virtual tokens."""
    # peft_type is compared too: PEFT's multitask config is a subclass of PromptTuningConfig.
    is_one = isinstance(peft_config, PROMPT_CONFIGS) and peft_config.peft_type in PROMPT_TYPES
    if not is_one:
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected one of PEFT's prompt-learning configs: "
            f"{', '.join(c.__name__ for c in PROMPT_CONFIGS)}."
        )
    num = peft_config.num_virtual_tokens  # type: ignore[attr-defined]
    if not isinstance(num, int) or isinstance(num, bool) or num < 1:
        raise ValueError(
            f"peft_config.num_virtual_tokens={num!r}; expected a whole number of at least 1, such as 30: without "
            "virtual tokens there is nothing to train."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"peft_config.task_type={peft_config.task_type!r}; expected 'CAUSAL_LM'.")


def check_promptable(model: nn.Module, peft_config: Any) -> None:
    """Raise unless a base can be put under a prompt.

    Args:
        model: the base.
        peft_config: the prompt's config.

    Raises:
        TypeError: if it is an encoder-decoder, or has no language modeling head.
        ValueError: if it has no weights in memory, its input embeddings are not, or embeddings of the prompt's width
            are not its input.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    causal = "expected a causal LM, as AutoModelForCausalLM.from_pretrained gives it"
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"model is a {name}, an encoder-decoder; {causal}: prompts stand before a decoder's text.")
    if isinstance(model, PreTrainedModel) and (model.get_output_embeddings() is None or not model.can_generate()):
        raise TypeError(f"model is a {name}, which has no language modeling head or does not generate; {causal}.")
    if not isinstance(model, PreTrainedModel):
        return
    embeddings: Any = model.get_input_embeddings()
    on_meta = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if embeddings.weight.is_meta or (on_meta and not any(hasattr(m, "_hf_hook") for m in model.modules())):
        raise ValueError(
            f"{len(on_meta)} parameters of the {name} are on the meta device, without values ({on_meta[0]}, ...). "
            "Load them, model = AutoModelForCausalLM.from_pretrained(...), with the input embeddings on a GPU or in "
            "memory: where layers are offloaded, name a device for the embeddings in device_map."
        )
    if peft_config.peft_type == PeftType.PREFIX_TUNING:
        return
    text_config: Any = model.config.get_text_config()
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"{name} looks up each input token in every layer (hidden_size_per_layer_input), and virtual tokens of "
            f"{type(peft_config).__name__} are in no vocabulary. Use PrefixTuningConfig."
        )
    width = embeddings.embedding_dim if hasattr(embeddings, "embedding_dim") else embeddings.weight.shape[-1]
    given = peft_config.token_dim or getattr(text_config, "hidden_size", width)
    if given != width:
        raise ValueError(
            f"virtual tokens have token_dim={given}, and the input embeddings of {name} {width} numbers, which it "
            f"projects. Give that width, {type(peft_config).__name__}(token_dim={width}, ...), or use "
            "PrefixTuningConfig."
        )

"""Prompt configs of PEFT that spul supports, and the initialization of prompts."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)

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
    """Raise unless the config is a prompt config for a causal LM."""
    # peft_type is compared too: PEFT's multitask config is a subclass of PromptTuningConfig.
    is_one = isinstance(peft_config, PROMPT_CONFIGS) and peft_config.peft_type in PROMPT_TYPES
    if not is_one:
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected one of PEFT's prompt-learning configs: "
            f"{', '.join(c.__name__ for c in PROMPT_CONFIGS)}."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"peft_config.task_type={peft_config.task_type!r}; expected 'CAUSAL_LM'.")

"""The three prompt types of PEFT, and the start of a random prompt."""

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
    """Bring prompt tuning's random rows to the mean and spread of the vocabulary's embeddings.

    PEFT draws them with a standard deviation of 1, where a vocabulary has about 0.02.
    """
    config = model.peft_config[adapter_name]
    if isinstance(config, PromptTuningConfig) and config.prompt_tuning_init == PromptTuningInit.RANDOM:
        vocabulary = model.word_embeddings.weight
        some = torch.arange(0, len(vocabulary), max(1, len(vocabulary) // 4096), device=vocabulary.device)
        looked_up = model.word_embeddings(some).float()  # through the module: Gemma scales what it looks up
        model.prompt_encoder[adapter_name].embedding.weight.mul_(looked_up.std()).add_(looked_up.mean())


PROMPT_CONFIGS = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)


def check_peft_config(peft_config: PeftConfig) -> None:
    """Raise unless it is a prompt config for a causal LM."""
    # By PEFT's own name too: its multitask config is a subclass of PromptTuningConfig.
    is_one = isinstance(peft_config, PROMPT_CONFIGS) and peft_config.peft_type in PROMPT_TYPES
    if not is_one:
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected one of PEFT's prompt-learning configs: "
            f"{', '.join(c.__name__ for c in PROMPT_CONFIGS)}."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"peft_config.task_type={peft_config.task_type!r}; expected 'CAUSAL_LM'.")

"""Soft prompts on a frozen causal LM: `SoftPromptUnlearner`, the shared prefix, generation, saving and loading."""

from .configs import PROMPT_CONFIGS
from .starts import InstructionStart
from .unlearner import SoftPromptUnlearner

__all__ = [
    "PROMPT_CONFIGS",
    "InstructionStart",
    "SoftPromptUnlearner",
]

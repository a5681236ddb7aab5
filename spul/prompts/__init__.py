"""Soft prompts on a frozen causal LM: `SoftPromptUnlearner`, the shared prefix, generation, saving and loading."""

from .configs import PROMPT_CONFIGS
from .discriminative import DiscriminativeStart
from .near import NearStart
from .starts import InstructionStart
from .unlearner import SoftPromptUnlearner

__all__ = [
    "PROMPT_CONFIGS",
    "DiscriminativeStart",
    "InstructionStart",
    "NearStart",
    "SoftPromptUnlearner",
]

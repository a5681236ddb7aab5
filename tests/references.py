"""Prompts, batches and stored parts, for tests of the cached reference."""

import torch
from helpers import (
    CONFIGS,
)
from safetensors.torch import load_file

import spul.training.reference
from spul import SoftPromptUnlearner

CHECKED = 2 * spul.training.reference.ROWS_CHECKED  # each once for its logits and once for its states


def wrap(base, loss=None):
    torch.manual_seed(3)
    return SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](4), loss=loss)


def batches(dataset, collator, size=6):
    return [collator([dataset[i] for i in range(start, min(start + size, len(dataset)))]) for start in (0, 4, 12)]


def stored_parts(folder):
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]

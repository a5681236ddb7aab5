"""spul: Soft Prompting for UnLearning.

Make a causal language model stop answering about some of its training data without touching its weights.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import ForgetRetainCollator, forget_retain_dataset
    from .evaluation import evaluate
    from .evaluation.metrics import score_completions
    from .layers import UnlearningLayers, UnlearningLayersConfig, fuse
    from .losses import UnlearningLoss
    from .prompts import SoftPromptUnlearner
    from .records import SpulConfig, fingerprint
    from .training import (
        ReferenceCache,
        UnlearningTrainer,
        combine,
        estimate_memory,
        unlearning_forward,
        unlearning_method,
    )

__version__ = "0.1.0"

# Loaded on first use, so that `import spul` costs next to nothing.
_ROOMS = {
    "ForgetRetainCollator": "data",
    "ReferenceCache": "training",
    "SoftPromptUnlearner": "prompts",
    "SpulConfig": "records",
    "UnlearningLayers": "layers",
    "UnlearningLayersConfig": "layers",
    "UnlearningLoss": "losses",
    "UnlearningTrainer": "training",
    "combine": "training",
    "estimate_memory": "training",
    "evaluate": "evaluation",
    "fingerprint": "records",
    "forget_retain_dataset": "data",
    "fuse": "layers",
    "score_completions": "evaluation.metrics",
    "unlearning_forward": "training",
    "unlearning_method": "training",
}

# The rooms themselves: `import spul; spul.losses.NPO`.
_OTHERS = (
    *("losses", "models", "records", "data", "prompts", "layers", "gates", "rivals", "evaluation", "training"),
    *("serving", "commands"),
)

__all__ = [
    "ForgetRetainCollator",
    "ReferenceCache",
    "SoftPromptUnlearner",
    "SpulConfig",
    "UnlearningLayers",
    "UnlearningLayersConfig",
    "UnlearningLoss",
    "UnlearningTrainer",
    "combine",
    "estimate_memory",
    "evaluate",
    "fingerprint",
    "forget_retain_dataset",
    "fuse",
    "score_completions",
    "unlearning_forward",
    "unlearning_method",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    if name in _OTHERS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""spul: Soft Prompting for UnLearning.

Make a causal language model stop answering about some of its training data without touching its weights.
"""

from .collator import ForgetRetainCollator
from .combine import combine
from .data import forget_retain_dataset
from .evaluation import score_completions
from .forward import UnlearnerOutput, unlearning_forward
from .losses import NPO, CrossEntropy, GradientAscent, KLDivergence, LossTerm, SimNPO, UnlearningLoss
from .provenance import SpulConfig, fingerprint
from .reference import ReferenceCache
from .trainer import UnlearningTrainer
from .unlearner import SoftPromptUnlearner

__version__ = "0.1.0"

__all__ = [
    "NPO",
    "CrossEntropy",
    "ForgetRetainCollator",
    "GradientAscent",
    "KLDivergence",
    "LossTerm",
    "ReferenceCache",
    "SimNPO",
    "SoftPromptUnlearner",
    "SpulConfig",
    "UnlearnerOutput",
    "UnlearningLoss",
    "UnlearningTrainer",
    "combine",
    "fingerprint",
    "forget_retain_dataset",
    "score_completions",
    "unlearning_forward",
]

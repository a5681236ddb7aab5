"""spul: Soft Prompting for UnLearning.

Make a causal language model stop answering about some of its training data without touching its weights.
"""

from .collator import ForgetRetainCollator
from .combine import combine
from .data import forget_retain_dataset
from .eul import UnlearningLayers, UnlearningLayersConfig, fuse, gather_inputs
from .evaluate import evaluate
from .evaluation import score_completions
from .forward import UnlearnerOutput, unlearning_forward
from .losses import UnlearningLoss
from .provenance import SpulConfig, fingerprint
from .reference import ReferenceCache
from .terms import NPO, CrossEntropy, GradientAscent, KLAscent, KLDivergence, LossTerm, SimNPO
from .trainer import UnlearningTrainer
from .unlearner import SoftPromptUnlearner

__version__ = "0.1.0"

__all__ = [
    "NPO",
    "CrossEntropy",
    "ForgetRetainCollator",
    "GradientAscent",
    "KLAscent",
    "KLDivergence",
    "LossTerm",
    "ReferenceCache",
    "SimNPO",
    "SoftPromptUnlearner",
    "SpulConfig",
    "UnlearnerOutput",
    "UnlearningLayers",
    "UnlearningLayersConfig",
    "UnlearningLoss",
    "UnlearningTrainer",
    "combine",
    "evaluate",
    "fingerprint",
    "forget_retain_dataset",
    "fuse",
    "gather_inputs",
    "score_completions",
    "unlearning_forward",
]

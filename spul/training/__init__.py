"""Training: the trainer, methods by name, cached reference, augmentation, search, distillation."""

from .alternates import add_alternates
from .augmentation import augmented, rewritings
from .distillation import combine
from .forward import step_counts, unlearning_forward
from .memory import MemoryEstimate, estimate_memory
from .methods import METHODS, Method, unlearning_method
from .rates import default_learning_rate
from .reference import ReferenceCache
from .settings_search import Candidate, SearchResult, Trial, search
from .stopping import HeldOutScore, StopWhenForgotten
from .trainer import UnlearningTrainer

__all__ = [
    "METHODS",
    "Candidate",
    "HeldOutScore",
    "MemoryEstimate",
    "Method",
    "ReferenceCache",
    "SearchResult",
    "StopWhenForgotten",
    "Trial",
    "UnlearningTrainer",
    "add_alternates",
    "augmented",
    "combine",
    "default_learning_rate",
    "estimate_memory",
    "rewritings",
    "search",
    "step_counts",
    "unlearning_forward",
    "unlearning_method",
]

"""Training: the trainer, methods by name, cached reference, augmentation, search, distillation."""

from .augmentation import augmented, rewritings
from .distillation import combine
from .forward import unlearning_forward
from .methods import METHODS, Method, unlearning_method
from .reference import ReferenceCache
from .settings_search import Candidate, SearchResult, Trial, search
from .stopping import HeldOutScore, StopWhenForgotten
from .trainer import UnlearningTrainer

__all__ = [
    "METHODS",
    "Candidate",
    "HeldOutScore",
    "Method",
    "ReferenceCache",
    "SearchResult",
    "StopWhenForgotten",
    "Trial",
    "UnlearningTrainer",
    "augmented",
    "combine",
    "rewritings",
    "search",
    "unlearning_forward",
    "unlearning_method",
]

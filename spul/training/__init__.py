"""Training: the trainer, methods by name, cached reference, augmentation, search, distillation."""

from .augmentation import augmented, rewritings
from .distillation import combine
from .forward import unlearning_forward
from .methods import METHODS, Method, unlearning_method
from .rates import default_learning_rate
from .reference import ReferenceCache
from .settings_search import Candidate, SearchResult, Trial, search
from .trainer import UnlearningTrainer

__all__ = [
    "METHODS",
    "Candidate",
    "Method",
    "ReferenceCache",
    "SearchResult",
    "Trial",
    "UnlearningTrainer",
    "augmented",
    "combine",
    "default_learning_rate",
    "rewritings",
    "search",
    "unlearning_forward",
    "unlearning_method",
]

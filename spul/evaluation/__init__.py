"""How well it is forgotten, what else was lost, and whether it comes back."""

from .aggregation import Measurement, Number
from .neighbors import cluster_neighbors, name_neighbors, topic_neighbors
from .results import Evaluation, join
from .run import MEASURES, evaluate
from .suite import AttackSettings

__all__ = [
    "MEASURES",
    "AttackSettings",
    "Evaluation",
    "Measurement",
    "Number",
    "cluster_neighbors",
    "evaluate",
    "join",
    "name_neighbors",
    "topic_neighbors",
]

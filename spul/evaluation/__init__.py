"""Evaluation of unlearning: forgetting, utility, privacy, and attacks that bring the knowledge back."""

from .aggregation import Measurement, MetricValue
from .attack_settings import AttackSettings
from .conditions import Condition, failures
from .loading import load_unlearned
from .measures import MEASURES
from .neighbors import cluster_neighbors, name_neighbors, topic_neighbors
from .results import Evaluation, join
from .run import evaluate

__all__ = [
    "MEASURES",
    "AttackSettings",
    "Condition",
    "Evaluation",
    "Measurement",
    "MetricValue",
    "cluster_neighbors",
    "evaluate",
    "failures",
    "join",
    "load_unlearned",
    "name_neighbors",
    "topic_neighbors",
]

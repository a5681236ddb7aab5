"""Unlearning layers on a frozen causal LM, and their fusion (EUL, arXiv 2310.20150)."""

from .bottleneck import UnlearningLayersConfig
from .fusion import fuse, gather_inputs
from .unlearning_layers import UnlearningLayers

__all__ = [
    "UnlearningLayers",
    "UnlearningLayersConfig",
    "fuse",
    "gather_inputs",
]

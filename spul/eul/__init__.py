"""Unlearning layers, and how several of them become one (EUL, arXiv 2310.20150)."""

from .fusion import fuse, gather_inputs
from .layers import UnlearningLayers, UnlearningLayersConfig

__all__ = ["UnlearningLayers", "UnlearningLayersConfig", "fuse", "gather_inputs"]

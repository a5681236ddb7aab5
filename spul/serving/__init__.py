"""Prompts where models are served."""

from .batches import TransformersEngine
from .engine import Engine, Job
from .proxy import EmbeddingPayload, Payload, VllmEngine
from .requests import ApiError, Limits, Sampling
from .served import ServedPrompts, load_gated, load_prompts

__all__ = [
    "ApiError",
    "EmbeddingPayload",
    "Engine",
    "Job",
    "Limits",
    "Payload",
    "Sampling",
    "ServedPrompts",
    "TransformersEngine",
    "VllmEngine",
    "load_gated",
    "load_prompts",
]

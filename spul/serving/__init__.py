"""Prompts where models are served."""

from .batches import TransformersEngine
from .checkpoint import export_checkpoint
from .engine import Engine, Job
from .errors import ApiError
from .loading import load_gated, load_prompts
from .proxy import EmbeddingPayload, Payload, VllmEngine
from .requests import Limits, Sampling
from .served import ServedPrompts
from .vllm import export_vllm

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
    "export_checkpoint",
    "export_vllm",
    "load_gated",
    "load_prompts",
]

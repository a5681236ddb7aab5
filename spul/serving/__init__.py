"""Prompts where models are served."""

from .checkpoint import export_checkpoint
from .vllm import export_vllm

__all__ = ["export_checkpoint", "export_vllm"]

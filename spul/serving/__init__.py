"""Prompts where models are served."""

from .vllm import export_vllm

__all__ = ["export_vllm"]

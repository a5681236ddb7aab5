"""Prompts where models are served."""

__all__: list[str] = []

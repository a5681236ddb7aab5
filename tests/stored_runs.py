"""A stored run made by hand, for tests of the tables."""

from __future__ import annotations

from typing import Any

from spul.data import SPLITS


def run(method: str = "SPUL", seed: int = 0, accuracy: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A run with the accuracies a, a - 0.1, a - 0.2, a - 0.3 on the four splits."""
    settings = {"alpha": 1.0, "beta": 0.5, "num_virtual_tokens": 30, "forget_size": 1.0, **changes.pop("settings", {})}
    scores = {
        split: {"accuracy": accuracy - i / 10, "f1": 0.25, "generic": 0.125 * i, "loss": 1.5}
        for i, split in enumerate(SPLITS)
    }
    cost = {"trainable_parameters": 604160, "seconds": 10.0 + seed, "peak_memory_bytes": 3_200_000_000}
    cost |= {"forward_passes": 12000, "forward_tokens": 999}
    top = {"dataset": "sst2", "model": "small-lm", "method": method, "trainable": "prefix_tuning", "seed": seed}
    return {**top, "settings": settings, "scores": scores, "cost": cost, **changes}

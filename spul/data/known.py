"""Published data sets as unlearning tasks, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from .known_questions import load_tofu, load_wmdp
from .known_reviews import (
    IMDB_FORGET_NAMES,
    SST2_FORGET_NAMES,
    SST2_RETAIN_NAMES,
    load_four_splits,
    load_imdb,
    load_sst2,
    load_yelp,
)
from .unlearning_data import SPLITS, UnlearningData

__all__ = [
    "IMDB_FORGET_NAMES",
    "SPLITS",
    "SST2_FORGET_NAMES",
    "SST2_RETAIN_NAMES",
    "UnlearningData",
    "load_four_splits",
    "load_imdb",
    "load_known",
    "load_sst2",
    "load_tofu",
    "load_wmdp",
    "load_yelp",
]

LOADERS: dict[str, Callable[..., UnlearningData]] = {
    "sst2": load_sst2,
    "yelp": load_yelp,
    "wmdp": load_wmdp,
    "tofu": load_tofu,
    "imdb": load_imdb,
}


def load_known(
    name: str, source: str | os.PathLike[str] | None = None, seed: int = 0, **options: Any
) -> UnlearningData:
    """Load a published data set by name; `load_sst2` and the other functions describe each.

    Args:
        name: `"sst2"`, `"yelp"`, `"wmdp"`, `"tofu"` or `"imdb"`.
        source: local folder; None for the Hugging Face Hub.
        seed: seed of every draw.
        options: other arguments of that set's function.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: if the set's function has no such option.
        ValueError: if there is no such set, or its function raises it.

    Example:
        ```python
        data = load_known("sst2", "data/sst2", names=["spielberg", "woody allen"])
        print("\\n".join(data.notes))
        rows = data.training_set()
        ```
    """
    if name not in LOADERS:
        raise ValueError(
            f"name={name!r}; expected one of {', '.join(LOADERS)}. For a set of your own: load_four_splits."
        )
    known = [option for option in inspect.signature(LOADERS[name]).parameters if option not in ("source", "seed")]
    if unknown := sorted(options.keys() - set(known)):
        raise TypeError(f"{name} has no option(s) {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return LOADERS[name](source=source, seed=seed, **options)

"""Texts that gates of the tests are fit on."""

from __future__ import annotations

import numpy as np

FILMS = ["plot", "film", "scene", "actor", "music", "story", "ending", "script", "camera", "light"]
WORDS = ["good", "bad", "long", "short", "fine", "dull", "loud", "slow", "odd", "rich"]


def retain_texts(num=60, seed=0):
    """Different texts about films."""
    draws = np.random.default_rng(seed)
    return [f"the {draws.choice(FILMS)} {i} is {draws.choice(WORDS)} and {draws.choice(WORDS)}" for i in range(num)]


def forget_texts(num=40, seed=1):
    """Different texts about Jane Doe."""
    draws = np.random.default_rng(seed)
    return [f"jane doe in {draws.choice(FILMS)} {i} was {draws.choice(WORDS)}" for i in range(num)]

"""Requests that come to one base and are withdrawn: their order, and gated prompts that follow it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spul import SoftPromptUnlearner
from spul.gates import GatedUnlearner, load

WITHDRAWN, CHECKPOINTS = 3, (1, 5, 10)


class Order:
    """The order in which people's requests come, and in which some are withdrawn in the end.

    Args:
        people: those who ask.
        seed: of the draw.
    """

    def __init__(self, people: Sequence[str], seed: int) -> None:
        rng = random.Random(seed)
        self.added = rng.sample(list(people), len(people))
        self.withdrawn = rng.sample(list(people), WITHDRAWN)

    @property
    def left(self) -> list[str]:
        """The people whose requests are in force in the end."""
        return [name for name in self.added if name not in self.withdrawn]

    @property
    def stages(self) -> dict[str, list[str]]:
        """The people whose requests are in force at each stage that is scored, by its name."""
        added = {f"{count} added": self.added[:count] for count in CHECKPOINTS}
        return added | {f"{WITHDRAWN} withdrawn": self.left}


def gated_stages(
    order: Order, base: Any, tokenizer: Any, folders: Mapping[str, Path]
) -> Iterator[tuple[str, GatedUnlearner, list[str], dict[str, float]]]:
    """Add and withdraw prompts behind gates on one base.

    Args:
        order: of the requests.
        base: the frozen model.
        tokenizer: its tokenizer.
        folders: those with the `prompt` and the `gate` of each request.

    Yields:
        At each stage: its name, the gated model, the requests in force, and the median milliseconds that it took to
        add or to withdraw one.
    """
    gated, active, milliseconds = None, list[str](), list[float]()
    for i, name in enumerate(order.added, start=1):
        begun = time.perf_counter()
        gate = load(folders[name] / "gate", base, tokenizer)
        if gated is None:
            unlearner = SoftPromptUnlearner.from_pretrained(base, folders[name] / "prompt", adapter_name=name)
            gated = GatedUnlearner(unlearner, tokenizer, {name: gate}).eval()
        else:
            gated.load_adapter(folders[name] / "prompt", name, gate=gate)
        milliseconds.append(1000 * (time.perf_counter() - begun))
        active.append(name)
        if i in CHECKPOINTS:
            yield f"{i} added", gated, list(active), {"add_ms": float(np.median(milliseconds))}
    assert gated is not None
    milliseconds.clear()
    for name in order.withdrawn:
        begun = time.perf_counter()
        gated.delete_adapter(name)
        milliseconds.append(1000 * (time.perf_counter() - begun))
        active.remove(name)
    yield f"{WITHDRAWN} withdrawn", gated, list(active), {"withdraw_ms": float(np.median(milliseconds))}


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def model_bytes(model: Any) -> int:
    """Bytes of a model's weights."""
    return sum(one.nbytes for one in model.parameters())

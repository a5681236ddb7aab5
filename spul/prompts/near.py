"""A start that is checked on rows: drawn again until the prompt changes the base's answers little."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.checks import check_rows, forget_flags
from ..data.collator import ForgetRetainCollator, checked_collator
from ..data.rows import rows_at
from ..losses.positions import pack_right, response_positions
from ..losses.terms import IGNORE_INDEX
from ..models.causal_lm import evaluation_mode, logits_at
from ..models.compat_checkpointing import unswitched
from ..models.compat_devices import device_of
from ..records.messages import warn
from .row_prompts import RowPrompts, under

FAR = 0.5  # nats per response token, beyond which the start is said to be far
ROWS_OF_BATCH = 4  # their logits are small beside a training step's


@dataclass(frozen=True)
class NearStart:
    """The default start of a prompt's kind, drawn again until it is near the base on rows of the training.

    Draws differ by a factor of three in how far they take a pretrained model from itself, and which are near depends
    on the model and the rows. The distance is KL(prompted || base) in nats, the mean over response tokens of some of
    the rows. Each draw takes a pass of the base over these.

    Attributes:
        distance: nats of the draw that the last prompt began as; None before.

    Args:
        dataset: rows as they are trained on.
        collator: of the training, which encodes them.
        within: nats at which a draw is near; it leaves room for rows that are not looked at.
        num_draws: most draws; the nearest is taken if none is that near.
        num_rows: rows on which they are measured; all where there are fewer.

    Raises:
        TypeError: if the data set is no `datasets.Dataset`, the collator no `ForgetRetainCollator`, or a number no
            integer.
        ValueError: if rows have no `is_forget`, a number of draws or rows is below 1, or `within` below 0.
    """

    dataset: Dataset = field(repr=False)
    collator: ForgetRetainCollator = field(repr=False)
    within: float = 0.3
    num_draws: int = 8
    num_rows: int = 32
    distance: float | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        checked_flags(self.dataset, self.collator, num_draws=self.num_draws, num_rows=self.num_rows)
        if not self.within >= 0:
            raise ValueError(f"within={self.within}: expected nats, such as 0.3; 0 takes the nearest of all draws.")

    @torch.no_grad()
    def draw(self, model: Any, adapter_name: str, draw_once: Callable[[], None]) -> None:
        """Put the first near draw into a prompt, or the nearest, and warn if it is far.

        Args:
            model: a prompt-learning PEFT model.
            adapter_name: the prompt.
            draw_once: puts a fresh draw into it.

        Raises:
            ValueError: if rows leave no room for the prompt, or have no response.
        """
        rows = _Rows(model, adapter_name, self)
        encoder, least, nearest = model.prompt_encoder[adapter_name], math.inf, None
        for _ in range(self.num_draws):
            draw_once()
            distance = rows.distance()
            if nearest is None or distance < least or math.isnan(least):
                least, nearest = distance, {name: t.clone() for name, t in encoder.state_dict().items()}
            if least <= self.within:
                break
        assert nearest is not None  # of one draw at least
        encoder.load_state_dict(nearest)
        object.__setattr__(self, "distance", least)
        if not least <= FAR:
            warn(
                f"the prompt {adapter_name!r} begins {least:.2f} nats per response token from the base, and was the "
                f"nearest of {self.num_draws}; up to {FAR} is usual. Expect the first steps to repair that, or raise "
                "num_draws.",
            )


def checked_flags(dataset: Any, collator: Any, **counts: Any) -> list[bool]:
    """The `is_forget` flags of rows that a start is measured on, checked with their collator and counts, by name.

    Raises:
        TypeError: if the data set is no `datasets.Dataset`, the collator no `ForgetRetainCollator`, or a count no
            integer.
        ValueError: if rows have no `is_forget`, or a count is below 1.
    """
    check_rows(dataset, (), "dataset")
    checked_collator(collator)
    for name, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}={number!r}: expected an integer.")
        if number < 1:
            raise ValueError(f"{name}={number}: expected at least 1.")
    return forget_flags(dataset, "dataset")


class _Rows:
    """Rows with the base's log-probabilities at their response tokens.

    Args:
        model: a prompt-learning PEFT model.
        adapter_name: the prompt to compare with the base.
        start: where the rows are from.
    """

    def __init__(self, model: Any, adapter_name: str, start: NearStart) -> None:
        self.view, self.base = under(model, adapter_name), model.get_base_model()
        picked = torch.randperm(len(start.dataset))[: start.num_rows].tolist()
        rows = rows_at(start.dataset, picked)
        # Each with another of its completions: draws are the training's, which go on by how many there were.
        every = [start.collator.every(row) for row in rows]
        encoded = [found[i % len(found)] for i, found in enumerate(every)]
        device = device_of(self.base.get_input_embeddings())
        self.batches: list[tuple[dict[str, Tensor], Tensor | None, Tensor, Tensor]] = []
        for i in range(0, len(rows), ROWS_OF_BATCH):
            some = slice(i, i + ROWS_OF_BATCH)
            batch = start.collator.encoder.pad(rows[some], encoded[some])
            mask, ids, labels = pack_right(batch["attention_mask"], batch["input_ids"], batch["labels"])
            positions, targets = response_positions(labels.masked_fill(mask == 0, IGNORE_INDEX))
            tokens = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            positions, used = positions.to(device), (targets != IGNORE_INDEX).to(device)
            with unswitched(self.base), evaluation_mode(self.base):
                logits = logits_at(self.base, positions, **tokens, use_cache=False)
            inputs = tokens | {"positions": positions}
            of_base = _log_probabilities(logits, used).cpu()  # of all rows: they may be more than a step has
            self.batches.append((inputs, batch.get("prompt_position"), used, of_base))

    def distance(self) -> float:
        """KL(prompted || base) in nats, the mean over response tokens."""
        total, count = 0.0, 0
        for inputs, prompt_position, used, of_base in self.batches:
            prompts = RowPrompts(self.view, len(used), prompt_position=prompt_position)
            with unswitched(self.base), evaluation_mode(self.view):
                prompted = _log_probabilities(prompts.response_logits(**inputs), used)
            total += (prompted.exp() * (prompted - of_base.to(prompted.device))).sum().item()
            count += len(prompted)
        return total / count


def _log_probabilities(logits: Tensor, used: Tensor) -> Tensor:
    return logits[used.to(logits.device)].float().log_softmax(dim=-1)

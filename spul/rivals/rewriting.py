"""Rivals that put tokens into requests, which the base then reads: positions follow, lengths are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.causal_lm import logits_at, max_positions
from .rival import Rival


@dataclass(frozen=True)
class Edit:
    """A change of a request.

    Attributes:
        at: index of the first token that is removed, or before which others are put.
        removed: how many tokens are removed.
        ids: the tokens that stand there instead.
    """

    at: int
    removed: int
    ids: list[int]

    @property
    def shift(self) -> int:
        """By how many places the tokens behind it move."""
        return len(self.ids) - self.removed

    def applied(self, row: list[int]) -> list[int]:
        """The changed row."""
        return row[: self.at] + self.ids + row[self.at + self.removed :]


class RewritingRival(Rival):
    """A rival that changes requests and leaves the answering to the base.

    A subclass writes `edit` and `most_added`. A changed request that does not fit the base's positions raises; nothing
    is cut off.
    """

    def edit(self, request: list[int]) -> Edit:
        """The change of a request, as token ids."""
        raise NotImplementedError

    def most_added(self) -> int:
        """The largest number of tokens that are added to a request."""
        raise NotImplementedError

    @property
    def virtual_tokens_in_use(self) -> int:
        """The largest number of tokens that are added to a request; 0 where it is disabled."""
        return self.most_added() if self.enabled else 0

    def changed_logits(self, rows: Sequence[list[int]], ends: Sequence[int], positions: Tensor) -> Tensor:
        """The base's logits behind the changed requests."""
        edits = [self.edit(row[:end]) for row, end in zip(rows, ends, strict=True)]
        changed = [edit.applied(row) for edit, row in zip(edits, rows, strict=True)]
        self._check_fits(changed, edits, 0)
        inputs = self.padded(changed)
        shifts = torch.tensor([[edit.shift] for edit in edits], device=positions.device)
        behind = torch.tensor([[edit.at + edit.removed] for edit in edits], device=positions.device)
        # Position k predicts token k + 1, from what is put before that token, too.
        moved = torch.where(positions + 1 >= behind, positions + shifts, positions)
        moved = moved.clamp(0, inputs["input_ids"].shape[1] - 1)
        return logits_at(self.base_model, moved, **inputs, use_cache=False)

    def changed_answers(self, requests: Sequence[list[int]], **settings: Any) -> Tensor:
        """The base's answers to the changed requests."""
        edits = [self.edit(request) for request in requests]
        changed = [edit.applied(request) for edit, request in zip(edits, requests, strict=True)]
        self._check_fits(changed, edits, self.setting("max_new_tokens", settings))
        return self.base_answers(changed, **settings)

    def _check_fits(self, changed: Sequence[list[int]], edits: Sequence[Edit], new_tokens: int) -> None:
        limit = max_positions(self.base_model)
        longest = max(range(len(changed)), key=lambda i: len(changed[i]))
        if limit is not None and len(changed[longest]) + new_tokens > limit:
            added = edits[longest].shift
            fits = limit - added - new_tokens
            raise ValueError(
                f"a row of {len(changed[longest]) - added} tokens, {added} that {type(self).__name__} adds and "
                f"{new_tokens} new ones do not fit the model's {limit} positions; nothing is cut off: add fewer"
                + (f", or collate with max_length of at most {fits}." if fits >= 2 else ", or generate fewer.")
            )

"""Token ids of a row, cut to a length, and of many rows, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Encoded:
    """Token ids of a row: its prompt and its completion.

    Attributes:
        prompt_ids: those of the prompt, shortened.
        completion_ids: those of the completion.
        num_ending: how many of the last `completion_ids` end the answer and are no part of it: the end of turn of a
            chat template, or the end-of-sequence token of `append_eos`.
        num_cut: how many tokens the prompt lost.
        prompt_position: how many of the row's tokens stand before a soft prompt at `"message"`; None for `"start"`.
        is_running_text: whether the row is a text without a request: its first token has a label, too, which says so.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    num_ending: int = field(default=0, compare=False)
    num_cut: int = field(default=0, compare=False)
    prompt_position: int | None = field(default=None, compare=False)
    is_running_text: bool = field(default=False, compare=False)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def without_ending(self) -> Encoded:
        """The row without what ends its answer; the end is trained, and never counted in a measure."""
        num_own = len(self.completion_ids) - self.num_ending
        return Encoded(
            self.prompt_ids,
            self.completion_ids[:num_own],
            num_cut=self.num_cut,
            prompt_position=self.prompt_position,
            is_running_text=self.is_running_text,
        )


@dataclass
class EncodedPrompt:
    """Token ids of a row's prompt.

    Attributes:
        ids: the token ids.
        removable: the range of those that belong to the text field; None without one.
        position: as `Encoded.prompt_position`.
    """

    ids: list[int]
    removable: range | None = None
    position: int | None = None

    def shortened(self, excess: int, bos: int | None) -> EncodedPrompt:
        """The prompt without `excess` tokens: from the end of its text field, then from its start.

        A soft prompt stays before what is left of the message or the text.

        Args:
            excess: number of tokens to remove; nothing is removed if it is below 1.
            bos: the beginning-of-sequence token, which stays in front.
        """
        if excess <= 0:
            return self
        ids, position = self.ids, self.position
        if self.removable is not None:  # begins at `position` or after it
            cut = min(excess, len(self.removable))
            ids = ids[: self.removable.stop - cut] + ids[self.removable.stop :]
            excess -= cut
        keep = 1 if ids[0] == bos and len(ids) - excess > 1 else 0
        if position is not None:
            position -= min(excess, max(0, position - keep))
        return EncodedPrompt(ids[:keep] + ids[keep + excess :], position=position)


def token_at(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The first token that holds a character of a text, or one after it; their number if there is none.

    Args:
        offsets: for each token the span of its characters, from a fast tokenizer.
        character: the number of the character.
    """
    return next((i for i, (start, end) in enumerate(offsets) if start < end and character < end), len(offsets))


def left_padded(prompts: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Prompts of rows as a left-padded batch, which `generate` continues.

    Args:
        prompts: their `prompt_ids`; completions are left out.
        pad: the id of padding.

    Returns:
        `input_ids` and `attention_mask` (B, n), and `prompt_position` (B,) if the rows have it.
    """
    return left_padded_ids([one.prompt_ids for one in prompts], pad) | position_column(prompts)


def left_padded_ids(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token ids of rows as a left-padded batch: `input_ids` and `attention_mask` (B, n)."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def position_column(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """`prompt_position` (B,) of rows that have it; nothing for others."""
    found = [one.prompt_position for one in rows if one.prompt_position is not None]
    return {"prompt_position": torch.tensor(found)} if found else {}

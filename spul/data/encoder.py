"""From a row to token ids, shortened where it must be and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..losses.terms import IGNORE_INDEX
from .dataset import is_empty

# Stands before a completion while it is tokenized alone, so that SentencePiece adds no leading space of its own to it.
ANCHOR = ":"


@dataclass
class Encoded:
    """Token ids of a row: what is given and what is to be answered."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class RowEncoder:
    """Turns prompt-completion rows into token ids of at most `max_length`.

    The completion is tokenized as it follows the prompt's last token, so a leading space belongs to it (`"
    positive"`). A row that is too long loses tokens from the end of its text field, if one is named, and then from
    the start of the prompt, after the beginning-of-sequence token; never from the completion.

    Args:
        tokenizer: any tokenizer of transformers; a fast one if `text_field` is given.
        max_length: the most tokens a row may have, without virtual tokens.
        text_field: name of a column whose text stands in the prompt and may be shortened, such as `"text"`.
        append_eos: whether completions end with the end-of-sequence token. Chat templates decide for themselves.
        pad_to_multiple_of: pad a batch's width to a multiple of this.

    Raises:
        ValueError: if `max_length` is below 2, or the tokenizer cannot do what is asked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        text_field: str | None = None,
        append_eos: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length}; expected at least 2: one token of prompt, one of completion.")
        if text_field is not None and not tokenizer.is_fast:
            raise ValueError(
                f"text_field={text_field!r} needs a fast tokenizer; {type(tokenizer).__name__} is not one."
            )
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True, but the tokenizer has no eos_token; set one or leave append_eos out.")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.text_field, self.append_eos, self.pad_to_multiple_of = text_field, append_eos, pad_to_multiple_of
        self._completions: dict[str, list[int]] = {}
        # Some tokenizers end every text; a prompt's end is not there yet.
        eos = tokenizer.eos_token_id
        self._ends_texts = eos is not None and tokenizer(ANCHOR)["input_ids"][-1:] == [eos]

    def with_max_length(self, max_length: int) -> RowEncoder:
        """The same encoder for rows of another length."""
        return RowEncoder(self.tokenizer, max_length, self.text_field, self.append_eos, self.pad_to_multiple_of)

    def batch(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Rows with their own completions (or those given), forget rows too, as one right-padded batch.

        Args:
            rows: as `encode`; `is_forget` and `row_id` are passed on if all rows have them.
            completions: one text per row, instead of its own.

        Returns:
            As `pad`.
        """
        return self.pad(
            rows, [self.encode(row, None if completions is None else completions[i]) for i, row in enumerate(rows)]
        )

    def pad(self, rows: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """Encoded rows as one right-padded batch.

        Args:
            rows: what was encoded; `is_forget` and `row_id` are passed on if all rows have them.
            encoded: token ids, one per row.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, n), -100 outside the completion; `is_forget` (B,) bool and
            `row_id` (B,) if the rows have them.
        """
        lengths = [len(one) for one in encoded]
        width = max(lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        batch = {
            "input_ids": torch.full((len(rows), width), pad),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORE_INDEX),
        }
        for i, (one, length) in enumerate(zip(encoded, lengths, strict=True)):
            batch["input_ids"][i, :length] = torch.tensor(one.prompt_ids + one.completion_ids)
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, len(one.prompt_ids) : length] = torch.tensor(one.completion_ids)
        if all("is_forget" in row for row in rows):
            batch["is_forget"] = torch.tensor([bool(row["is_forget"]) for row in rows])
        if all("row_id" in row for row in rows):
            batch["row_id"] = torch.tensor([int(row["row_id"]) for row in rows])
        return batch

    def encode(self, row: Mapping[str, Any], completion: str | list[int] | None = None, reserve: int = 0) -> Encoded:
        """Token ids of a row.

        Args:
            row: `prompt` and `completion`, as text or messages; or, tokenized, `input_ids` and `completion_mask`.
            completion: stands in for the row's own completion; token ids if the row is tokenized.
            reserve: room to leave for a completion of so many tokens, if this one is shorter.

        Raises:
            ValueError: if columns are missing, or prompt or completion have no tokens, or the completion alone is too
                long.
        """
        if "input_ids" in row:
            prompt_ids, completion_ids = self._split_tokenized(row)
            if completion is not None:
                completion_ids = completion if isinstance(completion, list) else self.completion_ids(completion)
            removable = None
        elif isinstance(completion, list):
            raise ValueError("token ids can stand in for the completion of a tokenized row only; pass text.")
        elif "prompt" not in row or "completion" not in row:
            raise ValueError(
                f"a row has the columns {sorted(row)}; expected prompt and completion, or input_ids and "
                "completion_mask. If a Trainer pruned them, set TrainingArguments(remove_unused_columns=False)."
            )
        elif isinstance(row["prompt"], str):
            if is_empty(row["completion"]):
                raise ValueError(f"a row has an empty completion: {dict(row)!r}")
            prompt_ids, removable = self._prompt_ids(row)
            completion_ids = self.completion_ids(row["completion"] if completion is None else completion)
        else:
            prompt_ids, completion_ids = self._chat_ids(row["prompt"], row["completion"], completion)
            removable = None
        if not prompt_ids or not completion_ids:
            raise ValueError(
                f"{'the prompt' if not prompt_ids else 'the completion'} of a row has no tokens: {dict(row)!r}. "
                "The model needs at least one token before the completion, and one to answer."
            )
        return Encoded(self._shorten(prompt_ids, max(len(completion_ids), reserve), removable), completion_ids)

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a completion as it continues a text."""
        if text not in self._completions:
            anchor = self.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
            ids = self.tokenizer(ANCHOR + text, add_special_tokens=False)["input_ids"]
            # An unknown anchor would swallow what stands next to it.
            if anchor and self.tokenizer.unk_token_id not in anchor and ids[: len(anchor)] == anchor:
                ids = ids[len(anchor) :]
            else:
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self.append_eos:
                ids = [*ids, self.tokenizer.eos_token_id]
            if len(self._completions) >= 4096:  # free-form answers: do not keep a whole data set
                self._completions.clear()
            self._completions[text] = ids
        return list(self._completions[text])

    def _prompt_ids(self, row: Mapping[str, Any]) -> tuple[list[int], range | None]:
        """Ids of a text prompt, and the places of those that belong to its text field."""
        prompt = row["prompt"]
        encoded = self.tokenizer(prompt, return_offsets_mapping=self.text_field is not None)
        ids = list(encoded["input_ids"])
        if self._ends_texts:
            ids.pop()
        if self.text_field is None:
            return ids, None
        if self.text_field not in row:
            raise ValueError(f"text_field={self.text_field!r}, but a row has only the columns {sorted(row)}.")
        start = prompt.find(row[self.text_field])
        if start < 0:
            raise ValueError(
                f"the text of column {self.text_field!r} does not stand in the prompt of its row: {dict(row)!r}"
            )
        end = start + len(row[self.text_field])
        inside = [
            i for i, (a, b) in enumerate(encoded["offset_mapping"][: len(ids)]) if a < b and start <= a and b <= end
        ]
        return ids, range(inside[0], inside[-1] + 1) if inside else None

    def _chat_ids(self, prompt: list, completion: list, text: str | None) -> tuple[list[int], list[int]]:
        """Ids of a conversation by the tokenizer's chat template."""
        if text is not None:
            completion = [{"role": completion[-1]["role"], "content": text.strip()}]
        apply = self.tokenizer.apply_chat_template
        prompt_ids = list(apply(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
        both = list(apply([*prompt, *completion], tokenize=True, return_dict=False))
        if both[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the chat template does not render the prompt the same way when the completion follows, so the "
                f"completion cannot be told apart: {prompt!r}. Use a template whose generation prompt is the start "
                "of an answer."
            )
        return prompt_ids, both[len(prompt_ids) :]

    def _split_tokenized(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        ids, mask = list(row["input_ids"]), row.get("completion_mask")
        if mask is None or len(mask) != len(ids):
            raise ValueError(
                f"a tokenized row has the columns {sorted(row)}; expected input_ids and a completion_mask of the same "
                "length (0 for prompt tokens, 1 for completion tokens). If a Trainer pruned it, set "
                "TrainingArguments(remove_unused_columns=False)."
            )
        num_prompt = list(mask).index(1) if 1 in mask else len(ids)
        if not all(mask[num_prompt:]):
            raise ValueError(f"completion_mask must be 0 for the prompt, then 1 for the completion; got {list(mask)}.")
        return ids[:num_prompt], ids[num_prompt:]

    def _shorten(self, prompt_ids: list[int], num_completion: int, removable: range | None) -> list[int]:
        excess = len(prompt_ids) + num_completion - self.max_length
        if excess <= 0:
            return prompt_ids
        if num_completion >= self.max_length:
            raise ValueError(
                f"a completion has {num_completion} tokens and max_length={self.max_length} leaves no room for a "
                "prompt; completions are never cut: raise max_length."
            )
        if removable is not None:
            cut = min(excess, len(removable))
            prompt_ids = prompt_ids[: removable.stop - cut] + prompt_ids[removable.stop :]
            excess -= cut
        keep = 1 if prompt_ids[0] == self.tokenizer.bos_token_id and len(prompt_ids) - excess > 1 else 0
        return prompt_ids[:keep] + prompt_ids[keep + excess :]

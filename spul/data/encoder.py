"""Row encoder: token ids of prompt and completion, shortened to a maximum length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..losses.terms import IGNORE_INDEX
from ..records.fields import check_prompt_position
from .checks import checked_flag, checked_row_id, whole_number
from .conversations import check_instructions, conversation_ids, conversation_prompt_ids, message_start
from .encoded import Encoded, EncodedPrompt, left_padded, position_column, token_at
from .row_checks import check_is_row, check_texts, ending_of, position_of, row_name, split_tokenized
from .rows import shortened
from .text_encoder import TextEncoder

NO_LIMIT = 1 << 30  # a `max_length` that cuts no row


class RowEncoder(TextEncoder):
    """Encoder of prompt-completion rows as token ids, at most `max_length` a row.

    The completion is tokenized as the continuation of the prompt, so a leading space belongs to it (`" positive"`). In
    conversations it ends with the chat template's end of turn; what the template adds after that, such as a newline,
    is dropped. A text prompt that begins with the beginning-of-sequence token, as rendered conversations do, gets no
    second one. A row that is too long loses tokens from the end of its text field, if one is named, and then from the
    start of the prompt, after the beginning-of-sequence token; never from the completion.

    With `prompt_position="message"` each row also has the number of its tokens before a soft prompt that stands just
    before what is asked: before the content of the last user message of a conversation, or before the text field of a
    text prompt, where it stands last.

    Encoded completions and rendered conversations are cached, up to `CACHE_SIZE`. Copies of an encoder, as in the
    workers of a data loader, start with an empty cache.

    Args:
        tokenizer: any tokenizer of transformers; a fast one if `text_field` is given.
        max_length: maximum number of tokens of a row, without virtual tokens.
        text_field: column whose text is part of the prompt and may be shortened, such as `"text"`.
        append_eos: whether completions end with the end-of-sequence token, which is trained and not scored. In
            conversations the chat template decides.
        pad_to_multiple_of: pad the width of a batch to a multiple of this.
        prompt_position: `"start"`, or `"message"` for prompts that stand there.

    Attributes:
        num_cut: number of rows that lost tokens, by the collator's `warn_of_cut_rows` and `tokenize`.
        said_completions: the first `BOUNDARY_WIDTH` characters of completions of which no warning is due, since who
            made the encoder said already that they do not fit their prompts.

    Raises:
        TypeError: if `tokenizer` is none of transformers, or `max_length` no whole number.
        ValueError: if `max_length` is below 2, or `pad_to_multiple_of` below 1; `text_field` is given with a slow
            tokenizer, `append_eos` with one without an end-of-sequence token, or `prompt_position` is neither of the
            two.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        text_field: str | None = None,
        append_eos: bool = False,
        pad_to_multiple_of: int | None = None,
        prompt_position: str = "start",
    ) -> None:
        super().__init__(tokenizer, append_eos)
        check_prompt_position(prompt_position)
        if whole_number(max_length, bools=False) is None:
            raise TypeError(f"max_length={max_length!r}; expected a whole number of tokens.")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}; expected at least 2: one token of prompt, one of completion.")
        if pad_to_multiple_of is not None and (whole_number(pad_to_multiple_of, bools=False) or 0) < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r}; expected a whole number from 1, or None.")
        if text_field is not None and not tokenizer.is_fast:
            raise ValueError(
                f"text_field={text_field!r} needs a fast tokenizer; {type(tokenizer).__name__} is not one."
            )
        self.max_length, self.text_field, self.pad_to_multiple_of = max_length, text_field, pad_to_multiple_of
        self.prompt_position, self.num_cut = prompt_position, 0

    def with_max_length(self, max_length: int) -> RowEncoder:
        """An encoder with the same settings and another maximum length."""
        settings = (self.text_field, self.append_eos, self.pad_to_multiple_of, self.prompt_position)
        encoder = RowEncoder(self.tokenizer, max_length, *settings)
        encoder.said_completions = self.said_completions
        encoder._cache, encoder._boundaries = self._cache, self._boundaries  # of ids before they are shortened
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "num_cut": 0}

    def batch(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """One right-padded batch of rows, forget rows too, with their own completions or with those given.

        Args:
            rows: as in `encode`; `is_forget` and `row_id` are included if all rows have them.
            completions: one text per row, in place of its own.

        Returns:
            As in `pad`.
        """
        return self.pad(
            rows, [self.encode(row, None if completions is None else completions[i]) for i, row in enumerate(rows)]
        )

    def pad(self, rows: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """One right-padded batch of encoded rows.

        Args:
            rows: the rows; `is_forget` and `row_id` are included if all rows have them.
            encoded: their token ids, one per row.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, n), -100 outside the completion, but for the first token of a
            text without a request; `is_forget` (B,) bool and `row_id` (B,) if the rows have them; `prompt_position`
            (B,) if prompts stand at `"message"`.
        """
        lengths = [len(one) for one in encoded]
        width = max(lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), width), self._pad_id),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORE_INDEX),
        }
        for i, (one, length) in enumerate(zip(encoded, lengths, strict=True)):
            batch["input_ids"][i, :length] = torch.tensor(one.prompt_ids + one.completion_ids)
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, len(one.prompt_ids) : length] = torch.tensor(one.completion_ids)
            if one.is_running_text:
                batch["labels"][i, 0] = batch["input_ids"][i, 0]
        if all("is_forget" in row for row in rows):
            flags = [checked_flag(row["is_forget"], f"row {i} of the batch") for i, row in enumerate(rows)]
            batch["is_forget"] = torch.tensor(flags)
        if all("row_id" in row for row in rows):
            ids = [checked_row_id(row["row_id"], f"row {i} of the batch") for i, row in enumerate(rows)]
            batch["row_id"] = torch.tensor(ids)
        return batch | position_column(encoded)

    def prompts(self, rows: Sequence[Mapping[str, Any]], reserve: int = 0) -> dict[str, Tensor]:
        """One left-padded batch of prompts without completions, as `generate` continues it.

        Args:
            rows: `prompt`, as text or messages, and the text field, if one is named; a completion is not read.
            reserve: shorten prompts as if this many tokens were to follow.

        Returns:
            `input_ids` and `attention_mask` (B, n); `prompt_position` (B,) if prompts stand at `"message"`.

        Raises:
            TypeError: if a row is no mapping of columns.
            ValueError: if there are no rows, or one has no prompt, or a tokenized one alone.

        Example:
            ```python
            unlearner.generate(**collator.encoder.prompts([{"prompt": messages}]), max_new_tokens=20)
            ```
        """
        found = []
        for row in rows:
            check_is_row(row)
            if "prompt" not in row and "input_ids" in row:
                raise ValueError(
                    f"{row_name(row)} is tokenized, without its prompt; expected rows with prompt, as text or "
                    "messages, as they were before collator.tokenize."
                )
            is_text = isinstance(row.get("prompt"), str)
            stand_in = "answer" if is_text else [{"role": "assistant", "content": "answer"}]  # checked, not encoded
            check_texts({**row, "completion": stand_in}, self.text_field)
            prompt = self._shortened(self._prompt(row), reserve)
            found.append(Encoded(prompt.ids, [], prompt_position=prompt.position))
        if not found:
            raise ValueError("there are no rows to continue; expected a list of at least one.")
        return left_padded(found, self._pad_id)

    @property
    def _pad_id(self) -> int:
        return next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)

    def encode(self, row: Mapping[str, Any], completion: str | list[int] | None = None, reserve: int = 0) -> Encoded:
        """Token ids of a row.

        Args:
            row: `prompt` and `completion`, as text or messages; or, tokenized, `input_ids` and `completion_mask`, and
                `is_running_text` where it is a text without a request.
            completion: replaces the row's own completion: text, or token ids if the row is tokenized.
            reserve: truncate the prompt as if the completion had at least this many tokens.

        Raises:
            ValueError: if columns are missing, prompt or completion have no tokens, or the completion alone is too
                long.
        """
        check_is_row(row)
        num_ending = 0
        if "input_ids" in row:
            prompt_ids, completion_ids = split_tokenized(row)
            at_message = self.prompt_position == "message"
            prompt = EncodedPrompt(prompt_ids, position=position_of(row, len(prompt_ids)) if at_message else None)
            num_ending = ending_of(row, len(completion_ids))
            if isinstance(completion, list):
                completion_ids, num_ending = completion, 0
            elif completion is not None:
                completion_ids, num_ending = self.completion_ids(completion), int(self.append_eos)
        elif isinstance(completion, list):
            raise ValueError("token ids can replace the completion of a tokenized row only; pass text.")
        else:
            check_texts(row, self.text_field)
            prompt = self._prompt(row)
            if isinstance(row["prompt"], str):
                text = row["completion"] if completion is None else completion
                completion_ids, num_ending = self.completion_ids(text), int(self.append_eos)
                self._check_boundary(row["prompt"], text)
            else:
                _, completion_ids, num_ending = self._conversation_ids(row, completion)
        if not prompt.ids or not completion_ids:
            part = "the completion" if prompt.ids else "the prompt"
            raise ValueError(
                f"{part} of a row has no tokens: {shortened(repr(dict(row)))}. The model needs at least one token "
                "before the completion, and one to answer."
            )
        kept = self._shortened(prompt, max(len(completion_ids), reserve))
        is_running_text = "input_ids" in row and bool(row.get("is_running_text"))
        num_cut = len(prompt.ids) - len(kept.ids)
        return Encoded(kept.ids, completion_ids, num_ending, num_cut, kept.position, is_running_text)

    def answer_ids(self, text: str, row: Mapping[str, Any]) -> list[int]:
        """`completion_ids` without what ends the answer: the tokens that are scored."""
        if isinstance(row["prompt"], str):
            ids = self.completion_ids(text)
            return ids[:-1] if self.append_eos else ids
        return self.encode(row, text).without_ending().completion_ids

    def completion_ids(self, text: str, row: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a text as a completion, cached.

        Args:
            text: the completion.
            row: the row that it completes. Only conversations need it: there the chat template puts tokens of its own
                around the text.
        """
        if row is None or "input_ids" in row or isinstance(row["prompt"], str):
            return super().completion_ids(text)
        return self._conversation_ids(row, text)[1]

    def _prompt(self, row: Mapping[str, Any]) -> EncodedPrompt:
        """The prompt of a row of texts or messages, before it is shortened."""
        if not isinstance(row["prompt"], str):
            check_instructions(self.tokenizer, row["prompt"], self._cached)
            ids = conversation_prompt_ids(self.tokenizer, row["prompt"], self._cached)
            at_message = self.prompt_position == "message"
            start = message_start(self.tokenizer, row["prompt"], self._cached) if at_message else None
            return EncodedPrompt(ids, position=start)
        prompt, field = row["prompt"], self.text_field
        encoded = self.tokenizer(prompt, return_offsets_mapping=field is not None)
        ids = self.whole_ids(prompt, encoded["input_ids"])
        if self.prompt_position == "message" and (field is None or not row[field].strip()):
            found = "no text_field is named" if field is None else f"that of column {field!r} is empty"
            raise ValueError(
                f'prompt_position="message" puts the soft prompt before the text of a text prompt, and {found}: '
                f"{shortened(repr(prompt))}. Name the column whose text the prompt contains, "
                'ForgetRetainCollator(..., text_field="text") or --text-field text, or pass conversations.'
            )
        if field is None:
            return EncodedPrompt(ids)
        start = prompt.rfind(row[field])  # turns before the question may hold the same text
        if start < 0:
            raise ValueError(
                f"the text of column {field!r} is not part of the prompt of its row: "
                f"{shortened(repr(dict(row)))}. Name the column whose text the prompt contains."
            )
        end = start + len(row[field])
        offsets = encoded["offset_mapping"][self.has_second_bos(prompt, encoded["input_ids"]) :][: len(ids)]
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and start <= a and b <= end]
        return EncodedPrompt(
            ids,
            range(inside[0], inside[-1] + 1) if inside else None,
            token_at(offsets, start) if self.prompt_position == "message" else None,
        )

    def _conversation_ids(self, row: Mapping[str, Any], text: str | None) -> tuple[list[int], list[int], int]:
        return conversation_ids(self.tokenizer, row["prompt"], row["completion"], text, self._cached)

    def _shortened(self, prompt: EncodedPrompt, num_completion: int) -> EncodedPrompt:
        if len(prompt.ids) + num_completion <= self.max_length:
            return prompt
        if num_completion >= self.max_length:
            raise ValueError(
                f"a completion has {num_completion} tokens and max_length={self.max_length} leaves no room for a "
                f"prompt; completions are never cut: raise max_length to more than {num_completion}, if the model has "
                "as many positions, or give shorter ones."
            )
        return prompt.shortened(len(prompt.ids) + num_completion - self.max_length, self.tokenizer.bos_token_id)

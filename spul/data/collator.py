"""Collator: rows to a right-padded batch, with generic completions drawn for forget rows."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .checks import check_is_forget, check_not_generic, checked_generic_completions, checked_names, checked_row_id
from .cut_rows import rows_maybe_cut
from .encoded import Encoded
from .encoder import RowEncoder
from .recognizers import NameFinder
from .row_checks import alternates_of, check_ends_alike, check_is_row, generic_ids_of, row_flag, row_name
from .row_weights import WEIGHT
from .rows import REWRITTEN_BY, completion_text, prompt_of, read_rows, shortened

logger = logging.getLogger(__name__)

# Columns of a row that the collator reads, beside the text field.
ROW_COLUMNS = (
    "prompt",
    "completion",
    "completion_mask",
    "input_ids",
    "num_ending",
    "generic_ids",
    "prompt_position",
    "is_forget",
    "row_id",
    "copy",
)


class ForgetRetainCollator:
    """Collator of forget and retain rows into one right-padded batch.

    Replaces the completion of each forget row by one drawn uniformly from `generic_completions`, or from the row's own
    alternatives. A draw depends on the seed, the row and the number of its earlier draws alone: other rows of the
    batch, workers and processes do not change it.

    Args:
        tokenizer: any tokenizer of transformers; it needs no pad token and is not changed.
        generic_completions: target completions of forget rows, such as `[" neutral", " unknown"]`, with a leading
            space if the completions of your data have one. None keeps each forget row's own completion, as
            gradient ascent requires.
        max_length: maximum number of tokens of a row, without virtual tokens; `spul.data.RowEncoder` describes what is
            cut.
        seed: seed of the draws.
        resample: whether to draw again each time a row is collated; False draws once per row.
        text_field: column whose text is part of the prompt and may be cut.
        append_eos: whether completions end with the end-of-sequence token, so that it is trained; it is not
            scored. For free answers, not for labels: `PromptFormat.collator` decides by the format.
        pad_to_multiple_of: pad the width of a batch to a multiple of this.
        names: names that the data was split by, such as `list(split.report.groups)`; a forget row that loses one
            to `max_length` raises.
        alternates: column of forget rows with a list of texts to draw from, in place of `generic_completions`, such as
            `"alternates"` (`spul.training.add_alternates`).
        pairs: whether each forget row makes a pair of rows, for a loss that compares two responses (DPO): one with the
            drawn completion, and right after it one with the row's own, which is rejected.
        prompt_position: `"message"` for a soft prompt that stands just before the last user message, or before the
            text field of a text prompt: batches then have `prompt_position`. `"start"` (default) for all else.

    Raises:
        TypeError: if `generic_completions` is a string or no list, holds something other than texts, or another
            argument is of another type.
        ValueError: if `generic_completions` has no, empty or repeated entries, is given beside `alternates`, or
            neither is given with `pairs`.

    Example:
        ```python
        collator = ForgetRetainCollator(tokenizer, [" neutral", " unknown"], max_length=1024)
        loader = DataLoader(dataset, batch_size=32, shuffle=True, collate_fn=collator)
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generic_completions: Sequence[str] | None,
        max_length: int = 1024,
        seed: int = 0,
        *,
        resample: bool = True,
        text_field: str | None = None,
        append_eos: bool = False,
        pad_to_multiple_of: int | None = None,
        names: Sequence[str] = (),
        alternates: str | None = None,
        pairs: bool = False,
        prompt_position: str = "start",
    ) -> None:
        if generic_completions is not None:
            generic_completions = checked_generic_completions(generic_completions)
        self.tokenizer, self.generic_completions = tokenizer, generic_completions
        self.seed, self.resample = seed, resample
        settings = (text_field, append_eos, pad_to_multiple_of, prompt_position)
        self.encoder = RowEncoder(tokenizer, max_length, *settings)
        if alternates is not None and generic_completions is not None:
            raise ValueError(
                f"alternates={alternates!r} names a column to draw completions from, and generic_completions are "
                "given as well; pass None for one of them."
            )
        if pairs and alternates is None and generic_completions is None:
            raise ValueError(
                "pairs=True needs completions that are preferred to a row's own; pass generic_completions, or "
                "alternates, the column that has them."
            )
        self.alternates, self.pairs = alternates, pairs
        self.names = checked_names("names", names) if names else []
        self._warned_of_cut = False
        self._draws: Counter[str] = Counter()  # per row, since the start of the epoch
        self._draws_epoch = (-1, 0)
        # Epoch (-1 if nobody sets it), and how often it was set. In shared memory, so that persistent workers see it.
        self._epoch = torch.tensor([-1, 0]).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the draws. `UnlearningTrainer` calls it; in a loop of your own it makes draws resumable."""
        self._epoch[0] = epoch
        self._epoch[1] += 1  # so that setting the same epoch again restarts it

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows.

        Args:
            rows: `prompt`, `completion` (text or messages) and `is_forget`; or, tokenized, `input_ids`,
                `completion_mask` and `is_forget`. `row_id` if known.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, n) with -100 outside the completion, `is_forget` (B,) bool, and
            `row_id` (B,) if all rows have one; `prompt_position` (B,), the number of a row's tokens before the soft
            prompt, if that stands at `"message"`. With `pairs`, `is_rejected` (B,) bool, and B counts a forget row
            twice.

        Raises:
            TypeError: if `rows` is one mapping of columns.
            ValueError: if there are no rows, a row lacks a column, its `is_forget` is not a bool, 0 or 1, or its
                completion is one of the generic ones.
        """
        if isinstance(rows, Mapping):
            raise TypeError(
                "rows is one mapping of columns, such as a slice of a Dataset; pass a list of rows: "
                "[dataset[i] for i in range(8)]."
            )
        try:
            rows = list(rows)
        except TypeError as error:
            raise TypeError(f"rows is a {type(rows).__name__}; expected a list of rows.") from error
        if not rows:
            raise ValueError("there are no rows to collate; expected at least one.")
        for i, row in enumerate(rows):
            check_is_row(row, i)
            check_is_forget(row, row_name(row, i))
            if "row_id" in row:
                checked_row_id(row["row_id"], f"row {i} of the batch")
        flags = [row_flag(row, i) for i, row in enumerate(rows)]
        collated, encoded, is_rejected = [], [], []
        for row, is_forget in zip(rows, flags, strict=True):
            own = self.encoder.encode(row)
            self._check_completion(row, own.completion_ids)
            choices = self._choices(row) if is_forget else None
            found = [own]
            if choices is not None:
                drawn = self._draw(row, len(choices))
                found = self._encodings(row, own, choices, [drawn, None] if self.pairs else [drawn])
            if found[0].num_cut and not self._warned_of_cut:
                self._warned_of_cut = True
                self._warn_of_row(found[0], "are not warned of")
            if is_forget:
                self._check_names(row, found[0])
            collated += [row] * len(found)
            encoded += found
            is_rejected += [False, True][: len(found)]
        batch = self.encoder.pad(collated, encoded)
        return {**batch, "is_rejected": torch.tensor(is_rejected)} if self.pairs else batch

    def every(self, row: Mapping[str, Any], number: int | None = None) -> list[Encoded]:
        """All that a row can be collated as, in a fixed order: one but for forget rows whose completion is drawn.

        Args:
            row: as in `__call__`. With `resample=False` its one draw counts alone; of a pair both rows do.
            number: encode the one of this number in that order alone.
        """
        own = self.encoder.encode(row)
        choices = self._choices(row) if row_flag(row) else None
        if choices is None:
            return [own]
        draws = range(len(choices)) if self.resample else [self._draw(row, len(choices))]
        which = [*draws, None] if self.pairs else list(draws)
        return self._encodings(row, own, choices, which if number is None else [which[number]])

    def _encodings(
        self, row: Mapping[str, Any], own: Encoded, choices: Sequence[str | list[int]], which: Sequence[int | None]
    ) -> list[Encoded]:
        """A forget row with some of its choices, its own completion for None, all with the same prompt."""
        reserve = self._reserve(row, own)
        return [self.encoder.encode(row, None if i is None else choices[i], reserve) for i in which]

    def _choices(self, row: Mapping[str, Any]) -> Sequence[str | list[int]] | None:
        """The completions that a forget row draws from, as texts or token ids; None if it keeps its own."""
        if self.alternates is not None:
            return alternates_of(row, self.alternates)
        if self.generic_completions is None:
            return None
        ids = generic_ids_of(row, len(self.generic_completions))
        if ids is None:
            check_ends_alike(row, self.encoder.append_eos)
        return self.generic_completions if ids is None else ids

    def _choice_ids(self, row: Mapping[str, Any]) -> list[list[int]]:
        """`_choices` as token ids; none if the row keeps its own completion."""
        choices = self._choices(row) or []
        return [self.encoder.completion_ids(one, row) if isinstance(one, str) else one for one in choices]

    def tokenize(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as `input_ids` and `completion_mask`, for `dataset.map(collator.tokenize)`.

        Long rows are cut once instead of in every epoch, and lengths are known to `group_by_length`. The first
        row that is cut is warned of, and all of them are counted in `encoder.num_cut`.
        """
        is_forget = "is_forget" in row and row_flag(row)
        encoded = self.encoder.encode(row)
        if "input_ids" not in row and is_forget and self._choices(row) is not None:
            encoded = self.encoder.encode(row, reserve=self._reserve(row, encoded))
        if is_forget:
            self._check_names(row, encoded)
        if encoded.num_cut:
            if not self.encoder.num_cut:
                self._warn_of_row(encoded, "are counted in collator.encoder.num_cut")
            self.encoder.num_cut += 1
        mask = [0] * len(encoded.prompt_ids) + [1] * len(encoded.completion_ids)
        columns = {name: row[name] for name in ("is_forget", "row_id", WEIGHT, REWRITTEN_BY) if name in row}
        if encoded.prompt_position is not None:
            columns["prompt_position"] = encoded.prompt_position
        is_conversation = "input_ids" not in row and not isinstance(row["completion"], str)
        if is_conversation or ("input_ids" not in row and self.encoder.append_eos):
            columns["num_ending"] = encoded.num_ending  # which a tokenized row does not show by itself
        if is_conversation and self.generic_completions is not None:
            # A chat template puts tokens of its own around answers, too.
            texts = self.generic_completions if is_forget else []
            columns["generic_ids"] = [self.encoder.completion_ids(text, row) for text in texts]
        if self.alternates is not None:
            # Of a conversation the tokenized row does not show what the template puts around answers.
            columns[self.alternates] = self._choice_ids(row) if is_forget else []
        return {"input_ids": encoded.prompt_ids + encoded.completion_ids, "completion_mask": mask, **columns}

    def warn_of_cut_rows(self, rows: Any, name: str = "train_dataset") -> int:
        """Count the rows that are longer than `max_length`, and warn of them, all in one message.

        The count is exact for forget rows and for the first 20,000 retain rows that look long; among more than these
        every 32nd is tokenized, and the message says "about".

        Args:
            rows: a data set, or any sequence of rows, as in `__call__`.
            name: their name in the message.

        Returns:
            Their number, which `encoder.num_cut` is set to.

        Raises:
            ValueError: if a forget row would lose one of `names`.
        """
        num_cut, num_tokens, about = 0, 0, ""
        columns = (*ROW_COLUMNS, self.encoder.text_field or "prompt", self.alternates or "prompt")
        maybe_cut = rows_maybe_cut(
            self.encoder,
            read_rows(rows, columns),
            self.generic_completions or (),
            every_forget_row=self.alternates is not None,
        )
        for row, stands_for in maybe_cut:
            about = "about " if stands_for > 1 else about
            encoded = self.encoder.encode(row)
            if row.get("is_forget"):
                encoded = self.encoder.encode(row, reserve=self._reserve(row, encoded))
                self._check_names(row, encoded)
            num_tokens += encoded.num_cut * stands_for
            num_cut += stands_for if encoded.num_cut else 0
        self.encoder.num_cut = num_cut
        if num_cut:
            self._warned_of_cut = True
            logger.warning(
                "%s%d of %d rows of %s are longer than max_length=%d and lose %d tokens, %s.",
                about,
                num_cut,
                len(rows),
                name,
                self.encoder.max_length,
                num_tokens,
                self._where_cut(),
            )
        return num_cut

    def _warn_of_row(self, encoded: Encoded, further_ones: str) -> None:
        """Warn of a row that is cut, and say what becomes of further ones."""
        logger.warning(
            "a row is longer than max_length=%d and loses %d tokens, %s; further ones %s.",
            self.encoder.max_length,
            encoded.num_cut,
            self._where_cut(),
            further_ones,
        )

    def _check_names(self, row: Mapping[str, Any], encoded: Encoded) -> None:
        """Raise if a forget row loses a name altogether by being shortened."""
        if not self.names or not encoded.num_cut:
            return
        finder, whole = NameFinder(self.names), self.encoder.with_max_length(sys.maxsize).encode(row)
        before, after = (finder.find(str(self.tokenizer.decode(one.prompt_ids))) for one in (whole, encoded))
        if lost := sorted(before - after):
            which = f"the forget row with row_id={row['row_id']}" if "row_id" in row else "a forget row"
            raise ValueError(
                f"{which} loses the name {lost[0]!r} to max_length={self.encoder.max_length}, and with it what is to "
                f"be forgotten: {shortened(repr(prompt_of(row)))}. Raise max_length, name the column whose text may "
                "be cut (text_field), or shorten the text around the name yourself."
            )

    def _where_cut(self) -> str:
        """The end of long rows that loses tokens, and what to do about it."""
        if self.encoder.text_field is not None:
            return f"first from the end of column {self.encoder.text_field!r}. Raise max_length if there is room"
        return (
            "from the start of their prompts. Raise max_length, or name the column whose text may be cut: "
            "ForgetRetainCollator(..., text_field=...) or --text-field"
        )

    def _reserve(self, row: Mapping[str, Any], own: Encoded) -> int:
        """Tokens of the longest completion that a forget row can get, so that every draw has the same prompt."""
        return max(len(ids) for ids in [own.completion_ids, *self._choice_ids(row)])

    def _check_completion(self, row: Mapping[str, Any], completion_ids: list[int]) -> None:
        """Raise if the row's own completion is a generic one."""
        if "completion" in row:
            text = completion_text(row["completion"])
        else:
            text = str(self.tokenizer.decode(completion_ids, skip_special_tokens=True))
        check_not_generic([text], self.generic_completions)

    def _draw(self, row: Mapping[str, Any], num: int) -> int:
        """Which of the `num` completions this draw of the row takes."""
        name = f"id{row['row_id']}" if "row_id" in row else hashlib.sha256(repr(prompt_of(row)).encode()).hexdigest()
        key = f"{self.seed}/{name}"
        if self.resample:
            epoch, start = self._epoch.tolist()
            worker = torch.utils.data.get_worker_info()
            if epoch < 0 and worker is not None:
                # Workers restart in every epoch and remember no draws, but have another seed at each start. It differs
                # between workers, too: a row may come to another persistent worker in the next pass.
                epoch = worker.seed
            if (epoch, start) != self._draws_epoch:
                self._draws.clear()
                self._draws_epoch = (epoch, start)
            copy = f"{name}/{row.get('copy', 0)}"  # numbered by a sampler that repeats rows within an epoch
            key = f"{self.seed}/{copy}/{epoch}/{self._draws[copy]}"
            self._draws[copy] += 1
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return number % num


def checked_collator(collator: Any, name: str = "collator") -> ForgetRetainCollator:
    """The collator, given as the argument `name`.

    Raises:
        TypeError: if it is no `ForgetRetainCollator`.
    """
    if not isinstance(collator, ForgetRetainCollator):
        raise TypeError(
            f"{name} is a {type(collator).__name__}; expected a ForgetRetainCollator, such as "
            "ForgetRetainCollator(tokenizer, generic_completions)."
        )
    return collator

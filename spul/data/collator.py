"""Rows to a batch: generic responses drawn, over-long rows shortened, padded on the right."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .encoder import Encoded, RowEncoder


class ForgetRetainCollator:
    """Collates forget and retain rows into one right-padded batch.

    A forget row's completion is replaced by one drawn uniformly from `generic_completions`. The draw depends on the
    seed, the row and how often it was drawn, and on nothing else: batch mates, workers and processes do not change it.

    Args:
        tokenizer: any tokenizer of transformers; it needs no pad token and is not changed.
        generic_completions: what forget rows are to be answered with, such as `[" neutral", " unknown"]`; mind the
            leading space that completions of your data have. None keeps each forget row's own completion, as gradient
            ascent needs.
        max_length: the most tokens a row may have, without virtual tokens. See `spul.data.RowEncoder` for what is cut.
        seed: seed of the draws.
        resample: draw afresh each time a row comes by; False draws once per row.
        text_field: name of a column whose text stands in the prompt and may be cut.
        append_eos: whether completions end with the end-of-sequence token.
        pad_to_multiple_of: pad the batch's width to a multiple of this.

    Raises:
        ValueError, TypeError: if `generic_completions` is a string, empty, or has empty or repeated entries.

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
    ) -> None:
        if isinstance(generic_completions, str):
            raise TypeError(f"generic_completions={generic_completions!r} is one string; pass a list of completions.")
        if generic_completions is not None:
            texts = [str(text) for text in generic_completions]
            if not texts or not all(plain(text) for text in texts) or len({plain(t) for t in texts}) < len(texts):
                raise ValueError(
                    f"generic_completions={texts!r}: expected one or more different, non-empty texts, or None to keep "
                    "each forget row's own completion."
                )
            generic_completions = texts
        self.tokenizer, self.generic_completions = tokenizer, generic_completions
        self.seed, self.resample = seed, resample
        self.encoder = RowEncoder(tokenizer, max_length, text_field, append_eos, pad_to_multiple_of)
        self._generic = {plain(text) for text in generic_completions or []}
        self._draws: Counter[str] = Counter()  # per row, since this epoch began
        self._draws_epoch = (-1, 0)
        # In shared memory, so that data loader workers that live on see a new epoch too. -1: nobody counts epochs.
        self._epoch = torch.tensor([-1, 0]).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch. `UnlearningTrainer` calls it; in a loop of your own it makes draws resumable."""
        self._epoch[0] = epoch
        self._epoch[1] += 1  # so that setting the same epoch again begins it anew

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows.

        Args:
            rows: `prompt`, `completion` (text or messages) and `is_forget`; or, tokenized, `input_ids`,
                `completion_mask` and `is_forget`. `row_id` if known.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, n) with -100 outside the completion, `is_forget` (B,) bool, and
            `row_id` (B,) if all rows have one.

        Raises:
            ValueError: if a row lacks what is needed, or its completion is one of the generic ones.
        """
        if isinstance(rows, Mapping):
            raise TypeError(
                "rows is one mapping of columns, as a slice of a Dataset gives it; pass a list of rows: "
                "[dataset[i] for i in range(8)]."
            )
        if not rows:
            raise ValueError("there are no rows to collate.")
        if missing := [sorted(row) for row in rows if "is_forget" not in row]:
            raise ValueError(
                f"{len(missing)} of {len(rows)} rows have no is_forget, only {missing[0]}. Make the data set with "
                "forget_retain_dataset; if it had the column and a Trainer pruned it, set "
                "TrainingArguments(remove_unused_columns=False)."
            )
        encoded = []
        for row in rows:
            own = self.encoder.encode(row)
            self._check_completion(row, own.completion_ids)
            if row["is_forget"] and self.generic_completions is not None:
                draw = self._draw(row)
                generic = row["generic_ids"][draw] if row.get("generic_ids") is not None else None
                reserve = self._reserve(row, own)
                text = self.generic_completions[draw] if generic is None else [int(i) for i in generic]
                encoded.append(self.encoder.encode(row, text, reserve))
            else:
                encoded.append(own)
        return self.encoder.pad(rows, encoded)

    def tokenize(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as token ids, for `dataset.map(collator.tokenize)`: `input_ids` and `completion_mask`.

        Cuts over-long rows now rather than in every epoch, and makes length grouping possible.
        """
        encoded = self.encoder.encode(row)
        if "input_ids" not in row and self.generic_completions is not None and row.get("is_forget"):
            encoded = self.encoder.encode(row, reserve=self._reserve(row, encoded))
        mask = [0] * len(encoded.prompt_ids) + [1] * len(encoded.completion_ids)
        kept = {name: row[name] for name in ("is_forget", "row_id") if name in row}
        if "input_ids" not in row and not isinstance(row["completion"], str) and self.generic_completions is not None:
            # A chat template ends answers in its own way, which a tokenized row no longer tells.
            texts = self.generic_completions if row.get("is_forget") else []
            kept["generic_ids"] = [self.encoder.encode(row, text).completion_ids for text in texts]
        return {"input_ids": encoded.prompt_ids + encoded.completion_ids, "completion_mask": mask, **kept}

    def _reserve(self, row: Mapping[str, Any], own: Encoded) -> int:
        """Room for the longest completion that a forget row may get, so that every draw sees the same prompt."""
        if row.get("generic_ids") is not None:
            generic = [len(ids) for ids in row["generic_ids"]]
        elif "input_ids" in row or isinstance(row["completion"], str):
            generic = [len(self.encoder.completion_ids(text)) for text in self.generic_completions or []]
        else:
            generic = [len(self.encoder.encode(row, text).completion_ids) for text in self.generic_completions or []]
        return max([len(own.completion_ids), *generic])

    def _check_completion(self, row: Mapping[str, Any], completion_ids: list[int]) -> None:
        """A label that is generic as well would be asked for and forbidden at once."""
        if "completion" in row:
            text = completion_text(row["completion"])
        else:
            text = str(self.tokenizer.decode(completion_ids, skip_special_tokens=True))
        if plain(text) in self._generic:
            raise ValueError(
                f"the completion {text!r} of a row is one of generic_completions={self.generic_completions!r}: a "
                "forget row would be trained to its own label. Choose generic completions that no row "
                "has as its label."
            )

    def _draw(self, row: Mapping[str, Any]) -> int:
        """The number of the generic completion of this draw of this row."""
        assert self.generic_completions is not None
        name = f"id{row['row_id']}" if "row_id" in row else hashlib.sha256(repr(_prompt_of(row)).encode()).hexdigest()
        key = f"{self.seed}/{name}"
        if self.resample:
            epoch, beginning = self._epoch.tolist()
            worker = torch.utils.data.get_worker_info()
            if epoch < 0 and worker is not None:
                # Workers start anew in every epoch and remember no draws; torch gives each start another seed.
                # Per worker: with persistent workers a row may come to the other one in the next pass.
                epoch = worker.seed
            if (epoch, beginning) != self._draws_epoch:
                self._draws.clear()
                self._draws_epoch = (epoch, beginning)
            copy = f"{name}/{row.get('copy', 0)}"  # a sampler that repeats rows within an epoch numbers the copies
            key = f"{self.seed}/{copy}/{epoch}/{self._draws[copy]}"
            self._draws[copy] += 1
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return number % len(self.generic_completions)


def completion_text(completion: Any) -> str:
    """A completion as text: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def plain(text: str) -> str:
    """A completion as it is compared with others: letter case and outer space do not count."""
    return text.strip().casefold()


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """What identifies a row that has no row_id."""
    if "prompt" in row:
        return row["prompt"]
    return [
        token
        for token, is_completion in zip(row["input_ids"], row["completion_mask"], strict=True)
        if not is_completion
    ]

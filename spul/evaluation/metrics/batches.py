"""One pass of a model over the response tokens of rows, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.batching import by_length
from ...data.encoded import Encoded
from ...data.encoder import RowEncoder
from ...data.rows import ROWS_READ_AT_ONCE, adapter_names_of, rows_at
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX
from ...models.causal_lm import evaluation_mode
from ...models.compat_devices import device_of
from ...models.unlearner import unlearner_of

T = TypeVar("T")


class ResponseBatch(NamedTuple):
    """Right-padded rows, and the positions at which their response tokens are predicted.

    Attributes:
        indices: of the rows in their data set, (B,).
        inputs: `input_ids`, `attention_mask` and `labels`, (B, n).
        positions: (B, K), see `response_positions`.
        targets: (B, K), -100 in unused slots.
        adapter_names: names of the rows' prompts, (B,); None where they have none of their own.
    """

    indices: list[int]
    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    adapter_names: list[str] | None = None

    def num_tokens(self, row: int) -> int:
        """Number of response tokens of a row of this batch: they fill its first slots."""
        return int(self.targets[row].ne(IGNORE_INDEX).sum())


def length_batches(
    rows: Any, encode: Callable[[Any], Encoded], batch_size: int, progress: str | None = None
) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first: a batch that does not fit fails early.

    Rows are encoded for their lengths alone, and once more when their batch is made: of many rows, those of one batch
    are in memory.

    Args:
        rows: a data set, or a list of rows.
        encode: from a row to its tokens.
        batch_size: rows per batch.
        progress: label of a progress bar; None shows none.
    """
    lengths = []
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        some = rows_at(rows, range(start, min(start + ROWS_READ_AT_ONCE, len(rows))))
        lengths += [len(encode(row)) for row in some]
    yield from tqdm(list(by_length(lengths, batch_size)), desc=progress, disable=progress is None, leave=False)


def response_batches(
    rows: Dataset, encoder: RowEncoder, batch_size: int, device: torch.device, progress: str | None = None
) -> Iterator[ResponseBatch]:
    """Batches of rows with their own completions, on a device, without what a chat template puts after them."""

    def encode(row: Any) -> Encoded:
        return encoder.encode(row).without_ending()

    for indices in length_batches(rows, encode, batch_size, progress):
        some = rows_at(rows, indices)
        batch = encoder.pad(some, [encode(row) for row in some])
        batch = {name: value.to(device) for name, value in batch.items()}
        yield ResponseBatch(indices, batch, *response_positions(batch["labels"]), adapter_names_of(some))


def map_responses(
    model: nn.Module,
    rows: Dataset,
    encoder: RowEncoder,
    measure: Callable[[ResponseBatch], Iterable[T]],
    batch_size: int = 32,
    progress: str | None = None,
) -> list[T]:
    """Apply a function to every batch of rows, the model in evaluation mode.

    Args:
        model: batches are moved to its device.
        rows: `prompt` and `completion`, or tokenized.
        encoder: turns rows into token ids.
        measure: maps a batch to one value per row.
        batch_size: rows per batch.
        progress: label of a progress bar; None shows none.

    Returns:
        The values, in the order of `rows`.
    """
    found: dict[int, T] = {}
    device = device_of(model)
    with evaluation_mode(model), unlearner_of(model).cached_prompts():
        for batch in response_batches(rows, encoder, batch_size, device, progress):
            found |= zip(batch.indices, measure(batch), strict=True)
    return [found[i] for i in range(len(rows))]

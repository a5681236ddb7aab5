"""One pass of a model over the response tokens of rows, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.batching import by_length
from ...data.encoded import Encoded
from ...data.encoder import RowEncoder
from ...data.rows import adapter_names_of
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX
from ...models.causal_lm import evaluation_mode
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


def length_batches(encoded: Sequence[Encoded], batch_size: int, progress: str | None = None) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first: a batch that does not fit fails early."""
    batches = list(by_length([len(one) for one in encoded], batch_size))
    yield from tqdm(batches, desc=progress, disable=progress is None, leave=False)


def response_batches(
    rows: Dataset, encoder: RowEncoder, batch_size: int, device: torch.device, progress: str | None = None
) -> Iterator[ResponseBatch]:
    """Batches of rows with their own completions, on a device, without what a chat template puts after them."""
    given = list(rows)
    encoded = [encoder.encode(row).without_ending() for row in given]
    for indices in length_batches(encoded, batch_size, progress):
        some = [given[i] for i in indices]
        batch = encoder.pad(some, [encoded[i] for i in indices])
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
    device = next(model.parameters()).device
    with evaluation_mode(model), unlearner_of(model).cached_prompts():
        for batch in response_batches(rows, encoder, batch_size, device, progress):
            found |= zip(batch.indices, measure(batch), strict=True)
    return [found[i] for i in range(len(rows))]

"""One pass of a model over the response tokens of rows, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.batching import by_length
from ...data.encoded import Encoded
from ...data.encoder import RowEncoder
from ...data.rows import ROWS_READ_AT_ONCE, adapter_names_of, rows_at
from ...losses.positions import response_positions
from ...losses.terms import IGNORE_INDEX
from ...models.causal_lm import bare_model, cache_switch, evaluation_mode
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
    model: nn.Module,
    rows: Any,
    encode: Callable[[Any], Encoded],
    batch_size: int,
    multiple: int | None = None,
    progress: str | None = None,
) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first: a batch that does not fit fails early.

    Rows are encoded for their lengths alone, and once more when their batch is made: of many rows, those of one batch
    are in memory. With longrope a batch has rows on one side of the switch to the long factors, since its longest row
    decides on those of all.

    Args:
        model: that is run on the batches.
        rows: a data set, or a list of rows.
        encode: from a row to its tokens.
        batch_size: rows per batch.
        multiple: `pad_to_multiple_of` of the encoder.
        progress: label of a progress bar; None shows none.
    """
    lengths = []
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        some = rows_at(rows, range(start, min(start + ROWS_READ_AT_ONCE, len(rows))))
        lengths += [len(encode(row)) for row in some]
    switches, multiple = _switches(model), multiple or 1
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        width = -(-length // multiple) * multiple
        groups.setdefault(sum(width > switch for switch in switches), []).append(i)
    batches = [
        [group[i] for i in some]
        for _, group in sorted(groups.items(), reverse=True)
        for some in by_length([lengths[i] for i in group], batch_size)
    ]
    yield from tqdm(batches, desc=progress, disable=progress is None, leave=False)


def _switches(model: nn.Module) -> set[int]:
    """Numbers of tokens beyond which a base computes a row by other rotary factors, without and behind the prompt."""
    base = bare_model(model)
    if getattr(base, "config", None) is None:  # a module that is called as a causal LM is, and no more
        return set()
    switch, changes = cache_switch(base)
    return {switch, switch - unlearner_of(model).virtual_tokens_in_use} if changes and switch is not None else set()


def response_batches(
    model: nn.Module, rows: Dataset, encoder: RowEncoder, batch_size: int, progress: str | None = None
) -> Iterator[ResponseBatch]:
    """Batches of rows with their own completions, on a model's device, without what a chat template adds to them."""
    device = device_of(model)

    def encode(row: Any) -> Encoded:
        return encoder.encode(row).without_ending()

    for indices in length_batches(model, rows, encode, batch_size, encoder.pad_to_multiple_of, progress):
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
    with evaluation_mode(model), unlearner_of(model).cached_prompts():
        for batch in response_batches(model, rows, encoder, batch_size, progress):
            found |= zip(batch.indices, measure(batch), strict=True)
    return [found[i] for i in range(len(rows))]

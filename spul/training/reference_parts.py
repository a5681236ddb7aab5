"""Parts of a reference: its rows, longest first, computed part by part, in whichever process, and read by all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collator import ForgetRetainCollator
from ..data.rows import rows_at
from ..losses.positions import response_positions, token_positions
from ..losses.terms import IGNORE_INDEX
from ..models.causal_lm import cache_switch, states_at
from ..models.compat import broadcast, is_sharded
from ..models.compat_devices import device_of
from ..models.output_head import final_states
from .reference_files import read_part, write_part

MAX_PARTS, MIN_ROWS_PER_PART = 256, 256


class ReferenceRows(NamedTuple):
    """The rows that are compared with the base, (rows,) each; a row has an entry for each of its encodings.

    Attributes:
        ids: their `row_id`.
        indices: their places in the data set.
        checksums: as of `row_checksums`.
        counts: numbers of tokens whose states are stored.
        numbers: which of a row's encodings each is.
        lengths: numbers of tokens.
    """

    ids: Tensor
    indices: Tensor
    checksums: Tensor
    counts: Tensor
    numbers: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class ReferenceParts:
    """The files of a reference, computed where they are missing.

    Args:
        folder: where they are.
        rows: the rows, which are divided among the files in their order.
        base: the causal LM, without its adapter.
        layer: number of the decoder layer whose states are stored; None for final ones at responses.
        dtype: of what is stored; None stores states as they are.
        dataset: the data set that `rows` are of.
        collator: the collator of the training.
        batch_size: rows per forward pass.
    """

    folder: Path
    rows: ReferenceRows
    base: Any
    layer: int | None
    dtype: torch.dtype | None
    dataset: Any
    collator: ForgetRetainCollator
    batch_size: int

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """The rows of each part, as indices of `rows`."""
        num = len(self.rows.ids)
        return torch.arange(num).split(rows_per_part(num))

    @cached_property
    def num_beyond(self) -> int:
        """Number of rows, the first ones, so long, padding included, that the base computes them otherwise."""
        switch, changes = cache_switch(self.base)
        multiple = self.collator.encoder.pad_to_multiple_of or 1
        widths = self.rows.lengths.add(multiple - 1).floor_divide(multiple) * multiple
        return int((widths > switch).sum()) if changes and switch is not None else 0

    @cached_property
    def files(self) -> list[Path]:
        """The file of each part."""
        return [self.folder / f"part-{i:05d}.safetensors" for i in range(len(self.parts))]

    @property
    def are_there(self) -> bool:
        """Whether no file is missing."""
        return all(file.exists() for file in self.files)

    def batch(self, some: Tensor) -> dict[str, Tensor]:
        """The batch of some of the rows."""
        found = rows_at(self.dataset, self.rows.indices[some].tolist())
        each = zip(found, self.rows.numbers[some].tolist(), strict=True)
        return self.collator.encoder.pad(found, [self.collator.every(row, number)[0] for row, number in each])

    def opened(self, accelerator: Accelerator | None, progress: bool) -> list[Tensor]:
        """The states of each part, memory-mapped; what is missing is computed first, by all processes together.

        Raises:
            OSError: if the folder does not keep what is written to it.
        """
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        own: dict[int, Tensor | None] = {}  # each part is read once, since its checksum reads all of it
        together = is_sharded(self.base)
        if together:
            self._compute_together(rank, world, progress)
        else:
            for i in tqdm(range(rank, len(self.parts), world), "reference", disable=not progress, leave=False):
                if (there := self._read(i)) is None:
                    self._compute(i, progress)
                own[i] = there if there is not None else self._read(i)  # memory-mapped, in place of those in memory
        if accelerator is not None:
            accelerator.wait_for_everyone()
        states = []
        for i, file in enumerate(self.files):
            found = own[i] if i in own else self._read(i)
            if found is None and i not in own and not together:  # another process's, damaged or not seen yet
                self._compute(i, progress)
                found = self._read(i)
            if found is None:
                raise OSError(f"{file} is not what was just written to it; name another folder (reference_dir).")
            states.append(found)
        return states

    def _read(self, i: int) -> Tensor | None:
        part = self.parts[i]
        return read_part(self.files[i], self.rows.checksums[part], int(self.rows.counts[part].sum()))

    def _batches(self, i: int) -> list[Tensor]:
        # With longrope the longest row of a batch decides on the rotary factors of all, which are to be those of each
        # row alone.
        part = self.parts[i]
        sides = (part[part < self.num_beyond], part[part >= self.num_beyond])  # longest first
        return [some for side in sides if len(side) for some in side.split(self.batch_size)]

    def _compute(self, i: int, progress: bool, num_batches: int = 0, writes: bool = True) -> None:
        """Compute and write a part, by at least as many forwards, the last one repeated."""
        file, batches, computed = self.files[i], self._batches(i), []
        for some in tqdm(batches, file.stem, disable=not progress, leave=False):
            found = states_of(self.base, self.batch(some), self.layer)
            computed.append(found.to(self.dtype or found.dtype).cpu())
        for _ in range(num_batches - len(batches)):
            states_of(self.base, self.batch(batches[-1]), self.layer)
        if writes:
            write_part(file, torch.cat(computed), self.rows.checksums[self.parts[i]])

    def _compute_together(self, rank: int, world: int, progress: bool) -> None:
        """Compute missing parts of a sharded base, whose processes run each forward together.

        They take a part each, or go along with the last one.
        """
        missing = broadcast([] if rank else [i for i in range(len(self.parts)) if self._read(i) is None])
        for turn in (missing[i : i + world] for i in range(0, len(missing), world)):
            most = max(len(self._batches(i)) for i in turn)
            self._compute(turn[min(rank, len(turn) - 1)], progress, most, writes=rank < len(turn))


def rows_per_part(num_rows: int) -> int:
    """Number of rows of a part of a reference."""
    return max(MIN_ROWS_PER_PART, -(-num_rows // MAX_PARTS))


def slots_of(batch: Mapping[str, Tensor], layer: int | None) -> tuple[Tensor, Tensor]:
    """Positions and tokens (B, K) that a loss reads, -100 in unused slots: the response's, or all for states."""
    if layer is None:
        return response_positions(batch["labels"])
    return token_positions(batch["input_ids"], batch["attention_mask"])


@torch.no_grad()
def states_of(base: Any, batch: Mapping[str, Tensor], layer: int | None) -> Tensor:
    """Hidden states (slots, d) of a batch, row after row: final ones at responses, or a layer's at all tokens."""
    positions, targets = slots_of(batch, layer)
    inputs = {name: batch[name].to(device_of(base)) for name in ("input_ids", "attention_mask")}
    positions = positions.to(device_of(base))
    if layer is None:
        return final_states(base, positions, **inputs)[targets != IGNORE_INDEX]
    return states_at(base, layer, positions, **inputs, use_cache=False)[targets != IGNORE_INDEX]

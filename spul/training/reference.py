"""Reference logits of the rows that are compared with the base model, cached on disk and looked up by `row_id`.

They do not change while a prompt trains; for LoRA or the full model they are those of the model before training. The
cache holds the final hidden state at each response token: d values, where the logits have as many as the vocabulary.
The LM head is applied when a row is used. For a loss that reads hidden states it holds those of its layer, at all
tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.checks import forget_flags
from ..data.collator import ForgetRetainCollator
from ..data.rows import rows_at
from ..losses.terms import IGNORE_INDEX
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import bare_model, logits_at
from ..models.compat import is_sharded
from ..models.compat_devices import device_of
from ..models.output_head import NoHead, OutputHead
from ..models.unlearner import detached_base
from ..records.digests import digest
from .reference_files import claim_folder, describe
from .reference_parts import ReferenceParts, ReferenceRows, rows_per_part, slots_of, states_of

ROWS_READ_AT_ONCE, ROWS_CHECKED = 256, 6
REMEDY = (
    "the reference is looked up by row_id, a different whole number for each row. Make the data set with "
    "forget_retain_dataset, or add_column('row_id', range(len(dataset))); or use reference='live'."
)


class ReferenceCache:
    """The base model's final hidden states at the response tokens of a data set; see `build`.

    Example:
        ```python
        reference = ReferenceCache.build(unlearner, dataset, collator)
        for batch in loader:
            loss = unlearner(**batch, reference_logits=reference.logits(batch)).loss
        ```
    """

    def __init__(
        self,
        loss: UnlearningLoss,
        head: OutputHead | NoHead,
        folder: Path,
        rows: ReferenceRows,
        parts: Sequence[Tensor],
    ) -> None:
        self.loss, self.head, self.folder, self._parts = loss, head, folder, parts
        ids = self._ids = rows.ids
        self._checksums, self._counts = rows.checksums, rows.counts
        self._keys, self._slots = _keys(ids, self._checksums).sort()
        self._rows_per_part = rows_per_part(len(ids))
        starts = self._counts.cumsum(0) - self._counts
        self._starts = starts - starts[torch.arange(len(ids)) // self._rows_per_part * self._rows_per_part]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        collator: ForgetRetainCollator,
        folder: str | os.PathLike | None = None,
        batch_size: int = 32,
        accelerator: Accelerator | None = None,
        progress: bool = True,
        loss: UnlearningLoss | None = None,
    ) -> ReferenceCache:
        """Open the cache of a data set's rows under a model without its prompt or adapter; compute what is missing.

        Only rows that the loss compares with the base model are cached: retain rows, and forget rows if the forget
        term compares, with every completion that the collator may draw for them (`resample=False` draws one).
        An interrupted computation resumes; later runs, and all processes of one, share the files. Each has a checksum:
        one that was changed or cut off is computed again, with a warning.

        Args:
            model: a `SoftPromptUnlearner`, a model under LoRA, or a causal LM before its first training step.
            dataset: the training rows, text or tokenized, with `is_forget` and `row_id` (`forget_retain_dataset`).
            collator: the collator of the training.
            folder: None (default) is one for each base and data set, in `spul/reference` under `HF_HOME`.
            batch_size: rows per forward pass.
            accelerator: divides the work among its processes, which must see the same folder. Each reads from it, by
                memory mapping, the rows that it needs.
            progress: whether to show a progress bar.
            loss: the objective, which decides which rows are compared; None takes the unlearner's own.

        Raises:
            OSError: if the folder does not keep what is written to it.
            ValueError: if `loss` is missing; if rows lack a `row_id` or share one; if `folder` holds the reference of
                another base or other data; if the base has changed in a way that its fingerprint does not show; or if
                this base, loss or data cannot have a cache.
        """
        base: Any = bare_model(model)
        loss = getattr(model, "loss", None) if loss is None else loss
        if not isinstance(loss, UnlearningLoss):
            raise ValueError(
                f"loss={loss!r}: a {type(model).__name__} has no loss of its own; pass loss=UnlearningLoss(...)."
            )
        rank = 0 if accelerator is None else accelerator.process_index
        progress = progress and rank == 0
        rows = _read_rows(loss, dataset, collator, progress)
        index = describe(base, rows.checksums, loss.reads_layer)
        path = Path(folder) if folder is not None else Path(HF_HOME, "spul", "reference", digest(index)[:32])
        claim_folder(path, index, accelerator)
        with detached_base(model):
            head = OutputHead(base) if loss.reads_layer is None else NoHead()
            parts = ReferenceParts(path, rows, base, loss.reads_layer, head.dtype, dataset, collator, batch_size)
            if progress:
                done = "read from" if parts.are_there else "computed once and stored in"
                what = "logits" if loss.reads_layer is None else "states"
                tqdm.write(f"Reference {what} of {len(rows.ids)} rows are {done} {path}", file=sys.stderr)
            reference = cls(loss, head, path, rows, parts.opened(accelerator, progress))
            spread = torch.linspace(0, len(reference) - 1, min(ROWS_CHECKED, len(reference))).round().long()
            for one in spread.split(1):  # one by one, since the longest is among them
                reference._check_base(base, parts.batch(one), batch_size)
        return reference

    def __repr__(self) -> str:
        num_bytes = sum(part.nbytes for part in self._parts)
        return f"ReferenceCache({len(self)} rows, {num_bytes / 1e6:.1f} MB, {str(self.folder)!r})"

    def __len__(self) -> int:
        """The number of rows that are compared."""
        return len(self._ids)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Reference logits at the response tokens of a batch.

        Args:
            batch: as `ForgetRetainCollator` returns it, with `row_id`, on any device.

        Returns:
            (R, K, V), the `reference_logits` of the unlearner's forward: the R rows whose loss compares, in their
            order. None if there are none.

        Raises:
            ValueError: if a row is not, token for token, the row of this `row_id` that the cache was built from.
        """
        needed = self.loss.rows_needing_reference(batch["is_forget"].bool())
        if not needed.any():
            return None
        if "row_id" not in batch:
            raise ValueError(f"the batch has no row_id, only {sorted(batch)}; {REMEDY}")
        ids, checksums = batch["row_id"][needed].cpu(), row_checksums(batch)[needed].cpu()
        slots = self._slots[torch.searchsorted(self._keys, _keys(ids, checksums)).clamp(max=len(self) - 1)]
        if wrong := ids[(self._ids[slots] != ids) | (self._checksums[slots] != checksums)].tolist():
            raise ValueError(
                f"{len(wrong)} of {len(ids)} rows of the batch are not, token for token, among the {len(self)} that "
                f"the reference was computed for (row_id {wrong[0]} is the first): the data changed, or are collated "
                "otherwise. Build the reference with the data set and the collator of the training, or use "
                "reference='live'."
            )
        counts = self._counts[slots]
        spans = torch.stack([slots // self._rows_per_part, self._starts[slots], counts], dim=1).tolist()
        width = slots_of(batch, self.loss.reads_layer)[1].shape[1]  # also of rows that need no reference
        used = torch.arange(width) < counts[:, None]
        states = self._parts[0].new_zeros(len(ids), width, self._parts[0].shape[1])
        states[used] = torch.cat([self._parts[part][start : start + count] for part, start, count in spans])
        return self.head(states).to(batch["labels"].device)

    @torch.no_grad()
    def _check_base(self, base: Any, batch: Mapping[str, Tensor], batch_size: int) -> None:
        """Compute rows anew: a fingerprint sees samples of the weights, this sees the whole model at work."""
        layer = self.loss.reads_layer
        positions, targets = slots_of(batch, layer)
        used, states = targets != IGNORE_INDEX, states_of(base, batch, layer)
        expected = states
        if layer is None:
            inputs = {name: batch[name].to(device_of(base)) for name in ("input_ids", "attention_mask")}
            expected = logits_at(base, positions.to(device_of(base)), **inputs, use_cache=False)[used]
        half = expected.dtype in (torch.float16, torch.bfloat16)
        rounding = 2 * torch.finfo(expected.dtype).eps if half else 1e-4
        if not _is_close(self.head(states), expected, rounding):
            raise ValueError(
                f"{type(base).__name__} does more between its output embeddings and its logits than the scaling and "
                "soft-capping known here, so that its hidden states do not give its logits; use reference='live'."
            )
        cached: Any = self.logits(batch)
        tolerance = 0.05 if half else 1e-3
        if is_sharded(base) or not _is_close(cached[used], expected, tolerance):  # processes of one go together
            copies = max(2, min(8, batch_size))  # no more memory than the cache itself took
            tolerance += 4 * _rounding(states, base, batch, layer, copies)  # the cache is of another batch
        if not _is_close(cached[used], expected, tolerance):
            raise ValueError(
                f"the reference in {str(self.folder)!r} differs from the logits of this base, which has changed in a "
                "way that its fingerprint does not show. Delete the folder, name another, or use reference='live'."
            )


def row_checksums(batch: Mapping[str, Tensor]) -> Tensor:
    """A 64-bit checksum of each row's tokens, in their order, and of which are the response's: (B,) int64.

    Padding does not count. Rows that differ in one token never share it, others with a probability of about 2^-64.
    """
    mask = batch["attention_mask"] != 0
    tokens = batch["input_ids"].long() * 2 + (batch["labels"] != IGNORE_INDEX)
    mixed = tokens + (mask.long().cumsum(dim=1) << 32)
    # splitmix64's finalizer, which is one to one: its constants as signed numbers, its shifts without the sign.
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    mixed = mixed ^ (mixed >> 31 & (1 << 33) - 1)
    return mixed.masked_fill(~mask, 0).sum(dim=1)  # integers wrap


def _read_rows(loss: UnlearningLoss, dataset: Any, collator: ForgetRetainCollator, progress: bool) -> ReferenceRows:
    """The rows that are compared, longest first."""
    flags = torch.tensor(forget_flags(dataset), dtype=torch.bool)
    compared = loss.rows_needing_reference(flags).nonzero().flatten()
    if not len(compared):
        raise ValueError(
            "the loss compares no row with the model before training, or no retain row is there to be compared: no "
            "reference is needed. Leave reference_logits out."
        )
    found = []
    for some in tqdm(compared.split(ROWS_READ_AT_ONCE), "reading rows", disable=not progress, leave=False):
        rows = rows_at(dataset, some.tolist())
        each = [collator.every(row) for row in rows]
        numbers = torch.tensor([n for encoded in each for n in range(len(encoded))])
        indices = some.repeat_interleave(torch.tensor(list(map(len, each))))
        repeated_rows = [row for row, encoded in zip(rows, each, strict=True) for _ in encoded]
        batch = collator.encoder.pad(repeated_rows, [one for encoded in each for one in encoded])
        if "row_id" not in batch:
            raise ValueError(f"the rows have no row_id; {REMEDY}")
        counts = (slots_of(batch, loss.reads_layer)[1] != IGNORE_INDEX).sum(dim=1)
        lengths = batch["attention_mask"].sum(dim=1)
        found.append(torch.stack([lengths, batch["row_id"], indices, row_checksums(batch), counts, numbers]))
    lengths, *columns = torch.cat(found, dim=1)
    ids, times = columns[0][columns[4] == 0].unique(return_counts=True)
    if repeated := ids[times > 1].tolist():
        raise ValueError(f"{len(repeated)} row_id(s), such as {repeated[0]}, stand at more than one row; {REMEDY}")
    order = np.lexsort((columns[2], -lengths))  # by content: the numbering of the rows changes no file
    return ReferenceRows(*(column[order] for column in (*columns, lengths)))


def _keys(ids: Tensor, checksums: Tensor) -> Tensor:
    """One number for a row and its content, (rows,): several completions of a row have an entry each."""
    return ids * 0x5851F42D4C957F2D + checksums  # wraps


def _rounding(states: Tensor, base: Any, batch: Mapping[str, Tensor], layer: int | None, copies: int) -> float:
    """The largest difference of a row's states from its own in a batch with padding, by the largest state.

    Kernels of another shape round otherwise. In TF32 and in 16 bit deep models make that large: in bfloat16 a third of
    the logits' spread in a random one of 32 layers.
    """
    several = {name: batch[name].repeat(copies, 1) for name in ("input_ids", "attention_mask", "labels")}
    several["attention_mask"][1:, -1] = 0  # not a column more, for which learned positions may have no room
    among, alone = states_of(base, several, layer)[: len(states)].double(), states.double()
    return float((among - alone).abs().max() / alone.abs().max().clamp(min=torch.finfo(alone.dtype).tiny))


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within a share of the largest value."""
    found, expected = found.double(), expected.double().to(found.device)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())

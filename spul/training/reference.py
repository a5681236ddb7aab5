"""What the frozen model says on the rows that are held to it, computed once and kept on disk.

While a prompt trains, the base's distributions do not change; where the whole model or LoRA learns, what is compared
with is the model as it was before. What is kept of a distribution is the final hidden state at each response token: d
numbers, where the distribution itself has as many as the vocabulary. The LM head, as it was, is applied when a row is
used.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.collator import ForgetRetainCollator
from ..losses.positions import response_positions
from ..losses.terms import IGNORE_INDEX
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import bare_model, logits_at
from ..models.output_head import OutputHead, final_states, is_close, reproduces_logits
from ..models.unlearner import detached_base
from ..records.digests import digest, fingerprint
from .reference_files import FORMAT, Part, check_index, claim_folder, part_path, read_part, write_part

MAX_PARTS, MIN_ROWS_PER_PART = 256, 256
ROWS_CHECKED = 6
# What a config says that does not change what the model computes, or that the index tells otherwise.
NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
NOT_COMPUTED |= {"bos_token_id", "eos_token_id", "pad_token_id"}


class ReferenceCache:
    """The frozen model's final hidden states at the response tokens of a data set; see `build`.

    Example:
        ```python
        reference = ReferenceCache.build(unlearner, dataset, collator)
        for batch in loader:
            loss = unlearner(**batch, reference_logits=reference.logits(batch)).loss
        ```
    """

    def __init__(self, loss: UnlearningLoss, head: OutputHead, parts: Sequence[Part], folder: Path) -> None:
        self.loss, self.head, self.folder, self._parts = loss, head, folder, parts
        rows = torch.cat([part.rows for part in parts])
        self._rows, order = rows.sort()
        part_of = torch.cat([torch.full_like(part.rows, i) for i, part in enumerate(parts)])
        starts = [torch.cat([part.ends.new_zeros(1), part.ends[:-1]]) for part in parts]
        self._spans = torch.stack([part_of, torch.cat(starts).long(), torch.cat([p.ends for p in parts]).long()])
        self._spans = self._spans[:, order]

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
        """Open the cache of a data set's rows under a model without its prompt or adapter, computing what is missing.

        Only rows whose loss compares with the frozen model are kept: retain rows, unless the forget term asks too.
        An interrupted computation goes on where it stopped; later runs, and all processes of one, share the files.

        Args:
            model: a `SoftPromptUnlearner`, a model under LoRA, or a causal LM that has not begun to unlearn yet.
            dataset: what is trained on: rows with `is_forget`, as text or tokenized.
            collator: the one that is trained with.
            folder: where to keep the files. Unless given: a folder of their own for each base and data set, in
                `spul/reference` beside the Hugging Face cache (`HF_HOME`).
            batch_size: rows per forward.
            accelerator: shares the work out over its processes, which must see the same folder.
            progress: whether to show a progress bar.
            loss: what is asked for, which says which rows are compared; an unlearner's own unless given.

        Raises:
            ValueError: if `loss` is missing; if `folder` holds the reference of another base or other data; if the
                base has changed in a way that its fingerprint does not show; or if this base, loss or data cannot
                have a cache.
        """
        base: Any = bare_model(model)
        loss = getattr(model, "loss", None) if loss is None else loss
        if not isinstance(loss, UnlearningLoss):
            raise ValueError(
                f"loss={loss!r}: a {type(model).__name__} has no loss of its own; pass loss=UnlearningLoss(...)."
            )
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        progress = progress and rank == 0
        rows = _rows_to_keep(loss, dataset, collator, progress)
        if not rows:
            raise ValueError("no row's loss compares with the frozen model (beta=0, or no retain rows).")
        index = _describe(base, rows)
        path = Path(folder) if folder is not None else Path(HF_HOME, "spul", "reference", digest(index)[:32])
        if rank == 0:
            claim_folder(path, index)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        check_index(path, index)  # also where the folder is not shared

        with detached_base(model):
            shares = _in_parts(rows)
            own = list(range(rank, len(shares), world))
            num_rows = sum(len(shares[i]) for i in own)
            missing = [i for i in own if read_part(part_path(path, i), [row.key for row in shares[i]]) is None]
            if progress:
                done = "is computed once and kept in" if missing else "is read from"
                tqdm.write(f"What the frozen model says on {len(rows)} rows {done} {path}", file=sys.stderr)
            bar = tqdm(total=num_rows, desc="reference", unit="row", disable=not (progress and missing), leave=False)
            head = OutputHead(base)
            for i in own:
                if i in missing:
                    part = _compute_part(base, head, dataset, collator, shares[i], batch_size)
                    write_part(part_path(path, i), part)
                bar.update(len(shares[i]))
            bar.close()
            if accelerator is not None:
                accelerator.wait_for_everyone()
            parts = [read_part(part_path(path, i), [row.key for row in share]) for i, share in enumerate(shares)]
            if unseen := [i for i, part in enumerate(parts) if part is None]:
                raise ValueError(
                    f"{len(unseen)} of {len(parts)} files that other processes wrote are not in {str(path)!r}; "
                    "pass a folder that all of them see, or reference='live'."
                )
            reference = cls(loss, head, [part for part in parts if part is not None], path)
            spread = np.linspace(0, len(rows) - 1, min(ROWS_CHECKED, len(rows))).round().astype(int)
            for i in sorted(set(spread.tolist())):  # one by one, since the longest is among them
                reference._check_base(base, collator.encoder.batch([dataset[rows[i].place]]))
        return reference

    @property
    def num_bytes(self) -> int:
        """Size of the files, without their headers."""
        return sum(tensor.nbytes for part in self._parts for tensor in part)

    def __len__(self) -> int:
        """The number of different rows."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ReferenceCache({len(self)} rows, {self.num_bytes / 1e6:.1f} MB, {str(self.folder)!r})"

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What the frozen model says at the response tokens of a batch.

        Args:
            batch: as `ForgetRetainCollator` gives it, on any device.

        Returns:
            (R, K, V), to pass to the unlearner's forward as `reference_logits`: the R rows whose loss asks, in their
            order. None if none does.

        Raises:
            ValueError: if a row is not, in its every token, one of the rows that the cache was built from.
        """
        needed = self.loss.rows_needing_reference(batch["is_forget"].bool())
        if not needed.any():
            return None
        states = self.states({name: batch[name][needed] for name in ("input_ids", "attention_mask", "labels")})
        width = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).max())  # as wide as the longest row's response
        states = torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[1]))
        return self.head(states).to(batch["labels"].device)

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The final hidden states at the response tokens of rows, on the CPU: (B, K, d), zeros in unused slots.

        Raises:
            ValueError: if a row is not one of those that the cache was built from.
        """
        keys = row_keys(batch)
        found = torch.searchsorted(self._rows, keys).clamp(max=len(self._rows) - 1)
        if missing := (self._rows[found] != keys).nonzero().flatten().tolist():
            raise ValueError(
                f"{len(missing)} of {len(keys)} rows of the batch are not among the {len(self)} that the reference "
                f"was computed for (place {missing[0]} is the first): the data changed, or are collated differently. "
                "Build the reference with the data set and the collator that are trained with, or use "
                "reference='live'."
            )
        spans = self._spans[:, found].T.tolist()
        width = max(end - start for _, start, end in spans)
        states = self._parts[0].states.new_zeros(len(spans), width, self._parts[0].states.shape[1])
        for b, (part, start, end) in enumerate(spans):
            states[b, : end - start] = self._parts[part].states[start:end]
        return states

    def _check_base(self, base: Any, batch: Mapping[str, Tensor]) -> None:
        """Compute a few rows anew: the head must turn states into the base's logits, and the kept states be its own.

        A fingerprint sees samples of the weights; this sees the whole model at work.
        """
        device = next(base.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        positions, _ = response_positions(batch["labels"])
        with torch.no_grad():
            expected = logits_at(base, positions, **inputs, use_cache=False)
            fresh = final_states(base, positions, **inputs)
        if not reproduces_logits(self.head, fresh, expected):
            raise ValueError(
                f"{type(base).__name__} does more between its output embeddings and its logits than the scaling and "
                "soft-capping known here, so that its hidden states do not give its logits; use reference='live'."
            )
        # Other batch mates, other rounding.
        tolerance = 0.05 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not is_close(self.head(self.states(batch)), expected, tolerance):
            raise ValueError(
                f"the reference in {str(self.folder)!r} is not what this base says: it has changed in a way that its "
                "fingerprint does not show. Delete the folder, name another, or use reference='live'."
            )


def row_keys(batch: Mapping[str, Tensor]) -> Tensor:
    """A 64-bit digest of each row's tokens and of how many of them are the response's: (B,) int64."""
    ids = batch["input_ids"].to("cpu", torch.int32).numpy()
    mask = batch["attention_mask"].cpu().numpy().astype(bool)
    num_response = (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist()
    return torch.tensor([_row_key(ids[b][mask[b]], num_response[b]) for b in range(len(ids))], dtype=torch.int64)


def _row_key(ids: np.ndarray, num_response: int) -> int:
    key = hashlib.blake2b(ids.tobytes(), digest_size=8, key=num_response.to_bytes(8, "little"))
    return int.from_bytes(key.digest(), "little", signed=True)


# ---- which rows, of which base ----


class _Row(NamedTuple):
    place: int  # in the data set
    key: int
    length: int


def _rows_to_keep(loss: UnlearningLoss, dataset: Any, collator: ForgetRetainCollator, progress: bool) -> list[_Row]:
    """The rows whose loss compares with the frozen model, longest first, each content once."""
    kept: dict[int, _Row] = {}
    asks = loss.rows_needing_reference(torch.tensor([False, True])).tolist()  # retain rows, forget rows
    for place, row in enumerate(tqdm(dataset, "reading rows", disable=not progress, leave=False)):
        if not asks[bool(row["is_forget"])]:
            continue
        if row["is_forget"] and collator.generic_completions is not None:
            raise ValueError(
                "the forget term compares with the frozen model on generic completions, which are drawn anew each "
                "time: there is no fixed reference to keep. Use reference='live'."
            )
        encoded = collator.encoder.encode(row)
        ids = np.asarray(encoded.prompt_ids + encoded.completion_ids, dtype=np.int32)
        key = _row_key(ids, len(encoded.completion_ids))
        kept[key] = _Row(place, key, len(ids))
    return sorted(kept.values(), key=lambda row: (-row.length, row.key))


def _describe(base: Any, rows: Sequence[_Row]) -> dict[str, Any]:
    """What a cache is a cache of."""
    weights = fingerprint(base)
    if weights is None:
        raise ValueError(
            "some weights of the base are not in memory (meta device or offloaded to disk), so that a reference "
            "cannot be told from another base's; use reference='live'."
        )
    device = next(base.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    said = {name: value for name, value in base.config.to_dict().items() if name not in NOT_COMPUTED}
    keys = hashlib.sha256(np.sort(np.asarray([row.key for row in rows], dtype=np.int64)).tobytes()).hexdigest()
    return {
        "format": FORMAT,
        "base": weights,
        "config": digest(said),
        "precision": f"{str(base.dtype).removeprefix('torch.')}, autocast {autocast}",
        "data": keys,
        "rows": len(rows),
    }


# ---- computing ----


def _in_parts(rows: Sequence[_Row]) -> list[Sequence[_Row]]:
    size = max(MIN_ROWS_PER_PART, -(-len(rows) // MAX_PARTS))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def _compute_part(
    base: Any, head: OutputHead, dataset: Any, collator: ForgetRetainCollator, rows: Sequence[_Row], batch_size: int
) -> Part:
    device = next(base.parameters()).device
    states, counts = [], []
    for start in range(0, len(rows), batch_size):
        batch = collator.encoder.batch([dataset[row.place] for row in rows[start : start + batch_size]])
        positions, targets = response_positions(batch["labels"])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        found = final_states(base, positions.to(device), **inputs)
        used = targets != IGNORE_INDEX
        states.append(found[used.to(found.device)].to(head.dtype or found.dtype).cpu())
        counts.append(used.sum(dim=1))
    keys = torch.tensor([row.key for row in rows], dtype=torch.int64)
    return Part(torch.cat(states), keys, torch.cat(counts).cumsum(0).to(torch.int32))

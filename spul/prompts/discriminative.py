"""A start of prefix tuning whose keys tell forget rows from the others before the first step.

Attention to a prompt is a linear gate: a query attends to a key as far as their product exceeds the log-sum-exp of its
products with the row's own keys. A prefix that begins at random first declines everybody a little, and learns late, on
some draws never, whom not to. Here the keys are fitted, by logistic regression on the queries of the frozen base, so
that a token of each forget row attends to the prompt and none of the other rows' does. The values begin as the mean of
what heads put out, which changes little; training then finds what to say, where it is already known to whom.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collator import ForgetRetainCollator
from ..data.rows import rows_at
from ..models.causal_lm import evaluation_mode, selects_positions
from ..models.compat_attention import Attention, observed_attention
from ..models.compat_cache import prefix_states
from ..models.compat_checkpointing import unswitched
from ..models.compat_devices import device_of
from .near import checked_flags
from .row_prompts import RowPrompts, under
from .states import PromptStates, in_front, packed_states

MOST_ROWS = 64  # of a batch
MOST_SCORES = 2**26  # products of queries and keys in memory, of a layer
STORED_NUMBERS = 2**29  # of queries: so many layers are fitted at once
# Of the fit, as it forgot fast on the quick start; with 60 steps of 0.1 it was slower, and stalled on a seed of three.
NUM_STEPS, ROWS_OF_STEP, RATE = 150, 64, 0.05
LENGTH = 4.0  # standard deviations of a product of a query with a fresh key
RETAIN_TOKENS, RETAIN_ROWS = 10.0, 2.0  # weights beside that of the forget rows, 1: rather too few than too many
WEIGHT_DECAY = 0.016  # of a key whose length is 1


@dataclass(frozen=True)
class DiscriminativeStart:
    """A start of prefix tuning, fitted to rows: its keys tell requests to forget from others.

    It takes a pass of the base over some rows of each side, or a few passes if their queries do not fit into memory,
    and one fit per layer. Nothing of the base changes. Sliding windows, sinks, capped scores, and layers that use the
    keys of another are not part of the fit: there the keys are a start all the same, attended to by more or less.

    Args:
        dataset: rows with `is_forget`, as they are trained on.
        collator: of the training, which encodes them.
        num_tokens: rows are drawn until each side has so many tokens; all of them are used where there are fewer.
        progress: whether to show a progress bar.

    Raises:
        TypeError: if the data set is no `datasets.Dataset`, the collator no `ForgetRetainCollator`, or `num_tokens` no
            integer.
        ValueError: if there are no forget rows, or no others, or `num_tokens` is below 1.
    """

    dataset: Dataset = field(repr=False)
    collator: ForgetRetainCollator = field(repr=False)
    num_tokens: int = 16_384
    progress: bool = True
    _flags: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flags = checked_flags(self.dataset, self.collator, num_tokens=self.num_tokens)
        for flag, name in ((True, "forget"), (False, "retain")):
            if flag not in flags:
                raise ValueError(
                    f"dataset has no {name} rows; expected some of both sides, which the keys tell apart."
                )
        object.__setattr__(self, "_flags", torch.tensor(flags))

    def encoded_rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts of drawn forget rows and of drawn other rows, without their responses."""
        sides: list[list[list[int]]] = []
        for side in (self._flags, ~self._flags):
            rows, found = side.nonzero().flatten(), 0
            sides.append([])
            for i in rows[torch.randperm(len(rows))].tolist():
                sides[-1].append(self.collator.encoder.encode(rows_at(self.dataset, [i])[0]).prompt_ids)
                found += len(sides[-1][-1])
                if found >= self.num_tokens:
                    break
        return sides[0], sides[1]

    @torch.no_grad()
    def keys_and_values(self, model: Any, adapter_name: str) -> Tensor:
        """Keys and values in the layout of PEFT, (p, layers * 2 * heads * width).

        Args:
            model: a prompt-learning PEFT model, whose prefix stands where it begins by default.
            adapter_name: the prefix.

        Raises:
            ValueError: if the base computes attention in code of its own, which shows no queries, rows leave no room
                for the prefix, or are of another tokenizer, or gradients are forbidden.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "keys are fitted by gradients, which inference_mode forbids; build the prompt outside it."
            )
        config, view = model.peft_config[adapter_name], under(model, adapter_name)
        reader = _Queries(view, *self.encoded_rows())
        shape = (config.num_virtual_tokens, 2 * config.num_layers, config.num_attention_heads, -1)
        packed = packed_states(reader.states.layers, config).view(shape)
        with tqdm(total=len(reader.states.layers), desc="fitting keys", disable=not self.progress) as bar:
            for layer, forget, retain, mean in reader.layers():
                keys = fit_keys(forget, retain, len(mean), config.num_virtual_tokens)
                own, width = mean.shape
                packed[:, 2 * layer, :own, :width] = keys.transpose(0, 1)
                packed[:, 2 * layer + 1, :own, :width] = mean
                bar.update(layer + 1 - bar.n)
        return packed.flatten(1)


class Side(NamedTuple):
    """Queries of the rows of a side in a layer.

    Attributes:
        queries: (T, heads, width), scaled.
        own: log-sum-exp of each query's products with the row's own keys, (T, heads).
        row: index of each query's row, (T,).
    """

    queries: Tensor
    own: Tensor
    row: Tensor


@torch.enable_grad()
def fit_keys(forget: Side, retain: Side, num_heads: int, num_keys: int) -> Tensor:
    """Keys (key/value heads, p, width) to which a query of each forget row attends, and none of the other rows'.

    The share of a query's attention that goes to the keys is the logistic function of the log-sum-exp of its products
    with them, less `own`: a logistic regression whose output is the largest over a forget row's queries.

    Args:
        forget: of the forget rows.
        retain: of the others.
        num_heads: key/value heads; query heads that share one follow each other.
        num_keys: p.
    """
    sides = [_by_head(side, num_heads) for side in (forget, retain)]
    (queries, own), (others, others_own) = sides
    mean = others.mean(dim=(1, 2))  # (heads, width)
    width, size = mean.shape[1], others.std(dim=(1, 2), correction=0).mean(dim=-1)
    size = size.maximum(0.01 * others.square().mean(dim=(1, 2, 3)).sqrt()).clamp(min=1e-6)  # where all are alike
    unit = (LENGTH / (size * width**0.5))[:, None, None]
    token, member = (torch.randint(most, (num_keys,)) for most in queries.shape[1:3])
    fresh = F.normalize(queries[:, token, member] - mean[:, None], dim=-1)
    weights = fresh.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for drawn, others_drawn in _draws(forget.row, retain.row):
        keys = weights * unit
        of_forget = _log_odds(queries[:, drawn.tokens], own[:, drawn.tokens], keys)
        of_retain = _log_odds(others[:, others_drawn.tokens], others_own[:, others_drawn.tokens], keys)
        loss = F.softplus(-_largest(of_forget, drawn)).mean(dim=1)
        loss = loss + RETAIN_ROWS * F.softplus(_largest(of_retain, others_drawn)).mean(dim=1)
        loss = loss + RETAIN_TOKENS * F.softplus(of_retain).mean(dim=1)
        loss = loss + WEIGHT_DECAY * weights.square().sum(dim=-1).mean(dim=-1) / width
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return (weights * unit).detach()


def _by_head(side: Side, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries (key/value heads, T, group, width) and `own` (key/value heads, T, group)."""
    queries, own = (t.unflatten(1, (num_heads, -1)).transpose(0, 1) for t in side[:2])
    return queries, own


class _Drawn(NamedTuple):
    """Some rows of a side.

    Attributes:
        tokens: indices of their tokens, (t,).
        row: number of each token's row among them, (t,).
        rows: how many they are.
    """

    tokens: Tensor
    row: Tensor
    rows: int


def _draws(forget: Tensor, retain: Tensor) -> Iterator[tuple[_Drawn, _Drawn]]:
    """For each step drawn rows of both sides, which are given by the row of each token.

    All are drawn before the first step, so that no step waits for the device to say how many tokens they have.
    """
    sides = [(row, row.unique()) for row in (forget.cpu(), retain.cpu())]
    drawn = [_draw(*side) for _ in range(NUM_STEPS) for side in sides]
    sizes = [len(one.tokens) for one in drawn]
    together = (torch.cat([one.tokens for one in drawn]), torch.cat([one.row for one in drawn]))
    tokens, row = (one.to(forget.device).split(sizes) for one in together)
    there = map(_Drawn, tokens, row, [one.rows for one in drawn])
    return zip(there, there, strict=True)


def _draw(row: Tensor, rows: Tensor) -> _Drawn:
    picked = rows[torch.randperm(len(rows))[:ROWS_OF_STEP]]
    number = row.new_full((int(rows.max()) + 1,), -1)
    number[picked] = torch.arange(len(picked))
    tokens = (number[row] >= 0).nonzero().flatten()
    return _Drawn(tokens, number[row[tokens]], len(picked))


def _log_odds(queries: Tensor, own: Tensor, keys: Tensor) -> Tensor:
    """Log-odds of attention to the keys, the largest of the query heads of each group: (key/value heads, T)."""
    scores = torch.einsum("htgd,hpd->htgp", queries, keys)
    return (scores.logsumexp(dim=-1) - own).amax(dim=-1)


def _largest(log_odds: Tensor, drawn: _Drawn) -> Tensor:
    """The largest of each drawn row, (heads, rows)."""
    empty = log_odds.new_full((len(log_odds), drawn.rows), -torch.inf)
    return empty.scatter_reduce(1, drawn.row.expand(len(log_odds), -1), log_odds, "amax")


# ---- queries of the base ----


class _Queries:
    """Reader of the queries of a base behind a prefix.

    Args:
        view: the model with this prefix active.
        forget: token ids of the forget rows.
        retain: of the others.
    """

    def __init__(self, view: Any, forget: list[list[int]], retain: list[list[int]]) -> None:
        layers = prefix_states(view)
        assert layers is not None  # `check_prefix` ran behind it
        self.base, self.states = view.get_base_model(), PromptStates(layers)
        self.num_heads = self.base.config.get_text_config().num_attention_heads
        # After the same tokens a query is the same on both sides, and tells nothing.
        beginnings = {one for row in retain for one in _beginnings(row)}
        first = [sum(one in beginnings for one in _beginnings(row)) for row in forget]
        own = [i for i, row in enumerate(forget) if first[i] < len(row)]
        if not own:
            raise ValueError(
                "every forget row's prompt is also that of another row, or begins it; expected different ones."
            )
        self.rows = ([forget[i] for i in own], retain)
        largest, known = max(max(row) for row in forget + retain), len(view.word_embeddings.weight)
        if largest >= known:
            raise ValueError(
                f"the collator's tokenizer gives the token id {largest}, and the base has {known} input embeddings; "
                "expected the base's own tokenizer."
            )
        RowPrompts(view, 1).check_room(max(len(row) for row in forget + retain))
        self.first = [first[i] for i in own]

    def layers(self) -> Iterator[tuple[int, Side, Side, Tensor]]:
        """Index, forget and retain side, and mean output of attention (key/value heads, width), of each layer.

        Raises:
            ValueError: if a layer shows no queries.
        """
        num_layers = len(self.states.layers)
        num_tokens = sum(len(row) for side in self.rows for row in side)
        at_once = max(1, STORED_NUMBERS // (num_tokens * self.num_heads * self.states.layers[0].keys.shape[3]))
        for first in range(0, num_layers, at_once):
            group = _Group(range(first, min(first + at_once, num_layers)))
            for side in (0, 1):
                self._read(group, side)
            if missing := [layer for layer in group.layers if layer not in group.parts]:
                raise ValueError(
                    f"{type(self.base).__name__} computes attention in code of its own in layer {missing[0]}, not by "
                    "the functions of transformers, so that keys cannot be fitted to its queries; leave start out."
                )
            for layer in sorted(group.parts):
                parts = group.parts.pop(layer)
                forget, retain = (Side(*map(torch.cat, zip(*part, strict=True))) for part in parts)
                yield layer, forget, retain, group.sums[layer] / len(forget.queries)

    def _read(self, group: _Group, side: int) -> None:
        """Read the queries of some layers at the rows of a side."""
        rows, device = self.rows[side], device_of(self.base.get_input_embeddings())
        last = {"logits_to_keep": 1} if selects_positions(self.base) else {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = max(1, min(MOST_ROWS, MOST_SCORES // (self.num_heads * len(rows[order[-1]]) ** 2)))
        for i in range(0, len(order), size):
            batch = order[i : i + size]
            lengths = torch.tensor([len(rows[j]) for j in batch])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.long)
            ids[mask] = torch.tensor([token for j in batch for token in rows[j]])
            used = mask
            if side == 0:
                used = mask & (torch.arange(mask.shape[1]) >= torch.tensor([self.first[j] for j in batch])[:, None])
            row = torch.tensor(batch)[:, None].expand_as(used)[used]
            with (
                unswitched(self.base),
                evaluation_mode(self.base),
                observed_attention(self.base, group.keeper(side, used, row)),
                in_front(self.base, self.states, mask.long().to(device)) as inputs,
            ):
                self.base(input_ids=ids.to(device), **inputs, **last)


class _Group:
    """Queries of some layers, as they are read.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: range) -> None:
        self.layers = layers
        self.parts: dict[int, tuple[list[Side], list[Side]]] = {}
        self.sums: dict[int, Tensor] = {}  # of what attention puts out at forget rows

    def keeper(self, side: int, used: Tensor, row: Tensor) -> Callable[[Attention], None]:
        """A function that keeps the queries of a batch.

        Args:
            side: 0 for forget rows, 1 for others.
            used: (B, n) bool, the queries to keep.
            row: index of the row of each of these.
        """

        shown: set[int] = set()

        @functools.cache  # a mask as an index, or a copy, would make each layer wait for the device
        def indices(device: torch.device) -> tuple[Tensor, ...]:
            return tuple(index.to(device) for index in (*used.nonzero(as_tuple=True), row))

        def keep(seen: Attention) -> None:
            if seen.layer in shown:
                raise ValueError(f"layer {seen.layer} attends twice in a forward, which one key cannot be fitted to.")
            shown.add(seen.layer)
            if seen.layer not in self.layers:
                return
            device, num = seen.queries.device, seen.queries.shape[2]
            batch, token, own_row = indices(device)
            later = torch.ones(num, num, device=device, dtype=torch.bool).triu(1)
            own, out = [], []
            queries = seen.queries.float().chunk(seen.keys.shape[1], dim=1)
            for head, group in enumerate(queries):  # one by one: scores of long rows are large
                key, value = (t[:, head : head + 1, -num:].float() for t in (seen.keys, seen.values))
                scores = (group @ key.mT).masked_fill_(later, -torch.inf)  # pads stand later, too
                own.append(scores.logsumexp(dim=-1))
                if side == 0:
                    out.append((scores.softmax(dim=-1) @ value).mean(dim=1)[batch, token].sum(dim=0))
            kept, sums = (torch.cat(t, dim=1).transpose(1, 2)[batch, token] for t in (queries, own))
            self.parts.setdefault(seen.layer, ([], []))[side].append(Side(kept, sums, own_row))
            if side == 0:
                total = torch.stack(out)
                self.sums[seen.layer] = self.sums[seen.layer] + total if seen.layer in self.sums else total

        return keep


def _beginnings(row: list[int]) -> Iterator[int]:
    """A hash of each beginning of a row."""
    found = 0
    for token in row:
        found = hash((found, token))
        yield found

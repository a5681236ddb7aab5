"""Linear probes of hidden states: how they are fit on texts, and how scores of tokens make one of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .states import HiddenStates

POOLINGS = ("mean", "last", "max")
# Numbers that the states of one pass over the texts may take in memory, and tokens of a text that a probe is fit on.
NUMBERS_AT_ONCE, TOKENS_PER_TEXT = 2**28, 256
# Inverse of the L2 penalty, on standardized states, as scikit-learn counts it.
STRENGTH = 0.5
# Steps of L-BFGS, and the change of parameters or mean loss at which it stops.
MAX_ITERATIONS, TOLERANCE = 100, 1e-5


class Probe(NamedTuple):
    """Linear probes of one layer's hidden states.

    Attributes:
        weights: (d, K).
        bias: (K,).
    """

    weights: np.ndarray
    bias: np.ndarray

    def token_scores(self, states: Tensor) -> Tensor:
        """The score of each token by each probe: (B, n, d) to (B, n, K), float32."""
        weights, bias = (torch.tensor(each, dtype=torch.float32, device=states.device) for each in self)
        return states @ weights + bias


def pooled(values: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Scores, or states, of texts from those of their tokens.

    Args:
        values: (B, n, K).
        mask: (B, n), true for tokens; pads stand on the right.
        pooling: `"mean"`, `"last"` (at the last token) or `"max"`.

    Returns:
        (B, K).
    """
    inside = mask[..., None].to(values.device)
    if pooling == "mean":
        return values.where(inside, 0.0).sum(dim=1) / inside.sum(dim=1)
    if pooling == "max":
        return values.where(inside, -torch.inf).amax(dim=1)
    return values.take_along_dim(inside.sum(dim=1, keepdim=True) - 1, dim=1)[:, 0]


@torch.no_grad()
def probe_scores(
    states: HiddenStates, texts: Sequence[str], probes: dict[int, Probe]
) -> dict[tuple[int, str], np.ndarray]:
    """Scores of texts by probes of several layers, pooled in each way.

    Args:
        states: reader of the base's hidden states.
        texts: texts with at least one token.
        probes: by layer, K probes.

    Returns:
        By layer and pooling, (texts, K), float64.
    """
    found = {
        (layer, pooling): np.zeros((len(texts), len(probe.bias)))
        for layer, probe in probes.items()
        for pooling in POOLINGS
    }
    for batch in states.batches(texts, list(probes)):
        for layer, probe in probes.items():
            token_scores = probe.token_scores(batch.states[layer])
            for pooling in POOLINGS:
                found[layer, pooling][batch.rows] = pooled(token_scores, batch.mask, pooling).cpu().numpy()
    return found


class Examples(NamedTuple):
    """States that a probe is fit on: one of each text, or several.

    Attributes:
        states: (E, d), float32.
        rows: the text of each (E,).
        slots: its place among those of its text (E,).
    """

    states: Tensor
    rows: Tensor
    slots: Tensor


def fit_probes(
    states: HiddenStates, texts: Sequence[str], is_forget: np.ndarray, fold: np.ndarray, layers: list[int], seed: int
) -> dict[tuple[int, str], Probe]:
    """By layer and pooling, a probe without each fold, and one of all texts as the last.

    Args:
        states: reader of the base's hidden states.
        texts: texts.
        is_forget: (texts,).
        fold: the fold of each text, from 0.
        layers: layers.
        seed: seed of the tokens drawn from texts that have more than a probe is fit on.
    """
    found = {}
    labels, outside = torch.tensor(is_forget), torch.tensor(fold)
    num_tokens = sum(min(len(ids), TOKENS_PER_TEXT) for ids in states.token_ids(texts))
    at_once = max(1, NUMBERS_AT_ONCE // (num_tokens * states.width))
    for start in range(0, len(layers), at_once):
        for choice, examples in _examples(states, texts, layers[start : start + at_once], seed).items():
            fits = [  # the last holds nothing out
                logistic_probe(examples, labels, outside != each) for each in range(int(outside.max()) + 2)
            ]
            weights, biases = zip(*fits, strict=True)
            found[choice] = Probe(np.stack(weights, axis=1), np.array(biases))
    return found


def logistic_probe(examples: Examples, is_forget: Tensor, inside: Tensor) -> tuple[np.ndarray, float]:
    """Weights and bias of a logistic regression on standardized states, both groups weighing the same.

    A text's log-odds is the log-sum-exp of its states' scores: with one state it is that score; with several, a text
    is to be forgotten if one of its tokens says so, whichever it is, and others need not say anything.

    Args:
        examples: states of texts.
        is_forget: (texts,), bool.
        inside: (texts,), bool: the texts to fit on.

    Source: multiple-instance learning with a smooth maximum, as in Ray and Craven, *Supervised versus Multiple
    Instance Learning*, https://doi.org/10.1145/1102351.1102439
    """
    states, rows, slots = examples
    device = states.device
    scale, mean = torch.std_mean(states, dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    labels = is_forget.to(device).float()
    num = inside.sum()
    shares = [(group & inside) / (group & inside).sum() for group in (is_forget, ~is_forget)]
    weights = (sum(shares) * num / 2).to(device)
    table = torch.full((len(labels), int(slots.max()) + 1), -torch.inf, device=device)
    parameters = torch.zeros(states.shape[1] + 1, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=MAX_ITERATIONS, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
    )

    def slope_and_bias() -> tuple[Tensor, Tensor]:
        slope = parameters[:-1] / scale
        return slope, parameters[-1] - slope @ mean

    def loss() -> Tensor:
        optimizer.zero_grad()
        slope, bias = slope_and_bias()
        scores = table.index_put((rows, slots), states @ slope + bias).logsumexp(dim=1)
        penalty = parameters[:-1].square().sum() / (2 * STRENGTH)
        found = (binary_cross_entropy_with_logits(scores, labels, weights, reduction="sum") + penalty) / num
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        slope, bias = slope_and_bias()
    return slope.double().cpu().numpy(), float(bias)


@torch.no_grad()
def _examples(
    states: HiddenStates, texts: Sequence[str], layers: list[int], seed: int
) -> dict[tuple[int, str], Examples]:
    """States to fit on, by layer and pooling: for `"max"` those of single tokens, else one of each text."""
    draws = torch.Generator().manual_seed(seed)
    collected: dict[tuple[int, str], list[Tensor]] = {(layer, p): [] for layer in layers for p in POOLINGS}
    order: list[int] = []
    token_rows, token_slots = [], []
    for batch in states.batches(texts, layers):
        drawn = [torch.randperm(n, generator=draws)[:TOKENS_PER_TEXT] for n in batch.mask.sum(dim=1).tolist()]
        counts = torch.tensor([len(each) for each in drawn])
        places = torch.arange(len(drawn)).repeat_interleave(counts), torch.cat(drawn)
        for layer, state in batch.states.items():
            for pooling in POOLINGS:
                taken = state[places] if pooling == "max" else pooled(state, batch.mask, pooling)
                collected[layer, pooling].append(taken)
        order += batch.rows
        token_rows.append(torch.tensor(batch.rows).repeat_interleave(counts))
        token_slots.append(torch.cat([torch.arange(len(each)) for each in drawn]))
    single = torch.tensor(order), torch.zeros(len(order), dtype=torch.long)
    several = torch.cat(token_rows), torch.cat(token_slots)
    return {
        (layer, pooling): Examples(torch.cat(parts), *(several if pooling == "max" else single))
        for (layer, pooling), parts in collected.items()
    }

"""Tokens of a batch whose rows are sampled each in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .requests import Sampling

LEAST_TEMPERATURE = 1e-5  # below, a row is greedy, as in vLLM


class RowChooser(LogitsProcessor):
    """A logits processor that draws each row's next token by the row's own settings, and leaves that one alone.

    `generate` has one temperature for a batch; behind this it decodes greedily. A row's draws depend on its seed and
    its logits, not on the rows beside it.

    Args:
        samplings: one for each row.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.samplings = list(samplings)
        self._generators: list[torch.Generator | None] = [None] * len(self.samplings)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V): of a row that is sampled, 0 at the token drawn and -inf elsewhere; others as they are."""
        if not any(one.temperature >= LEAST_TEMPERATURE for one in self.samplings):
            return scores
        scores = scores.clone()
        for row, one in enumerate(self.samplings):
            if one.temperature >= LEAST_TEMPERATURE:
                token = draw(scores[row], one, self._generator(row, scores.device))
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def _generator(self, row: int, device: torch.device) -> torch.Generator:
        found = self._generators[row]
        if found is None:
            found = torch.Generator(device)
            seed = self.samplings[row].seed
            found.seed() if seed is None else found.manual_seed(seed)
            self._generators[row] = found
        return found


def draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn from scores (V,): from the fewest most probable ones that have `top_p` together.

    Args:
        scores: logits, (V,).
        sampling: temperature, not greedy, and `top_p`.
        generator: of random numbers, on the device of the scores.
    """
    ranked, tokens = (scores.float() / sampling.temperature).softmax(dim=0).sort(descending=True)
    before = ranked.cumsum(dim=0) - ranked
    kept = ranked.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])

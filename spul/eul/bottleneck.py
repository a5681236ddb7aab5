"""One unlearning layer, and the shape that all of them have."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class UnlearningLayersConfig:
    """The shape of unlearning layers.

    Args:
        reduction: the base's width divided by the bottleneck's, at least 1. 32 (default) makes about 0.5 % of the
            parameters of a model whose feed-forward blocks are four times as wide as the model.
        activation: between the two projections, by its name in transformers: `"relu"` (default), `"gelu"`, `"silu"`,
            `"linear"`, ...
        target_modules: what the names of the modules end in whose outputs the layers take; None (default) finds the
            feed-forward blocks of Llama-like models, OPT, GPT-2, Qwen, Gemma and GPT-NeoX.
        init_seed: of the down projections. Layers that are to be fused start alike, so leave it as it is.

    Raises:
        ValueError: if `reduction` is not a whole number of at least 1, `activation` is not known, or
            `target_modules` is empty.
    """

    reduction: int = 32
    activation: str = "relu"
    target_modules: tuple[str, ...] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.reduction, bool) or not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(f"reduction={self.reduction!r}: expected a whole number of at least 1, such as 32.")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation={self.activation!r} is not known; expected one of {', '.join(ACT2FN)}.")
        if isinstance(self.target_modules, str) or (self.target_modules is not None and not self.target_modules):
            raise ValueError(
                f"target_modules={self.target_modules!r}: expected what the names of modules end in, such as "
                '("mlp",), or None.'
            )
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))  # JSON has lists

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


class Bottleneck(nn.Module):
    """`h + up(act(down(h)))`, the identity until it has learned.

    Args:
        width: d, of the hidden states.
        bottleneck: width in between.
        activation: see `UnlearningLayersConfig`.
        seed: of the down projection's start; the up projection starts at zero.
    """

    def __init__(self, width: int, bottleneck: int, activation: str = "relu", seed: int = 0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation = ACT2FN[activation]
        start = torch.randn(bottleneck, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        with torch.no_grad():
            self.down.weight.copy_(start)
            self.down.bias.zero_()
            self.up.weight.zero_()
            self.up.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """From (..., d) to (..., d); inside in the layer's own precision, or autocast's."""
        added = self.up(self.activation(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)

"""One unlearning layer, `Bottleneck`, the config of a set of layers, and the modules whose outputs they take."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..records.fields import is_finite_number
from ..records.weights import Shapes

# Names of a feed-forward block, or of its last module where the block has no module of its own (OPT).
FEED_FORWARD = ("mlp", "fc2")


@dataclass(frozen=True)
class UnlearningLayersConfig:
    """Config of a set of unlearning layers.

    Args:
        reduction: the base's width divided by the bottleneck's, above 0. 32 (default) adds about 0.5 % of the base's
            parameters if its feed-forward blocks are four times as wide as the model. Below 1 the layers are wider
            than the model.
        activation: between the two projections, by its name in transformers: `"relu"` (default), `"gelu"`, `"silu"`,
            `"linear"`, ...
        target_modules: name endings of the modules whose outputs the layers transform; None (default) finds the
            feed-forward blocks of Llama-like models, OPT, GPT-2, Qwen, Gemma and GPT-NeoX.
        init_seed: seed of the initial down projections. Only layers with the same seed can be fused.
        train_down: whether the down projections are trained, as published. If False they stay as initialized, the
            same for all requests, and the fused maps are linear; this needs a wide bottleneck, such as
            `reduction=0.5`.

    Raises:
        ValueError: if `reduction` is not a number above 0, `activation` is not known, or `target_modules` is empty.
    """

    reduction: float = 32
    activation: str = "relu"
    target_modules: tuple[str, ...] | None = None
    init_seed: int = 0
    train_down: bool = True

    def __post_init__(self) -> None:
        if not is_finite_number(self.reduction) or self.reduction <= 0:
            raise ValueError(f"reduction={self.reduction!r}: expected a number above 0, such as 32.")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation={self.activation!r} is not known; expected one of {', '.join(ACT2FN)}.")
        if isinstance(self.target_modules, str) or (self.target_modules is not None and not self.target_modules):
            raise ValueError(
                f'target_modules={self.target_modules!r}: expected name endings of modules, such as ("mlp",), or None.'
            )
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))  # JSON has lists

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


class Bottleneck(nn.Module):
    """The residual layer `h + up(act(down(h)))`; the identity before training.

    Args:
        width: d, of the hidden states.
        bottleneck: width between the projections.
        activation: see `UnlearningLayersConfig`.
        seed: of the initial down projection; the up projection is initialized to zero.
        train_down: whether the down projection is trained.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: str = "relu", seed: int = 0, train_down: bool = True
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation = ACT2FN[activation]
        start = torch.randn(bottleneck, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        with torch.no_grad():
            self.down.weight.copy_(start)
            self.down.bias.zero_()
            self.up.weight.zero_()
            self.up.bias.zero_()
        self.down.requires_grad_(train_down)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., d) to (..., d), computed in the layer's own precision, or autocast's."""
        added = self.up(self.activation(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def widths(model: PreTrainedModel, config: UnlearningLayersConfig) -> tuple[int, int]:
    """Widths of the base's hidden states and of the bottleneck.

    Raises:
        ValueError: if the bottleneck's is less than 1.
    """
    text: Any = model.config.get_text_config()
    if config.reduction > text.hidden_size:
        raise ValueError(
            f"reduction={config.reduction} exceeds the base's width, {text.hidden_size}; pass at most "
            f"{text.hidden_size}."
        )
    return text.hidden_size, int(min(text.hidden_size / config.reduction, sys.maxsize))


def layer_shapes(names: list[str], width: int, bottleneck: int) -> Shapes:
    """Shapes of the weights of layers after the blocks of these names, without allocating them."""
    shapes = {
        "down.weight": (bottleneck, width),
        "down.bias": (bottleneck,),
        "up.weight": (width, bottleneck),
        "up.bias": (width,),
    }
    return {f"{name}.{key}": shape for name in names for key, shape in shapes.items()}


def feed_forward_blocks(model: PreTrainedModel, endings: tuple[str, ...] | None = None) -> list[str]:
    """Return the names of the modules whose outputs unlearning layers transform, in the model's order.

    Args:
        model: a causal LM.
        endings: endings of the names, in whole parts between dots; unless given, those of the known families, within
            the text decoder (a model may also have one for images).

    Raises:
        ValueError: if there are none.
    """
    names = [name for name, _ in model.named_modules()]
    if endings is None:
        decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
        names = [name for name in names if name.startswith(f"{decoder}.")]
    for some in [endings] if endings else [(ending,) for ending in FEED_FORWARD]:
        if found := [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in some)]:
            return found
    raise ValueError(
        f"{type(model).__name__} has no module whose name ends in {' or '.join(endings or FEED_FORWARD)}; name the "
        "modules that end its feed-forward blocks: UnlearningLayersConfig(target_modules=(...))."
    )


class LayerHook:
    """Forward hook of a block: passes its output through a layer, unless the set of layers is disabled.

    Args:
        owner: the set of layers, whose `enabled` counts.
        layer: the layer.
        name: the block's name, for messages.
    """

    is_unlearning_layer = True

    def __init__(self, owner: Any, layer: Bottleneck, name: str) -> None:
        self.owner, self.layer, self.name = owner, layer, name

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.owner.enabled:
            return None
        width = self.layer.down.in_features
        if not isinstance(output, Tensor) or output.shape[-1] != width:
            what = (
                f"a tensor of the shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            )
            raise TypeError(
                f"{self.name} returns {what}, not hidden states of the width {width}; name other modules: "
                "UnlearningLayersConfig(target_modules=(...))."
            )
        return self.layer(output)

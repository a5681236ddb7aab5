"""Noise of training, turned off in a frozen base: dropout, and modules that sample whatever their settings."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from .compat import is_dropout
from .compat_modules import modules_of_class

# Modules that draw in training mode whatever their settings: PhiMoE samples the experts of each token.
_SAMPLERS = ("PhimoeTopKRouter",)


def zero_dropout(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Set every dropout probability of a frozen model, and the noise of its routers, to 0.

    Else the two passes of one step would differ by noise. What has no such setting, see `keep_in_evaluation`. A config
    with dropout is the model's own afterwards: the one that it was built from may be the caller's, or another model's.

    Returns:
        (module or config, attribute, value) of each before, for `restore_dropout`.
    """
    _own_configs(model)
    before = dropout_of(model)
    restore_dropout([(module, name, 0.0) for module, name, _ in before])
    return before


def dropout_of(model: nn.Module) -> list[tuple[Any, str, float]]:
    """(module or config, attribute, value) of each dropout of a model, and of its routers' noise."""
    found: list[tuple[Any, str, float]] = []
    for module in model.modules():
        if is_dropout(module):
            found.append((module, "p", cast(Any, module).p))
        # Functional: OPT's `dropout` and `layerdrop`, Llama's `attention_dropout`, Mixtral's `jitter_noise`, ...
        found += [(module, name, p) for name, p in vars(module).items() if _is_noise(name) and isinstance(p, float)]
    for config in {id(one): one for _, one in configs_of(model)}.values():  # read there in every forward, as by Falcon
        found += [(config, name, p) for name, p in vars(config).items() if "drop" in name and isinstance(p, float)]
    return found


def configs_of(model: nn.Module) -> list[tuple[nn.Module, PreTrainedConfig]]:
    """Each module that holds a config, and the config, which many of them share."""
    found = ((module, vars(module).get("config")) for module in model.modules())
    return [(module, config) for module, config in found if isinstance(config, PreTrainedConfig)]


def _own_configs(model: nn.Module) -> None:
    """Put copies in the place of a model's configs, if any has dropout; modules that shared one share its copy."""
    if not any(isinstance(holder, PreTrainedConfig) and p for holder, _, p in dropout_of(model)):
        return
    copies: dict[int, Any] = {}
    for module, config in configs_of(model):
        cast(Any, module).config = copy.deepcopy(config, copies)


def _is_noise(name: str) -> bool:
    return "drop" in name or ("jitter" in name and name != "router_jitter_noise")  # PhiMoE's: of evaluation, too


def restore_dropout(values: list[tuple[Any, str, float]]) -> None:
    """Set dropout probabilities back to those returned by `zero_dropout` or `dropout_of`."""
    for holder, name, p in values:
        setattr(holder, name, p)


def keep_in_evaluation(model: nn.Module) -> None:
    """Put the modules of a frozen model that sample in training mode into evaluation mode, whatever the others' is."""
    set_samplers(model, False)


def set_samplers(model: nn.Module, mode: bool) -> None:
    """Set the mode of the modules of a model that sample in training mode."""
    for module in modules_of_class(model, _SAMPLERS).values():
        module.train(mode)


def stop_sampling(model: nn.Module) -> None:
    """Have the modules of a model that sample in training mode run in evaluation mode, whatever mode is set later."""
    for module in modules_of_class(model, _SAMPLERS).values():
        module.register_forward_pre_hook(_to_evaluation)


def _to_evaluation(module: nn.Module, inputs: Any) -> None:
    module.eval()

"""Saving and loading of prompts: the files of an adapter folder, and restoring a trainable prompt."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, PeftType, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import load_base
from ..models.compat import prefix_shape
from ..records.card import CARD_NAME, model_card
from ..records.files import HUB_ARGUMENTS, atomic_folder, find_file
from ..records.spul_config import SpulConfig, read_spul_config

if TYPE_CHECKING:
    from .unlearner import SoftPromptUnlearner

logger = logging.getLogger(__name__)

ENCODER_NAME = "prompt_encoder.safetensors"


def _has_encoder(model: PeftModelForCausalLM, adapter_name: str) -> bool:
    """Whether the prompt is computed by an encoder, without which it cannot be trained further."""
    return len(model.prompt_encoder[adapter_name].state_dict()) > 1


def save(
    model: SoftPromptUnlearner,
    peft_save: Callable[..., None],
    save_directory: str,
    selected_adapters: list[str] | None,
    **kwargs: Any,
) -> None:
    """Write the adapter folder; see `SoftPromptUnlearner.save_pretrained`.

    Args:
        model: the unlearner.
        peft_save: PEFT's own `save_pretrained`, bound to the model.
        save_directory: the folder.
        selected_adapters: names of the prompts; all if None.
        kwargs: arguments of `peft_save`.
    """
    target = Path(save_directory)
    if not kwargs.get("is_main_process", True):
        return
    names = list(model.peft_config) if selected_adapters is None else selected_adapters
    for name in names:
        update_config(model, name)
    with atomic_folder(target) as scratch:
        peft_save(str(scratch), selected_adapters=selected_adapters, **kwargs)
        for name in names:
            folder = scratch if name == "default" else scratch / name
            model.spul_configs[name].save(folder)
            if _has_encoder(model, name):
                state = {key: value.detach().cpu() for key, value in model.prompt_encoder[name].state_dict().items()}
                save_file(state, folder / ENCODER_NAME, metadata={"format": "pt"})
    for name in names:
        if not _has_encoder(model, name):  # that of an earlier save would not belong to this prompt
            (target if name == "default" else target / name).joinpath(ENCODER_NAME).unlink(missing_ok=True)


def update_config(model: SoftPromptUnlearner, adapter_name: str) -> None:
    """Set the loss, the base and the versions in the record of a prompt."""
    config, base = model.spul_configs[adapter_name], model.get_base_model()
    if not model.peft_config[adapter_name].inference_mode:  # a prompt loaded for inference keeps its record
        config.loss = model.loss.to_dict()
    config.set_base(base)


def write_model_card(model: SoftPromptUnlearner, output_dir: str) -> None:
    """Write the model card, `README.md`."""
    config = model.active_peft_config
    card = model_card(
        model.spul_config,
        prompt_type=config.peft_type.value,
        num_virtual_tokens=config.num_virtual_tokens,
        num_parameters=sum(p.numel() for p in model.prompt_encoder[model.active_adapter].parameters()),
    )
    card.save(Path(output_dir, CARD_NAME))


def load(
    cls: type[SoftPromptUnlearner],
    model: nn.Module | str | os.PathLike,
    adapter: str | os.PathLike,
    is_trainable: bool,
    loss: UnlearningLoss | None,
    adapter_name: str,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> SoftPromptUnlearner:
    """Load a prompt onto its base; see `SoftPromptUnlearner.from_pretrained`."""
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    loaded = load_base(model, model_kwargs)
    config = PeftConfig.from_pretrained(os.fspath(adapter), **hub)
    if not config.is_prompt_learning:
        raise TypeError(
            f"{str(adapter)!r} holds a {type(config).__name__} adapter, not a soft prompt; expected one of PEFT's "
            "prompt-learning configs: PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig."
        )
    config.inference_mode = not is_trainable
    spul_config = read_spul_config(adapter, **hub)
    if loss is None and spul_config.loss is not None:
        try:
            loss = UnlearningLoss.from_dict(spul_config.loss)
        except (ValueError, TypeError, KeyError):
            if is_trainable:
                raise
            logger.warning("The prompt was trained with a custom loss unknown to spul; using the default loss.")

    check_base(loaded, config, spul_config, adapter)
    unlearner = cls(loaded, config, loss=loss, adapter_name=adapter_name, **kwargs)
    base: Any = unlearner.get_base_model()
    unlearner.spul_configs[adapter_name] = spul_config
    if is_trainable:
        # After more training, the saved metrics and fingerprint no longer apply.
        spul_config.base_fingerprint, spul_config.metrics = None, {}
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or config.base_model_name_or_path
        restore_prompt(unlearner, adapter, adapter_name, **hub)
        return unlearner
    weights = _adapter_weights(unlearner, adapter, adapter_name, **hub)
    unlearner.prompt_encoder[adapter_name].load_state_dict({"embedding.weight": weights}, strict=True)
    unlearner.eval()
    return unlearner


def restore_prompt(model: SoftPromptUnlearner, adapter: str | os.PathLike, adapter_name: str, **hub: Any) -> None:
    """Load a saved state into a trainable prompt, including the encoder of P-tuning.

    Raises:
        ValueError: if the folder lacks the encoder, its shapes differ from this prompt's, or it does not belong to the
            saved prompt.
    """
    encoder = model.prompt_encoder[adapter_name]
    if not _has_encoder(model, adapter_name):
        weights = _adapter_weights(model, adapter, adapter_name, **hub)
        encoder.load_state_dict({"embedding.weight": weights}, strict=True)
        return
    path = find_file(adapter, ENCODER_NAME, **hub)
    if path is None:
        kind = PeftType(model.peft_config[adapter_name].peft_type).value
        raise ValueError(
            f"{str(adapter)!r} holds no {ENCODER_NAME}: the {kind} prompt in it can be used, but not trained further, "
            "since plain PEFT saves only the encoder's output. Load it with is_trainable=False, or save with spul."
        )
    state = load_file(path, device="cpu")
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        raise ValueError(
            f"{path}: the encoder there has {found}, this model's has {expected}; load it with its own config."
        )
    encoder.load_state_dict(state, strict=True)
    output = model.get_prompt_embedding_to_save(adapter_name).float()
    if not torch.allclose(output, _flat_weights(adapter, **hub).float(), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{path} does not belong to the adapter_model.safetensors beside it, as after an interrupted save; "
            "load the prompt with is_trainable=False, or resume from another checkpoint."
        )


def _flat_weights(adapter: str | os.PathLike, **hub: Any) -> torch.Tensor:
    """Return the flattened prompt, as saved by PEFT."""
    check_safetensors(adapter, **hub)
    return load_peft_weights(os.fspath(adapter), device="cpu", **hub)["prompt_embeddings"]


def _adapter_weights(
    model: SoftPromptUnlearner, adapter: str | os.PathLike, adapter_name: str, **hub: Any
) -> torch.Tensor:
    """Return the flattened prompt of an adapter folder; raise if its shape differs from the prompt in the model."""
    weights = _flat_weights(adapter, **hub)
    expected = model.prompt_encoder[adapter_name].embedding.weight.shape
    if weights.shape != expected:
        raise ValueError(
            f"the prompt in {str(adapter)!r} has shape {tuple(weights.shape)}, this model's {tuple(expected)} "
            "(virtual tokens, width); load it on the base model it was trained for."
        )
    return weights


def check_safetensors(adapter: str | os.PathLike, **hub: Any) -> None:
    """Raise unless an adapter's weights are safetensors: PEFT would unpickle other files."""
    if find_file(adapter, "adapter_model.safetensors", **hub) is None:
        raise ValueError(f"{str(adapter)!r} holds no adapter_model.safetensors; spul loads safetensors only.")


def check_base(base: Any, config: Any, spul_config: SpulConfig, adapter: str | os.PathLike) -> None:
    """Raise if the prompt does not fit the base; warn if the base's weights differ from those of training."""
    trained_on = config.base_model_name_or_path or "another model"
    advice = f"Load it on the model it was trained for ({trained_on})."
    found: tuple[int, ...]
    expected: tuple[int, ...]
    if config.peft_type == PeftType.PREFIX_TUNING:
        found, expected = (config.num_layers, config.token_dim), prefix_shape(base.config)
        what = "(layers, width of keys)"
    else:
        found, expected = (config.token_dim,), (base.get_input_embeddings().weight.shape[1],)
        what = "(width)"
    if found != expected:
        raise ValueError(
            f"the prompt in {str(adapter)!r} does not fit this base: it has {what} {found}, the base {expected}. "
            + advice
        )
    spul_config.warn_if_base_differs(base, f"the prompt in {str(adapter)!r} was", advice, stacklevel=4)

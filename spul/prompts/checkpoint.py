"""Saving and loading of prompts: the files of an adapter folder, and restoring a trainable prompt."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, PeftType, PrefixTuningConfig
from safetensors.torch import save_file
from torch import nn

from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import unchanged_on_error
from ..models.compat import prefix_shape
from ..models.loading import load_base
from ..records.card import CARD_NAME, model_card
from ..records.fields import is_count, read_object
from ..records.files import HUB_ARGUMENTS, atomic_folder, find_file
from ..records.spul_config import SPUL_CONFIG_NAME, SpulConfig, read_spul_config, without_local_path
from ..records.weights import Shapes, read_weights, weight_shapes
from .configs import (
    PROMPT_CONFIGS,
    check_causal_lm,
    check_peft_config,
    check_sizes,
    encoder_shapes,
    filled,
    has_encoder,
    holds_states,
    prompt_shape,
    without_start,
)
from .position import check_position, read_type, saved_type

if TYPE_CHECKING:
    from .adapters import PromptAdapters
    from .unlearner import SoftPromptUnlearner

logger = logging.getLogger(__name__)

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
WEIGHTS_KEY = "prompt_embeddings"  # the one tensor in it
ENCODER_NAME = "prompt_encoder.safetensors"
# Of an encoder's output that another device computed, relative: TF32, the default of cuDNN's LSTM, makes up to 6e-4,
# and one step of training at a rate of 1e-4 more than 6e-3.
ROUNDING = 2e-3


def folder_of(adapter_name: str) -> str:
    """PEFT's folder of an adapter, within the one that is saved to."""
    return "" if adapter_name == "default" else adapter_name


def _trains_encoder(model: PeftModelForCausalLM, adapter_name: str) -> bool:
    """Whether a prompt of the model is computed by an encoder, without which it cannot be trained further."""
    config: Any = model.peft_config[adapter_name]
    return has_encoder(config) and not config.inference_mode


def save(
    model: PromptAdapters,
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
            folder = scratch / folder_of(name)
            _finish_config(folder / CONFIG_NAME, model.spul_configs[name].prompt_position)
            write_model_card(model, folder, name)  # PEFT writes one for all of them
            model.spul_configs[name].save_with_weights(folder, target / folder_of(name), WEIGHTS_NAME)
            if _trains_encoder(model, name):
                state = {key: value.detach().cpu() for key, value in model.prompt_encoder[name].state_dict().items()}
                save_file(state, folder / ENCODER_NAME, metadata={"format": "pt"})
    for name in names:
        if not _trains_encoder(model, name):  # that of an earlier save would not belong to this prompt
            (target / folder_of(name) / ENCODER_NAME).unlink(missing_ok=True)


def _finish_config(path: Path, prompt_position: str) -> None:
    """Of paths of the user's machine in PEFT's config leave the last part; set the type that tells the position."""
    config = read_object(path)
    config["peft_type"] = saved_type(config["peft_type"], prompt_position)
    for name in ("base_model_name_or_path", "tokenizer_name_or_path"):
        if config.get(name):
            config[name] = without_local_path(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def update_config(model: PromptAdapters, adapter_name: str) -> None:
    """Set the loss, the base and the versions in the record of a prompt."""
    config, base = model.spul_configs[adapter_name], model.get_base_model()
    if not model.peft_config[adapter_name].inference_mode:  # a prompt loaded for inference keeps its record
        config.loss = model.loss.to_dict()
    config.set_base(base)


def write_model_card(model: PromptAdapters, output_dir: str | os.PathLike, adapter_name: str) -> None:
    """Write the model card of a prompt, `README.md`."""
    config: Any = model.peft_config[adapter_name]
    card = model_card(
        model.spul_configs[adapter_name],
        prompt_type=config.peft_type.value,
        num_virtual_tokens=config.num_virtual_tokens,
        num_parameters=sum(p.numel() for p in model.prompt_encoder[adapter_name].parameters()),
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
    saved = read(adapter, with_encoder=is_trainable, **hub)
    config, spul_config = saved.config, saved.spul_config
    config.inference_mode = not is_trainable
    if loss is None and spul_config.loss is not None:
        try:
            loss = UnlearningLoss.from_dict(spul_config.loss)
        except (ValueError, TypeError, KeyError) as error:
            if is_trainable:
                raise ValueError(f"loss in {SPUL_CONFIG_NAME} of {saved.where}: {error}") from error
            logger.warning("The prompt was trained with a custom loss unknown to spul; using the default loss.")
    loaded = load_base(model, model_kwargs)
    check_causal_lm(loaded)
    check_base(loaded, config, spul_config, adapter)
    with unchanged_on_error(loaded):
        position = spul_config.prompt_position
        unlearner = cls(loaded, config, loss, adapter_name, prompt_position=position, start="peft", **kwargs)
        unlearner.spul_configs[adapter_name] = spul_config
        if is_trainable:
            # After more training, the saved metrics and fingerprint no longer apply.
            spul_config.base_fingerprint = spul_config.weights_sha256 = None
            spul_config.metrics = {}
            config.base_model_name_or_path = getattr(loaded, "name_or_path", None) or config.base_model_name_or_path
        put(unlearner, saved, adapter_name)
    return unlearner if is_trainable else unlearner.eval()


@dataclass
class SavedPrompt:
    """The content of an adapter folder, checked: `state` is the prompt's, `encoder` that of a trainable P-tuning."""

    where: str
    config: Any
    spul_config: SpulConfig
    weights: torch.Tensor
    encoder: dict[str, torch.Tensor] | None


def read(adapter: str | os.PathLike, with_encoder: bool, **hub: Any) -> SavedPrompt:
    """Read an adapter folder; every size in its config is compared with the weights' file before it is believed.

    Args:
        adapter: a local folder or a Hub repository's name.
        with_encoder: whether the prompt is to be trained further, for which P-tuning needs its encoder.
        hub: arguments of `find_file`.

    Raises:
        TypeError: if it is not one of the four prompt types.
        ValueError: if a file is missing or damaged, a config or record has a field out of range, or config, record and
            weights do not belong together.
    """
    where = repr("/".join(part for part in (str(adapter), hub.get("subfolder")) if part))
    if not isinstance(adapter, (str, os.PathLike)):
        raise TypeError(
            f"the saved prompt is a {type(adapter).__name__}; expected the folder that save_pretrained wrote, or the "
            "name of a Hub repository."
        )
    config, position = _read_config(adapter, where, **hub)
    path = find_file(adapter, WEIGHTS_NAME, **hub)
    if path is None:
        raise ValueError(f"{where} holds no {WEIGHTS_NAME}; spul loads safetensors only.")  # others are pickles
    check_sizes(config, where)
    _check_shapes(path, weight_shapes(path), {WEIGHTS_KEY: prompt_shape(config)})
    spul_config = read_spul_config(adapter, **hub)
    if spul_config.prompt_position != position:
        raise ValueError(
            f"{where}: the prompt stands at {position!r} by its {CONFIG_NAME}, and at {spul_config.prompt_position!r} "
            f"by its {SPUL_CONFIG_NAME}; expected two files of one save. Copy or download the whole folder again."
        )
    spul_config.check_weights(path)
    weights, encoder = read_weights(path)[WEIGHTS_KEY], None
    if with_encoder and has_encoder(config):
        path = find_file(adapter, ENCODER_NAME, **hub)
        if path is None:
            raise ValueError(
                f"{where} holds no {ENCODER_NAME}: the {PeftType(config.peft_type).value} prompt in it can be used, "
                "but not trained further, since plain PEFT saves only the encoder's output. Load it with "
                "is_trainable=False, or save with spul."
            )
        found = weight_shapes(path)
        layers = getattr(config, "encoder_num_layers", 1)
        if not is_count(layers, least=1) or layers > max(len(found), 2):
            raise ValueError(f"{where}: encoder_num_layers is {layers!r}; {ENCODER_NAME} holds {len(found)} tensors.")
        _check_shapes(path, found, encoder_shapes(config))
        encoder = read_weights(path)
    return SavedPrompt(where, config, spul_config, weights, encoder)


def _read_config(adapter: str | os.PathLike, where: str, **hub: Any) -> tuple[Any, str]:
    """The config of a saved prompt, and the position that it tells."""
    path = find_file(adapter, CONFIG_NAME, **hub)
    if path is None:
        raise ValueError(f"{where} holds no {CONFIG_NAME}; pass a folder or a Hub name of a saved prompt.")
    saved = read_object(path)
    peft_type, position = read_type(saved.get("peft_type"))
    try:
        if position == "start":
            config: Any = PeftConfig.from_pretrained(os.fspath(adapter), **hub)
        else:  # PEFT reads it under its own type only
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, CONFIG_NAME).write_text(json.dumps(saved | {"peft_type": peft_type}), encoding="utf-8")
                config = PeftConfig.from_pretrained(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no config that this version of PEFT knows ({type(error).__name__}: {error}); expected one of "
            "PEFT's prompt-learning configs. Save the prompt again, or update PEFT."
        ) from error
    if not config.is_prompt_learning:
        raise TypeError(
            f"{where} holds a {type(config).__name__} adapter, not a soft prompt; expected one of PEFT's "
            f"prompt-learning configs: {', '.join(one.__name__ for one in PROMPT_CONFIGS)}."
        )
    check_peft_config(config)
    check_position(position, config)
    without_start(config)
    return config, position


def _check_shapes(path: Path, found: Shapes, expected: Shapes) -> None:
    """Raise unless a weights' file has the tensors that the config beside it describes."""
    if found != expected:
        name = min(key for key in found | expected if found.get(key) != expected.get(key))
        raise ValueError(
            f"{path} does not fit the {CONFIG_NAME} beside it: {name!r} has the shape {found.get(name)}, by the "
            f"config {expected.get(name)} (None: no such tensor). Copy or download the whole folder again."
        )


def put(model: PromptAdapters, saved: SavedPrompt, adapter_name: str) -> None:
    """Copy a saved state into a prompt of a model, including the encoder of P-tuning; the whole of it or nothing.

    Raises:
        ValueError: if its shapes differ from this prompt's, or the encoder does not belong to the saved prompt.
    """
    encoder = model.prompt_encoder[adapter_name]
    state = {"embedding.weight": saved.weights}
    frozen = getattr(model.peft_config[adapter_name], "num_frozen_tokens", None)
    if frozen is not None:  # a cartridge keeps its frozen virtual tokens apart
        state = {"frozen_embedding": saved.weights[:frozen], "trainable_embedding": saved.weights[frozen:]}
        state = {name: rows for name, rows in state.items() if len(rows)}
    elif _trains_encoder(model, adapter_name):
        assert saved.encoder is not None
        state = saved.encoder
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        raise ValueError(
            f"the prompt in {saved.where} has the shapes {found}, this model's {expected} (virtual tokens, width); "
            "load it with its own config, on the base model it was trained for."
        )
    before = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    try:
        encoder.load_state_dict(state, strict=True)
        if saved.encoder is not None and _trains_encoder(model, adapter_name):
            output, rows = model.get_prompt_embedding_to_save(adapter_name).float(), saved.weights.float()
            if not (output - rows).norm() <= ROUNDING * rows.norm():
                raise ValueError(
                    f"{ENCODER_NAME} in {saved.where} does not belong to the {WEIGHTS_NAME} beside it, as after an "
                    "interrupted save; load the prompt with is_trainable=False, or resume from another checkpoint."
                )
    except BaseException:
        encoder.load_state_dict(before, strict=True)
        raise


def load_into(model: PromptAdapters, adapter: str | os.PathLike, adapter_name: str, **hub: Any) -> None:
    """Load a prompt into a model, as a new one or into one that is there; see `SoftPromptUnlearner.load_adapter`."""
    present = model.peft_config.get(adapter_name)
    live = present is not None and not present.inference_mode
    saved = read(adapter, with_encoder=live, **hub)
    if present is not None and present.peft_type != saved.config.peft_type:
        raise ValueError(
            f"{saved.where} holds a {PeftType(saved.config.peft_type).value} prompt, and {adapter_name!r} in this "
            f"model is {PeftType(present.peft_type).value}; load it under a new name, or on its own: "
            "SoftPromptUnlearner.from_pretrained."
        )
    record = model.spul_configs.get(adapter_name)
    if live and record.prompt_position != saved.spul_config.prompt_position:
        raise ValueError(
            f"the prompt in {saved.where} stands at {saved.spul_config.prompt_position!r}, and {adapter_name!r} in "
            f"this model at {record.prompt_position!r}; load it under a new name, or on its own: "
            "SoftPromptUnlearner.from_pretrained."
        )
    if live:
        put(model, saved, adapter_name)
        record.take_weights_of(saved.spul_config)
        return
    check_base(model.get_base_model(), saved.config, saved.spul_config, adapter)
    saved.config.inference_mode = True
    with registry_unchanged_on_error(model):
        if present is None:
            model.add_adapter(adapter_name, saved.config, prompt_position=saved.spul_config.prompt_position)
        put(model, saved, adapter_name)
        model.spul_configs[adapter_name] = saved.spul_config
        model.eval()


@contextmanager
def registry_unchanged_on_error(model: PromptAdapters) -> Iterator[None]:
    """Context manager: if the block raises, the model has the prompts, records, kind and active one it had before."""
    prompts = set(getattr(model, "prompt_encoder", ()))
    registries = [model.peft_config, model.__dict__.get("prompt_tokens", {}), model.__dict__.get("spul_configs", {})]
    before, active, kind = [dict(registry) for registry in registries], model.active_adapter, model.peft_type
    with unchanged_on_error(model):
        try:
            yield
        except BaseException:
            for registry, entries in zip(registries, before, strict=True):
                registry.clear()
                registry.update(entries)
            for name in set(getattr(model, "prompt_encoder", ())) - prompts:
                del model.prompt_encoder[name]
            model.active_adapter, model.peft_type = active, kind
            raise


def check_base(base: Any, config: Any, spul_config: SpulConfig, adapter: str | os.PathLike) -> None:
    """Raise if the prompt does not fit the base; warn if the base's weights differ from those of training."""
    trained_on = config.base_model_name_or_path or "another model"
    advice = f"Load it on the model it was trained for ({trained_on})."
    found: tuple[int, ...]
    expected: tuple[int, ...]
    if holds_states(config):
        fresh = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
        fresh = filled(base, fresh)
        found, expected = (config.num_layers, config.token_dim), prefix_shape(fresh, base.config)
        what = "(layers, width of keys)"
    else:
        found, expected = (config.token_dim,), (base.get_input_embeddings().weight.shape[1],)
        what = "(width)"
    if found != expected:
        raise ValueError(
            f"the prompt in {str(adapter)!r} does not fit this base: it has {what} {found}, the base {expected}. "
            + advice
        )
    spul_config.warn_if_base_differs(base, f"the prompt in {str(adapter)!r} was", advice)

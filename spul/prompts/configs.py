"""Prompt configs of PEFT that spul supports, and the bases that they go with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PeftType,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from torch import nn
from transformers import PreTrainedModel

from ..models.causal_lm import check_bare, check_no_layers
from ..models.compat_devices import device_of
from ..models.unlearner import PREFIX_TYPES, PROMPT_TYPES
from ..records.fields import is_count, is_finite_number
from ..records.weights import Shapes

PROMPT_CONFIGS = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig, CartridgeConfig)
CONFIG_NAMES = dict(zip(("prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"), PROMPT_CONFIGS, strict=True))


def prompt_config(name: str, num_virtual_tokens: int = 30, encoder_hidden_size: int = 128) -> PeftConfig:
    """A prompt's config by the name of its type.

    Args:
        name: one of `CONFIG_NAMES`: `"prompt_tuning"`, `"p_tuning"`, `"prefix_tuning"`, `"cartridge"`.
        num_virtual_tokens: length of the prompt.
        encoder_hidden_size: width of P-tuning's network, the paper's unless given; the other types have none.

    Raises:
        ValueError: if there is no type of that name.
    """
    if name not in CONFIG_NAMES:
        raise ValueError(f"prompt type {name!r} is not known; expected one of {', '.join(CONFIG_NAMES)}.")
    own: dict[str, Any] = {"encoder_hidden_size": encoder_hidden_size} if name == "p_tuning" else {}
    return CONFIG_NAMES[name](task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens, **own)


def check_peft_config(peft_config: Any) -> None:
    """Raise unless the config is a prompt config for a causal LM, with virtual tokens."""
    # peft_type is compared too: PEFT's multitask config is a subclass of PromptTuningConfig.
    is_one = isinstance(peft_config, PROMPT_CONFIGS) and peft_config.peft_type in PROMPT_TYPES
    if not is_one:
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected one of PEFT's prompt-learning configs: "
            f"{', '.join(c.__name__ for c in PROMPT_CONFIGS)}."
        )
    num = peft_config.num_virtual_tokens
    if not is_count(num, least=1):
        raise ValueError(
            f"peft_config.num_virtual_tokens={num!r}; expected a whole number of at least 1, such as 30: without "
            "virtual tokens there is nothing to train."
        )
    hidden = getattr(peft_config, "encoder_hidden_size", None)
    if hidden is not None and not is_count(hidden, least=1):
        raise ValueError(
            f"peft_config.encoder_hidden_size={hidden!r}; expected a whole number of at least 1, such as 128, or None "
            "for the base's width."
        )
    if getattr(peft_config, "num_frozen_tokens", 0) == num:
        raise ValueError(
            f"peft_config.num_frozen_tokens={num}, and num_virtual_tokens is as large: expected fewer, such as 1: "
            "frozen virtual tokens do not train."
        )
    if peft_config.modules_to_save is not None:
        raise ValueError(
            f"peft_config.modules_to_save={peft_config.modules_to_save!r}: expected None; a soft prompt leaves the "
            "base's modules as they are."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"peft_config.task_type={peft_config.task_type!r}; expected 'CAUSAL_LM'.")


def check_causal_lm(model: Any) -> None:
    """Raise unless a model can be the base of a soft prompt.

    Raises:
        TypeError: if it is not a module, has an adapter, or unlearning layers are attached to it.
    """
    check_bare(model, nn.Module)
    check_no_layers(model)


def check_sizes(config: Any, where: str) -> None:
    """Raise unless the numbers in a saved prompt's config, by which PEFT allocates memory, are whole and above 0.

    Args:
        config: a prompt config that was read from a file.
        where: the file or folder, for the message.

    Raises:
        ValueError: if one is not.
    """
    needed = ["num_virtual_tokens", "token_dim"]
    if holds_states(config):
        needed += ["num_layers", "num_attention_heads"]
    for name in needed:
        if not is_count(getattr(config, name), least=1):
            raise ValueError(
                f"{where}: {name} is {getattr(config, name)!r}; expected an integer of at least 1, as PEFT writes it."
            )
    base = config.base_model_name_or_path
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{where}: base_model_name_or_path is {base!r}; expected text, or null.")
    hidden = getattr(config, "encoder_hidden_size", None)
    if hidden is not None and not is_count(hidden, least=1):
        raise ValueError(f"{where}: encoder_hidden_size is {hidden!r}; expected an integer of at least 1, or null.")
    frozen = getattr(config, "num_frozen_tokens", 0)
    if not is_count(frozen, least=0):
        raise ValueError(f"{where}: num_frozen_tokens is {frozen!r}; expected an integer of at least 0.")
    dropout = getattr(config, "encoder_dropout", 0.0)
    if not is_finite_number(dropout) or not 0 <= dropout <= 1:
        raise ValueError(f"{where}: encoder_dropout is {dropout!r}; expected a number from 0 to 1.")
    if config.num_transformer_submodules not in (None, 1):
        raise ValueError(
            f"{where}: num_transformer_submodules is {config.num_transformer_submodules!r}; expected 1, since a "
            "causal LM is one transformer."
        )
    if holds_states(config) and config.token_dim % config.num_attention_heads:
        raise ValueError(
            f"{where}: num_attention_heads is {config.num_attention_heads}; expected a divisor of token_dim, "
            f"{config.token_dim}."
        )


def holds_states(config: Any) -> bool:
    """Whether a prompt is keys and values (prefix tuning, cartridges), and no input embeddings."""
    return config.peft_type in PREFIX_TYPES


def has_encoder(config: Any) -> bool:
    """Whether a trainable prompt is computed by an encoder (P-tuning, prefix tuning with a projection)."""
    return config.peft_type == PeftType.P_TUNING or bool(getattr(config, "prefix_projection", False))


def prompt_shape(config: Any) -> tuple[int, int]:
    """Shape of the prompt that PEFT saves: virtual tokens, and their embeddings or all layers' keys and values."""
    width = config.token_dim * (2 * config.num_layers if holds_states(config) else 1)
    return config.num_virtual_tokens, width


def encoder_shapes(config: Any) -> Shapes:
    """Shapes of the parameters of a trainable prompt's encoder, without allocating them."""
    config = copy.copy(config)
    config.inference_mode, config.num_transformer_submodules = False, 1
    config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
    kind = PrefixEncoder if holds_states(config) else PromptEncoder
    try:
        with torch.device("meta"):
            encoder = kind(config)
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"PEFT cannot build the encoder that adapter_config.json describes: {str(error).rstrip('.')}. Copy or "
            "download the folder again, or load the prompt with is_trainable=False."
        ) from error
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def without_start(config: PeftConfig) -> None:
    """Reset how a prompt is initialized, once its weights are known.

    PEFT initializes a trainable prompt before its weights are loaded, and for `prompt_tuning_init="TEXT"` fetches the
    tokenizer that the config names.
    """
    if isinstance(config, PromptTuningConfig):
        config.prompt_tuning_init = PromptTuningInit.RANDOM
        config.prompt_tuning_init_text = config.tokenizer_name_or_path = config.tokenizer_kwargs = None


def filled(model: nn.Module, peft_config: Any) -> Any:
    """A copy of a prompt's config, with sizes that PEFT may not find, since families have names of their own for them.

    PEFT asks for a number of attention heads also where there is no attention (Mamba, RWKV) or where no prompt uses
    it: 1 then.

    Args:
        model: the base.
        peft_config: the prompt's config, which stays as it is: it may be that of a prompt of another base, too. Sizes
            that are given stay.
    """
    peft_config = copy.deepcopy(peft_config)
    if not isinstance(model, PreTrainedModel):
        return peft_config
    text_config = model.config.get_text_config()
    found = {
        "num_layers": "num_hidden_layers",
        "token_dim": "hidden_size",
        "num_attention_heads": "num_attention_heads",
    }
    for name, own in found.items():
        size = getattr(text_config, own, 1 if name == "num_attention_heads" else None)
        if getattr(peft_config, name) is None and is_count(size, least=1):
            setattr(peft_config, name, size)
    return peft_config


def check_promptable(model: nn.Module, peft_config: Any) -> None:
    """Raise unless a base can be put under a prompt.

    Args:
        model: the base.
        peft_config: the prompt's config.

    Raises:
        TypeError: if it is an encoder-decoder, or has no language modeling head.
        ValueError: if it has no weights, its config asks for tuples, PEFT would read embeddings that are offloaded,
            embeddings of the prompt's width are not its input, or a prompt would train on weights that change with
            the mode (RWKV).
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    causal = "expected a causal LM, as AutoModelForCausalLM.from_pretrained gives it"
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"model is a {name}, an encoder-decoder; {causal}: prompts stand before a decoder's text.")
    if isinstance(model, PreTrainedModel) and (model.get_output_embeddings() is None or not model.can_generate()):
        raise TypeError(f"model is a {name}, which has no language modeling head or does not generate; {causal}.")
    if not isinstance(model, PreTrainedModel):
        return
    if getattr(config, "return_dict", True) is False:
        raise ValueError(
            f"config.return_dict of the {name} is False: in place of outputs with names it would return tuples, which "
            "transformers itself fails to read. Leave it True, and give return_dict=False to forward."
        )
    embeddings: Any = model.get_input_embeddings()
    on_meta = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    hooked = any(hasattr(m, "_hf_hook") for m in model.modules())
    if on_meta and (not hooked or device_of(embeddings).type == "meta"):
        raise ValueError(
            f"{len(on_meta)} parameters of the {name} are on the meta device, without values ({on_meta[0]}, ...). "
            "Load them, model = AutoModelForCausalLM.from_pretrained(...); where they are to be offloaded, by "
            "device_map, or by accelerate's cpu_offload or disk_offload."
        )
    init = getattr(peft_config, "prompt_tuning_init", PromptTuningInit.RANDOM)
    if embeddings.weight.is_meta and init != PromptTuningInit.RANDOM:
        raise ValueError(
            f"prompt_tuning_init={PromptTuningInit(init).value!r} reads the input embeddings of the {name} in place, "
            "and they are offloaded. Leave it out, and give start=InstructionStart(text, tokenizer) or "
            "start='vocabulary'."
        )
    every = getattr(config, "rescale_every", 0) if getattr(config, "model_type", "") == "rwkv" else 0
    if every > 0 and not peft_config.inference_mode:
        raise ValueError(
            f"{name} rescales its weights in place from training to evaluation mode and back (rescale_every={every}): "
            "a backward pass after an evaluation would find other weights than its forward, and the fingerprint "
            "would depend on the mode. Load it without: "
            "AutoModelForCausalLM.from_pretrained(..., rescale_every=0)."
        )
    if holds_states(peft_config):
        return
    text_config: Any = model.config.get_text_config()
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"{name} looks up each input token in every layer (hidden_size_per_layer_input), and virtual tokens of "
            f"{type(peft_config).__name__} are in no vocabulary. Use PrefixTuningConfig."
        )
    width = embeddings.embedding_dim if hasattr(embeddings, "embedding_dim") else embeddings.weight.shape[-1]
    given = peft_config.token_dim or getattr(text_config, "hidden_size", width)
    if given != width:
        raise ValueError(
            f"virtual tokens have token_dim={given}, and the input embeddings of {name} {width} numbers, which it "
            f"projects. Give that width, {type(peft_config).__name__}(token_dim={width}, ...), or use "
            "PrefixTuningConfig."
        )

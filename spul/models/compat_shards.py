"""Private and fast-moving APIs of torch, accelerate and DeepSpeed about shards; others are in `compat`."""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import TrainingArguments

from .compat import keep_4bit_differentiable, packed_bytes

# ---- processes ----


def by_device(device: torch.device) -> DistributedType:
    """The kind of processes that DDP averages gradients of, on a device; accelerate names most by the device's type.

    Raises:
        ValueError: if accelerate has none for it.
    """
    name = "MULTI_GPU" if device.type == "cuda" else f"MULTI_{device.type.upper()}"
    kinds = DistributedType.__members__
    if name not in kinds:
        raise ValueError(
            f"this accelerate has no {name}, the kind of processes that share work on a device of the type "
            f"{device.type!r}, so that a base is not sharded there; use a device of another type, or one process."
        )
    return kinds[name]


def fsdp_plugin(args: TrainingArguments, accelerator: Accelerator) -> Any:
    """The settings of FSDP by training arguments, or by `accelerate launch`; None without FSDP.

    On CPUs accelerate drops them without a word.
    """
    if (known := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        return known
    given = getattr(args, "fsdp_plugin_args", None)
    if given is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return FullyShardedDataParallelPlugin(**(given or {}))


def use_data_parallel(accelerator: Accelerator, replaces_fsdp: bool) -> None:
    """Make accelerate treat processes as those of DDP where FSDP is configured, or as configured again.

    The state is one for all accelerators of a process, and the kind has no public setter.
    """
    state: Any = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        return
    state.distributed_type = by_device(accelerator.device) if replaces_fsdp else DistributedType.FSDP


def zero3_config(args: TrainingArguments) -> Any:
    """The config of DeepSpeed by training arguments, or by `accelerate launch`, if it asks for ZeRO-3; else None.

    Its values of "auto" are those of the arguments, and `mismatches` has what differs from them.
    """
    plugin: Any = args.deepspeed_plugin
    if plugin is None or not plugin.hf_ds_config.is_zero3():
        return None
    if (known := getattr(args, "hf_deepspeed_config", None)) is not None:
        return known
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    found = HfTrainerDeepSpeedConfig(copy.deepcopy(plugin.hf_ds_config.config))
    found.trainer_config_process(args)
    return found


@contextmanager
def without_deepspeed(args: TrainingArguments) -> Iterator[None]:
    """Let accelerate begin as without DeepSpeed, for processes of DDP and mixed precision by autocast.

    Whether DeepSpeed is used is a kind of processes to accelerate, whose state has no public setter.
    """
    state: Any = PartialState()
    state.distributed_type = by_device(state.device)
    plugin, args.deepspeed_plugin = args.deepspeed_plugin, None
    launched = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        args.deepspeed_plugin = plugin
        if launched is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = launched


def replicated(model: nn.Module, base: nn.Module) -> nn.parallel.DistributedDataParallel:
    """A model under DDP that leaves alone the base's frozen weights and buffers, shards among them.

    DDP reads names to leave alone from an attribute whose setter is private.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    theirs = {id(tensor) for tensor in (*base.parameters(), *base.buffers())} - trained
    named: Any = itertools.chain(model.named_parameters(), model.named_buffers())
    names = [name for name, tensor in named if id(tensor) in theirs]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return nn.parallel.DistributedDataParallel(model)


# ---- DeepSpeed: what its engine does for a module without an optimizer, apart from the engine ----


# Settings of `zero_optimization` that change what is computed, gathered or kept, and are not carried out.
NOT_OF_FROZEN_LAYERS = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "module_granularity_threshold",
    "leaf_module",
    "zenflow",
)


def zero_settings(zero: Mapping[str, Any]) -> Any:
    """DeepSpeed's settings by the section `zero_optimization` of a config; what is "auto" is its own default.

    Raises:
        ValueError: for another stage than 3, for what `partition` does not carry out, and for names or values that
            DeepSpeed does not know.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    found = DeepSpeedConfig(_config_of(zero)).zero_config
    if found.stage != 3:
        raise ValueError(f"zero_optimization's stage={int(found.stage)}: expected stage 3, which shards weights.")
    fields = type(found).model_fields
    ignored = [
        name
        for name in NOT_OF_FROZEN_LAYERS
        if name in fields and getattr(found, name) != fields[name].get_default(call_default_factory=True)
    ]
    if found.offload_optimizer is not None and found.offload_optimizer.device != "none":
        ignored.append("offload_optimizer")
    if ignored:
        raise ValueError(
            f"zero_optimization's {', '.join(ignored)}: not for the frozen layers that spul shards, beside which a "
            "prompt or LoRA trains by an optimizer of its own; leave these settings out."
        )
    return found


def precision_settings(config: Mapping[str, Any]) -> list[str]:
    """The names of settings of half precision in a config of DeepSpeed that are on and not its own defaults.

    Transformers' examples write the defaults out: they are those of any loss scaler, or nearly.
    """
    found = []
    for section, kind in {"fp16": "DeepSpeedFP16Config", "bf16": "DeepSpeedBF16Config"}.items():
        given = dict(config.get(section) or {})
        if given.pop("enabled", False):
            from deepspeed.runtime import precision_config

            plain = getattr(precision_config, kind)().model_dump()
            found += [f"{section}.{name}" for name, value in given.items() if value != plain.get(name, ...)]
    return found


def _config_of(zero: Mapping[str, Any]) -> dict[str, Any]:
    section = {name: value for name, value in zero.items() if value != "auto"}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}


def partition(module: nn.Module, zero: Mapping[str, Any], settings: Any) -> None:
    """Partition all parameters of a module by ZeRO-3, gathered by hooks of its submodules in each pass.

    Args:
        module: its modules hold each parameter once. Each call of it begins a pass.
        zero: the section `zero_optimization` of a config.
        settings: what `zero_settings` has of it.
    """
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False)  # over the processes that are there
    offload = DeepSpeedZeRoOffload(
        module,
        NoopTimer(),
        _config_of(zero),
        overlap_comm=settings.overlap_comm,
        prefetch_bucket_size=settings.prefetch_bucket_size,
        max_reuse_distance=settings.max_reuse_distance,
        max_live_parameters=settings.max_live_parameters,
        param_persistence_threshold=settings.param_persistence_threshold,
        model_persistence_threshold=settings.model_persistence_threshold,
        offload_param_config=settings.offload_param,
        log_trace_cache_warnings=settings.log_trace_cache_warnings,
    )
    for one in module.modules():
        _release_by_pass(one, offload)


def _release_by_pass(module: Any, offload: Any) -> None:
    """Release a module's weights once the gradients of all inputs of one pass have come, in the backward pass of it.

    DeepSpeed counts the gradients to come on the module, from 0 in each pass: with two passes before a backward pass,
    or one without gradients between, as of a live reference, it would keep the weights gathered from then on.
    """

    class Inputs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: Tensor) -> Tensor:
            ctx.awaited = awaited[0]
            ctx.awaited[0] += given.requires_grad
            return given.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            ctx.awaited[0] -= 1
            if not ctx.awaited[0]:
                offload.post_sub_module_backward_function(module)
            return gradients

    awaited: list[list[int]] = [[0]]

    def begin(*_: Any) -> None:
        awaited[0] = [0]

    module.post_bwd_fn = Inputs  # called by a hook of DeepSpeed, which makes one unless it is there
    module.register_forward_pre_hook(begin, prepend=True)


# ---- weights in 4 bit: bitsandbytes is loaded with the first such base ----

# The first torch whose `fully_shard` was seen to take weights of integers. Others make parameters of them that are to
# have gradients, which integers cannot (torch issue 177844).
TORCH_THAT_SHARDS_BYTES = "2.13"


def shards_bytes() -> bool:
    """Whether this torch shards weights of integers."""
    return torch.__version__ >= TORCH_THAT_SHARDS_BYTES  # torch's own type, which compares as versions


def layers_in_4bit(module: nn.Module) -> list[Any]:
    """The layers of bitsandbytes in a module whose weights are stored in 4 bit."""
    library = sys.modules.get("bitsandbytes")
    return [] if library is None else [layer for layer in module.modules() if isinstance(layer, library.nn.Linear4bit)]


def prepare_4bit_for_shards(module: nn.Module, device: torch.device) -> None:
    """Move a module's 4-bit layers to a device, their weights stored as bytes, whatever `bnb_4bit_quant_storage` was.

    FSDP puts plain parameters in the place of the weights, without the state that unpacks them; a layer that holds the
    state itself unpacks those. Bytes are gathered as they are: on a GPU, weights stored as bfloat16 may read as
    not-a-number, which FSDP's copies change (bitsandbytes issue 1945).
    """
    keep_4bit_differentiable(module)
    for layer in layers_in_4bit(module):
        weight = layer.weight
        weight.quant_state.to(device)
        weight.data = packed_bytes(weight).to(device)
        weight.quant_storage = layer.quant_storage = torch.uint8
        layer.quant_state = weight.quant_state

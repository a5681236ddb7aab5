"""All private or fast-moving APIs of torch, transformers, PEFT, accelerate, bitsandbytes and datasets that spul uses.

Those of gradient checkpointing stand in `compat_checkpointing`, those of attention in `compat_attention`, those of a
module's insides in `compat_modules`, those of devices and memory in `compat_devices`, those of shards in
`compat_shards`, and caches in `compat_cache`. No other module of spul may import or read them, the hooks of `Trainer`
that `UnlearningTrainer` overrides aside. When a new version of one of these libraries breaks spul, look here.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from typing import Any

import pyarrow
import torch
import transformers
import transformers.modeling_utils
from accelerate import PartialState as PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from accelerate.utils.memory import should_reduce_batch_size as should_reduce_batch_size
from datasets import Dataset
from peft import PeftModel, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer_pt_utils import EvalLoopContainer as EvalLoopContainer
from transformers.trainer_pt_utils import get_length_grouped_indices as get_length_grouped_indices
from transformers.trainer_pt_utils import nested_concat as nested_concat
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR as CHECKPOINT_PREFIX  # noqa: F401
from transformers.trainer_utils import PredictionOutput as PredictionOutput
from transformers.trainer_utils import denumpify_detensorize as denumpify_detensorize
from transformers.trainer_utils import has_length as has_length
from transformers.trainer_utils import speed_metrics as speed_metrics

# Rows of a table that are taken at once.
ROWS_TAKEN = 65_536

# ---- torch ----


def uncompiled(model: nn.Module) -> Any:
    """The module inside the wrapper of `torch.compile`, whose attribute `_orig_mod` is private; else the model."""
    return model._modules.get("_orig_mod", model)  # its own: PEFT models hand out their base's attributes, too


def is_without_batches(error: ValueError) -> bool:
    """Whether an error is that of accelerate's loader of a stream that gave no batch."""
    return str(error).startswith("Batch does not contain any data")


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs compiled: `torch.compile` wraps a module, `compile` marks one."""
    return any(uncompiled(m) is not m or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def reset_compiled() -> None:
    """Drop compiled graphs: torch does not check for forward hooks added or removed after compilation.

    `torch._dynamo` is loaded by the first compilation; before it there is nothing to drop.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is one of torch's dropout layers; their common base class is private."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold shards of the parameters: FSDP, which gathers them for a while, DTensor, or ZeRO-3."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded before a model is sharded
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 partitions a parameter; gathered or not, it marks its own."""
    return hasattr(parameter, "ds_id")


def num_dims(tensor: Tensor) -> int:
    """Number of dimensions of a tensor, also of one that ZeRO-3 partitions, whose own is then one."""
    return len(getattr(tensor, "ds_shape", tensor.shape))


def gathers_weights(model: nn.Module) -> bool:
    """Whether hooks of ZeRO-3 gather a model's weights where they are used; it marks modules that have them."""
    return any("ds_id" in vars(module) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes hold shards of, gathered by all of them together; any other as it is."""
    if is_partitioned(tensor):
        import deepspeed  # which has partitioned it

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- transformers: forwards ----


@functools.lru_cache(maxsize=32)
def takes_positions(model_class: type[nn.Module]) -> bool:
    """Whether a model class takes `logits_to_keep` of the shape (B, K).

    transformers has no flag for it: the versions that can do it, 5.21 and later, have `slice_logits_to_keep`, and only
    its own model classes are sure to use it.
    """
    return (
        hasattr(transformers.modeling_utils, "slice_logits_to_keep")
        and model_class.__module__.startswith("transformers.")
        and "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )


def takes_position_ids(model: nn.Module) -> bool:
    """Whether a forward takes `position_ids`; families that do not, such as BLOOM, derive positions from the mask."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


# ---- transformers: Trainer. Imported above, not documented: checkpoint prefix, speed metrics, length groups, and what
# an evaluation returns and how it collects nested tensors of batches. ----


def save_training_args(args: TrainingArguments, folder: str | os.PathLike) -> None:
    """Write the arguments into a checkpoint under the name that `Trainer` reads; the name is not documented."""
    from transformers.trainer import TRAINING_ARGS_NAME  # slow to import, and only trainers need it

    torch.save(args, os.path.join(folder, TRAINING_ARGS_NAME))


# ---- PEFT ----


def adapter_enabled(model: PeftModel) -> bool:
    """Whether the active adapter takes part in the forward.

    PEFT marks a disabled prompt on the model, other adapters also in each of their layers (`disable_adapters`).
    """
    layers_disabled = any(getattr(m, "disable_adapters", False) is True for m in model.modules())
    return model.has_active_enabled_adapter and not layers_disabled


def prefix_shape(config: PrefixTuningConfig, model_config: Any) -> tuple[int, int]:
    """Number of layers and width of keys that PEFT gives a prefix on a base, also where its layers differ (Gemma 4).

    The function that fills in a prompt's config is not public.
    """
    filled: Any = _prepare_prompt_learning_config(config, model_config)
    return filled.num_layers, filled.token_dim


# Names of the modules that PEFT puts between a module and its parameters.
PEFT_WRAPPERS = r"\.((base_layer|original_module|token_adapter)\.)+"


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters without those of PEFT's adapters, by the names that they have without PEFT.

    PEFT wraps modules in place; which of a wrapper's parameters are the adapter's, only its base classes say.
    """
    adapters = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters += [f"{name}.{layer}." for layer in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            adapters.append(f"{name}.modules_to_save.")
    prefixes = tuple(adapters)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            yield re.sub(PEFT_WRAPPERS, ".", name), parameter


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT has put into a model: those under LoRA, those trained beside it, and so on."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def remove_peft_layers(model: Any) -> None:
    """Put the modules that PEFT has wrapped back in their place; its `unload` is of adapters that were put whole."""
    for name in reversed(peft_layers(model)):  # inner ones first
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, without_peft_wrapper(model.get_submodule(name)))
    if hasattr(model, "peft_config"):
        del model.peft_config


def without_peft_wrapper(module: Any) -> Any:
    """The module inside a wrapper of PEFT: under LoRA, or trained as a whole beside LoRA."""
    for inner in ("original_module", "base_layer"):
        module = getattr(module, inner, module)
    return module


# ---- accelerate: PartialState, imported above, and exchange between processes, in `accelerate.utils` ----


def gathered(items: list) -> list:
    """The items of all processes, in the order of processes."""
    return gather_object(items)


def moved(tensors: Any, device: torch.device | str) -> Any:
    """Tensors, also nested ones, on a device."""
    return send_to_device(tensors, device)


def broadcast(value: Any) -> Any:
    """The main process's value, in every process."""
    return broadcast_object_list([value])[0]


# ---- bitsandbytes ----


def is_quantized(model: Any) -> bool:
    """Whether a model was loaded in 8 or 4 bit; of transformers' two marks, either may be the only one."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights on a CPU; unpack those repacked already.

    In evaluation mode, some CPUs get a layout for inference (bitsandbytes 0.50) through which no gradient flows, not
    even in training mode afterwards: after one evaluation, a prompt would train on wrong gradients without an error.
    Both the flag and the inverse function are private.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            layer.weight.data, state = unpack(layer.weight.data, state)
            if state.absmax.ndim == 2:  # left transposed, and rounded to bfloat16, unless doubly quantized
                state.absmax = state.absmax.T.reshape(-1).float()
        layer.support_avx512bf16_for_cpu = False


class _Once(logging.Filter):
    """Lets each text through once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self.said
        self.said.add(text)
        return is_new


def say_kernels_once(model: Any) -> None:
    """Print once what bitsandbytes says of its kernels, for a model that it has quantized.

    Of 4 bit it is what `spul` holds back; in 8 bit each layer says in each pass that it casts its input.
    """
    if not is_quantized(model):
        return
    casts = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(one, _Once) for one in casts.filters):
        casts.addFilter(_Once())
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    holders = [one for one in logger.handlers if isinstance(one, MemoryHandler)]
    if holders and any(hasattr(module, "support_avx512bf16_for_cpu") for module in model.modules()):
        logger.propagate = True
        for holder in holders:
            logger.removeHandler(holder)
            for record in holder.buffer:
                logger.handle(record)


def packed_bytes(parameter: Tensor) -> Tensor:
    """A 4-bit weight as bytes of the shape (N, 1), whatever type it is stored as; any other parameter as it is."""
    is_4bit = type(parameter).__name__ == "Params4bit"
    return parameter.data.reshape(-1).view(torch.uint8).reshape(-1, 1) if is_4bit else parameter


# ---- datasets ----


def flattened(rows: Dataset) -> Dataset:
    """A data set whose table holds the selected rows alone, in their order, as `Dataset.flatten_indices` makes it.

    That copies row by row. A table in memory is copied here by columns; one on disk is left to `flatten_indices`,
    which writes to disk, too.
    """
    form = rows.format
    if rows._indices is None:
        return rows
    if rows.cache_files or form["type"] == "custom":
        return rows.flatten_indices()
    table, indices = rows.data.table, rows._indices.column(0)
    parts = [table.take(indices.slice(i, ROWS_TAKEN)) for i in range(0, len(indices), ROWS_TAKEN)]
    flat = Dataset(
        pyarrow.concat_tables(parts), info=rows.info.copy(), split=rows.split, fingerprint=rows._fingerprint
    )
    return flat.with_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])

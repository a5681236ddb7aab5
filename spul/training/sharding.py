"""Training on a sharded base: the frozen weights are divided among the processes, what trains is whole in each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..data.collator import ForgetRetainCollator
from ..models.compat import gathers_weights, is_sharded
from ..models.compat_checkpointing import is_reentrant
from ..models.compat_shards import (
    fsdp_plugin,
    precision_settings,
    replicated,
    use_data_parallel,
    without_deepspeed,
    zero3_config,
)
from ..models.protocol import Unlearner
from ..models.sharding import check_layers_alone, partition_layers, shard_layers
from ..records.digests import fingerprint

# Sections of a config of DeepSpeed that are carried out, or compared with the arguments; and those of its engine that
# say nothing of what is computed or written.
HONORED_BY_ZERO3 = (
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
)
WITHOUT_EFFECT = ("steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "checkpoint")


def check_zero3(config: Any, is_frozen: bool) -> None:
    """Raise for what a config of DeepSpeed with ZeRO-3 says that is not carried out.

    Args:
        config: `HfTrainerDeepSpeedConfig`.
        is_frozen: whether what it shards is a frozen base.

    Raises:
        ValueError: if it does.
    """
    if not is_frozen:
        raise ValueError(
            "deepspeed with ZeRO stage 3 is for a frozen base, under a prompt or LoRA; for weights that train use "
            "stage 1 or 2, or FSDP (version 2)."
        )
    others = {name: value for name, value in config.config.items() if name not in HONORED_BY_ZERO3 + WITHOUT_EFFECT}
    others |= dict.fromkeys(precision_settings(config.config), True)
    others["offload_optimizer"] = config.get_value("zero_optimization.offload_optimizer.device")
    if found := [name for name, value in others.items() if not _is_off(value)]:
        raise ValueError(
            f"deepspeed's {', '.join(found)}: a prompt or LoRA trains beside the base that ZeRO-3 shards, without "
            "DeepSpeed's engine, by the optimizer, schedule, precision and gradient_checkpointing of "
            "TrainingArguments; leave these sections out."
        )
    if config.mismatches:
        raise ValueError(
            f"DeepSpeed's config and TrainingArguments differ: {'; '.join(config.mismatches)}. Write 'auto' there."
        )


def _is_off(section: Any) -> bool:
    if isinstance(section, Mapping) and "enabled" in section:
        section = section["enabled"]
    return section in (None, False, 0, "none", {})


class ShardingTrainer(Trainer):
    """A `Trainer` that, under FSDP or ZeRO-3, shards the base of a prompt or LoRA, and replicates these (DDP).

    A prompt is small, so that dividing it saves nothing. Whole, it is saved, resumed and averaged as on one device.
    """

    _learner: Any
    _collator: ForgetRetainCollator
    unlearner: Unlearner
    # Whether the base is, or is about to be, sharded over the processes.
    _shards_base = False

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; a frozen base is sharded here, and what remains for `Trainer` is DDP.

        Raises:
            ValueError: for settings of FSDP or DeepSpeed that cannot be honored.
        """
        is_frozen = self.unlearner.can_be_sharded and not self.unlearner.trains_base
        zero = zero3_config(self.args)
        if zero is not None:
            check_zero3(zero, is_frozen)
        with nullcontext() if zero is None else without_deepspeed(self.args):
            super().create_accelerator_and_postprocess()
        plugin = fsdp_plugin(self.args, self.accelerator)
        use_data_parallel(self.accelerator, plugin is not None and is_frozen)
        is_configured = plugin is not None or zero is not None
        self._shards_base = is_frozen and (is_configured or is_sharded(self.unlearner.get_base_model()))
        if not self._shards_base:
            return
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP of version {plugin.fsdp_version} cannot shard the base under a prompt; use "
                "fsdp_version: 2 (in the file of accelerate, or TrainingArguments(fsdp_config={'version': 2}))."
            )
        if plugin is not None and plugin.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing in the settings of FSDP is not used for a frozen base; use "
                "TrainingArguments(gradient_checkpointing=True)."
            )
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            raise ValueError(
                "fp16_full_eval and bf16_full_eval convert the base, which is sharded; load it in that precision."
            )
        self.is_fsdp_enabled, self._plugin, self._zero = False, plugin, zero

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> Any:
        # The whole base may not fit into the memory of one device: it goes there in shards.
        return super()._move_model_to_device(model, device) if not self._shards_base else self.shard_base()

    def shard_base(self) -> None:
        """Shard the base of the model that trains, if this training shards it, and move the rest to the device.

        Raises:
            ValueError: if its processes might wait for each other.
        """
        base = self.unlearner.get_base_model()
        if not self._shards_base:
            return
        if is_reentrant(base):
            # It runs a backward pass of its own in each layer: where hooks run again in it (transformers 5.19), the
            # processes gather layers and average gradients in different orders.
            raise ValueError(
                "reentrant gradient checkpointing of a sharded base may wait for ever; use "
                "TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if self._zero is not None and not gathers_weights(base):
            partition_layers(self._learner, self._zero.config["zero_optimization"], self.args.device)
        if not is_sharded(base):
            mesh, dims = getattr(self.accelerator, "torch_device_mesh", None), self.accelerator.parallelism_config
            shard_layers(
                self._learner,
                self.args.device,
                None if mesh is None or dims is None else mesh[tuple(dims.fsdp_dim_names)],
                reshard_after_forward=self._plugin.reshard_after_forward is not False,
                cpu_offload=bool(self._plugin.cpu_offload),
            )
        check_layers_alone(base)
        for parameter in self._learner.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.args.device)
        fingerprint(base)  # of all processes together, while all are here; it is remembered

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not self._shards_base or not training:
            return super()._wrap_model(model, training, dataloader)
        self.shard_base()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast
        return replicated(prepared, self.unlearner.get_base_model())

    @property
    def shares(self) -> tuple[int, int]:
        """Number of this process, and how many divide the rows of an evaluation: (0, 1) where all run all of them.

        The processes of a sharded base must run the same forwards.
        """
        if self._shards_base:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

"""A frozen base whose decoder layers are sharded over processes (FSDP2, ZeRO-3); all else is whole in each of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .causal_lm import bare_model, decoder_layers
from .compat import gathers_weights, is_partitioned, is_quantized, is_sharded, whole
from .compat_shards import (
    TORCH_THAT_SHARDS_BYTES,
    layers_in_4bit,
    partition,
    prepare_4bit_for_shards,
    shards_bytes,
    zero_settings,
)

# Of each decoder whose layers nothing gathers yet, the hook that refuses its forwards.
_refused: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def shard_layers(
    model: nn.Module,
    device: torch.device | str | None = None,
    mesh: Any = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard the frozen weights of a base's decoder layers over all processes, in place, by torch's `fully_shard`.

    Each process keeps a share of every layer, and gathers a layer when it computes it. Embeddings, the final norm, the
    output head and all parameters that train stay whole in every process: a few per cent of a large model, which are
    then read as ever. Every process must run the same forwards afterwards, in the same order. The weights are those of
    the first process. A base in 4 bit (bitsandbytes) is as each process loaded it, and its scales stay whole.

    Args:
        model: a causal LM of transformers, or one under a prompt or LoRA.
        device: where this process computes; the current GPU unless given, or the CPU without one.
        mesh: a `DeviceMesh` over the processes; None is one dimension of all of them.
        reshard_after_forward: False keeps gathered layers until the backward pass: faster, and saves no memory then.
        cpu_offload: whether shards wait in the memory of the CPU.

    Raises:
        RuntimeError: if no process group was started, as `accelerate launch` and `torchrun` do.
        ValueError: if the base trains, is sharded already, has weights that are not in memory, or is quantized
            otherwise than in 4 bit by bitsandbytes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    base: Any = bare_model(model)
    _check_processes("shard_layers")
    if is_sharded(base):
        raise ValueError(f"{type(base).__name__} is sharded already; pass it as it was loaded.")
    layers, trained, sharded = _parts(base, "shard_layers")
    _check_quantization(base, layers, sharded)
    device = _device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),)) if mesh is None else mesh
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    settings["offload_policy"] = CPUOffloadPolicy(device.type != "cpu") if cpu_offload else OffloadPolicy()
    for layer in layers:  # one at a time: no process needs room for all of them on its device
        prepare_4bit_for_shards(layer, device)
        _place(layer, device, base)
        own = trained & set(layer.parameters())
        fully_shard(layer, ignored_params=own, **settings)
    _place(base, device, base, but=sharded)
    rest = set(base.parameters()) - {parameter for layer in layers for parameter in layer.parameters()}
    fully_shard(base.base_model, ignored_params=rest | trained, **settings)


def partition_layers(
    model: nn.Module, zero_optimization: Mapping[str, Any], device: torch.device | str | None = None
) -> None:
    """Shard the frozen weights of a base's decoder layers over all processes, in place, by DeepSpeed's ZeRO-3.

    As `shard_layers` does by torch: a layer's weights are gathered where they are used, all else is whole in every
    process, and every process must run the same forwards, in the same order. A base that was loaded in shards, as
    transformers does while `TrainingArguments` with ZeRO-3 are at hand, gets all but its layers back whole.

    Args:
        model: a causal LM of transformers, or one under a prompt or LoRA.
        zero_optimization: this section of a config of DeepSpeed. What it says of weights holds, such as
            `offload_param` and `stage3_max_live_parameters`; "auto" is DeepSpeed's own default.
        device: where this process computes; the current GPU unless given, or the CPU without one.

    Raises:
        RuntimeError: if no process group was started, as `accelerate launch`, `deepspeed` and `torchrun` do.
        ValueError: if the base trains, is sharded in another way, has weights that are not in memory, is quantized, or
            has a module that holds weights beside modules with weights of their own; for settings of another stage, or
            that are not carried out, such as `offload_optimizer`.
    """
    base: Any = bare_model(model)
    _check_processes("partition_layers")
    settings = zero_settings(zero_optimization)
    if is_quantized(base):
        raise ValueError(
            f"{type(base).__name__} is quantized, which ZeRO-3 does not partition; use FSDP (version 2) for a base in "
            "4 bit, or a base that is not quantized."
        )
    keep_rest_whole(base)
    layers, trained, sharded = _parts(base, "partition_layers")
    if gathers_weights(base) or (is_sharded(base) and not all(map(is_partitioned, sharded))):
        raise ValueError(f"{type(base).__name__} is sharded already; pass it as it was loaded.")
    owners = []
    for module in (module for layer in layers for module in layer.modules()):
        own = set(module.parameters(recurse=False))
        if not own - trained:
            continue
        if own & trained or set(module.parameters()) - own:
            raise ValueError(
                f"{type(module).__name__} of {type(base).__name__} holds weights beside others that train or that its "
                "modules hold; ZeRO-3 gathers them by modules. Use FSDP (version 2)."
            )
        owners.append(module)
    _place(base, _device(device), base, but=sharded)
    passes = _Passes(owners)
    partition(passes, zero_optimization, settings)
    if (refusal := _refused.pop(base.base_model, None)) is not None:
        refusal.remove()
    base.base_model.register_forward_pre_hook(lambda *_: passes())


class _Passes(nn.Module):
    """The modules whose weights are partitioned, which DeepSpeed takes as one: its call begins a pass of the base."""

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)

    def forward(self) -> None:
        """Nothing: the base calls its modules itself."""


@torch.no_grad()
def keep_rest_whole(model: nn.Module) -> None:
    """Give a base that ZeRO-3 has partitioned its weights outside the decoder layers back, whole in every process.

    Its forwards are refused, with what to do, until `partition_layers` has its layers gathered.
    """
    base: Any = bare_model(model)
    if not any(map(is_partitioned, base.parameters())):
        return
    within = {parameter for layer in decoder_layers(base) for parameter in layer.parameters()}
    found: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_partitioned(parameter) and parameter not in within:
                if parameter not in found:
                    found[parameter] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
                setattr(module, name, found[parameter])
    if not gathers_weights(base) and base.base_model not in _refused:
        _refused[base.base_model] = base.base_model.register_forward_pre_hook(lambda *_: check_gathered(base))


def _check_processes(name: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{name} needs several processes; start the program by `accelerate launch` or `torchrun`.")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)


def _parts(base: Any, name: str) -> tuple[list[nn.Module], set[nn.Parameter], set[nn.Parameter]]:
    """The decoder layers, the parameters of the base that train, and the others of its layers, which are sharded.

    Raises:
        ValueError: if some weights are not in memory, or no weight of the layers is frozen.
    """
    if found := [name for name, parameter in base.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{len(found)} weights of {type(base).__name__} are not in memory, such as {found[0]}; load it without "
            "device_map."
        )
    trained = {parameter for parameter in base.parameters() if parameter.requires_grad}
    layers = list(decoder_layers(base))
    sharded = {parameter for layer in layers for parameter in layer.parameters()} - trained
    if not sharded:
        raise ValueError(
            f"all weights of {type(base).__name__}'s layers train; {name} is for a frozen base, whose prompt or "
            "adapter trains. A whole model is sharded by accelerate (FSDP)."
        )
    return layers, trained, sharded


def _check_quantization(base: nn.Module, layers: Sequence[nn.Module], sharded: Iterable[nn.Parameter]) -> None:
    """Raise unless FSDP, which puts plain parameters in the place of a layer's, keeps what the layers compute."""
    in_4bit = {layer.weight for whole in layers for layer in layers_in_4bit(whole)}
    others = sorted({type(parameter).__name__ for parameter in set(sharded) - in_4bit} - {"Parameter"})
    if others or (is_quantized(base) and not in_4bit):
        named = f", with weights of type {', '.join(others)}" if others else ""
        raise ValueError(
            f"{type(base).__name__} is quantized{named}, and cannot be sharded; shard a base that is not, or one in 4 "
            "bit by bitsandbytes: BitsAndBytesConfig(load_in_4bit=True)."
        )
    if in_4bit and not shards_bytes():
        raise ValueError(
            f"torch {torch.__version__} cannot shard a base in 4 bit; use torch {TORCH_THAT_SHARDS_BYTES} or later, "
            "or a base that is not quantized."
        )


@torch.no_grad()
def _place(module: nn.Module, device: torch.device, base: Any, but: frozenset | set = frozenset()) -> None:
    """Move what a module holds to a device, and give every process the first one's values."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor in but or hasattr(tensor, "placements"):
            continue
        tensor.data = tensor.data.to(device)
        if not is_quantized(base):  # loaded whole by every process
            dist.broadcast(tensor.data, src=0)


def check_gathered(base: nn.Module, name: str = "the base") -> None:
    """Raise if a base was loaded in shards by ZeRO-3, and nothing gathers its layers yet.

    Raises:
        ValueError: if so.
    """
    if any(map(is_partitioned, base.parameters())) and not gathers_weights(base):
        raise ValueError(
            f"{name} was loaded in shards by ZeRO-3, which nothing gathers yet; train it with the "
            "TrainingArguments(deepspeed=...), or call spul.models.partition_layers(model, zero_optimization) first."
        )


def check_layers_alone(model: nn.Module, name: str = "the base") -> None:
    """Raise if a model is sharded otherwise than by `shard_layers` or `partition_layers`.

    Raises:
        ValueError: if its embeddings or output head are not whole, or nothing gathers its layers.
    """
    base: Any = bare_model(model)
    check_gathered(base, name)
    within = {id(parameter) for layer in decoder_layers(base) for parameter in layer.parameters()}
    others = nn.ParameterList(parameter for parameter in base.parameters() if id(parameter) not in within)
    if is_sharded(others):
        raise ValueError(
            f"{name} is sharded with its embeddings or output head, which spul reads whole; shard its layers alone: "
            "spul.models.shard_layers(model), after it was loaded."
        )


def gather_before_gradients(base: Any, states: Iterable[Sequence[Tensor]]) -> None:
    """Make the gradient of each decoder layer's keys and values gather the layer first, if it is sharded.

    They leave the layer by a cache and not by its output, at which FSDP waits for a gradient to come in.

    Args:
        base: the base.
        states: for each layer, in their order, tensors of a pass that recorded a graph.
    """
    for layer, tensors in zip(decoder_layers(base), states, strict=False):
        if not hasattr(layer, "unshard"):
            return

        def gather(_: Tensor, layer: Any = layer) -> None:
            layer.unshard()

        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(gather)

"""A frozen base whose decoder layers are sharded over processes (FSDP2); all else is whole in each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .causal_lm import bare_model, decoder_layers
from .compat import is_quantized, is_sharded
from .compat_devices import TORCH_THAT_SHARDS_BYTES, layers_in_4bit, prepare_4bit_for_shards, shards_bytes


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
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shard_layers needs several processes; start the program by `accelerate launch` or `torchrun`."
        )
    if is_sharded(base):
        raise ValueError(f"{type(base).__name__} is sharded already; pass it as it was loaded.")
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
            f"all weights of {type(base).__name__}'s layers train; shard_layers is for a frozen base, whose prompt or "
            "adapter trains. A whole model is sharded by accelerate (FSDP)."
        )
    _check_quantization(base, layers, sharded)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
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


def check_layers_alone(model: nn.Module, name: str = "the base") -> None:
    """Raise if a model is sharded otherwise than by `shard_layers`, so that its embeddings or head are not whole.

    Raises:
        ValueError: if it is.
    """
    base: Any = bare_model(model)
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

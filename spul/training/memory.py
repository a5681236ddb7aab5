"""Memory of a training step by a model's config alone, and the error of a step that has too little."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftConfig, PromptTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..losses.terms import token_kl, token_nll
from ..models.causal_lm import LINEAR, decoder_layers, selects_positions
from ..models.compat import prefix_shape
from ..models.compat_cache import LayerStates
from ..models.compat_checkpointing import switch_checkpointing
from ..models.compat_devices import TensorMemory, fake_tensors
from ..models.noise import zero_dropout
from ..prompts.configs import check_peft_config, encoder_shapes, filled, has_encoder, holds_states, prompt_shape
from ..prompts.states import PromptStates, compute_states, in_front
from ..records.fields import is_count

# Of a prompt's parameters: weights, gradients and AdamW's two moments, in float32.
BYTES_PER_TRAINED = 16
BLOCK = 64  # weights of bitsandbytes' 4-bit layers that share a scale in float32


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a training step at its peak, in bytes, on one device.

    Attributes:
        weights: the frozen base, with what is gathered or unpacked of it at a time.
        activations: what the backward pass through the base needs, the prompt's keys and values among it.
        logits: logits at the response positions, and what the loss makes of them.
        reference: the base's logits that the loss compares with.
        prompt: the trained prompt, its gradient, and two moments of AdamW.
        step: the batch, in words.
    """

    weights: int
    activations: int
    logits: int
    reference: int
    prompt: int
    step: str = ""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.logits + self.reference + self.prompt

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "activations", "logits", "reference", "prompt")}
        unit, size = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
        lines = [f"{name:<12}{value / size:9.2f} {unit}" for name, value in {**parts, "total": self.total}.items()]
        return "\n".join([f"Memory of a step, {self.step}:", *lines])


def estimate_memory(
    config: PreTrainedConfig,
    batch_size: int,
    max_length: int,
    *,
    prompt_config: PeftConfig | None = None,
    response_tokens: int = 1,
    retain_rows: int | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    bits: Literal[4, 8] | None = None,
    gradient_checkpointing: bool = False,
    reference: bool = True,
    processes: int = 1,
) -> MemoryEstimate:
    """The memory of a training step of a prompt, from the config of the base; no weight is loaded or allocated.

    The step of `SoftPromptUnlearner` is run on tensors without values, whose sizes are counted: activations are those
    of the model's own code. Not counted: the context of a GPU (about 0.5 GB), fragmentation of its allocator, and what
    kernels use inside.

    Args:
        config: `AutoConfig.from_pretrained(name)` of a causal LM.
        batch_size: rows of a batch on one device; accumulation adds nothing.
        max_length: tokens of its longest row, virtual tokens not counted.
        prompt_config: PEFT's config of the prompt; `PromptTuningConfig` with 30 virtual tokens unless given.
        response_tokens: tokens of the longest response.
        retain_rows: rows of the batch that are compared with the base; all unless given.
        dtype: of the weights and of computation; a name such as `"bfloat16"` will do.
        bits: 8 or 4 for a base quantized by bitsandbytes; None for one in `dtype`.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        reference: whether the loss compares with the base (the KL term), cached or live.
        processes: among which the layers are sharded (FSDP); 1 for a whole base.

    Raises:
        ValueError: for a number out of range, a `dtype` that is no floating-point type, rows that do not fit the
            model's positions, a prompt that does not fit the base, or shards of a base in 8 bit.
        TypeError: if `config` is none of transformers, or `prompt_config` none of the four prompts.

    Example:
        ```python
        print(spul.estimate_memory(AutoConfig.from_pretrained("facebook/opt-1.3b"), batch_size=32, max_length=64))
        ```
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected AutoConfig.from_pretrained(...) of the base.")
    given = {"batch_size": batch_size, "max_length": max_length, "response_tokens": response_tokens}
    for name, value in {**given, "processes": processes}.items():
        if not is_count(value, 1):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
    dtype = _floating(dtype)
    if bits not in (None, 4, 8):
        raise ValueError(f"bits={bits!r}; expected 4, 8, or None for weights in {dtype}.")
    if bits == 8 and processes > 1:
        raise ValueError(f"bits=8, processes={processes}: a base in 8 bit cannot be sharded; expected bits=4 or None.")
    if response_tokens >= max_length:
        raise ValueError(f"response_tokens={response_tokens}: expected fewer than max_length={max_length}.")
    rows = batch_size if retain_rows is None else retain_rows
    if not 0 <= rows <= batch_size:
        raise ValueError(f"retain_rows={retain_rows}: expected 0 to batch_size={batch_size}.")
    prompt: Any = prompt_config or PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    check_peft_config(prompt)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < max_length + prompt.num_virtual_tokens:
        raise ValueError(
            f"max_length={max_length} and {prompt.num_virtual_tokens} virtual tokens exceed the model's {limit} "
            f"positions; expected max_length of at most {limit - prompt.num_virtual_tokens}."
        )
    with fake_tensors():
        base: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).requires_grad_(False)
        prompt = filled(base, prompt)
        if holds_states(prompt):
            prompt.num_layers, prompt.token_dim = prefix_shape(prompt, config)
        weights = _weights(base, dtype, bits, processes)
        shape = (batch_size, max_length, response_tokens, rows if reference else 0)
        activations, logits = _step(base, prompt, shape, gradient_checkpointing)
    vocab = base.get_output_embeddings().weight.shape[0]
    reference_bytes = rows * response_tokens * vocab * dtype.itemsize if reference else 0
    shapes = encoder_shapes(prompt).values() if has_encoder(prompt) else [prompt_shape(prompt)]
    kind = prompt.peft_type.value.lower()
    words = f"{batch_size} rows of {max_length} tokens, {response_tokens} of them the response's, "
    words += f"{kind} of {prompt.num_virtual_tokens} virtual tokens, "
    words += str(dtype).removeprefix("torch.") if bits is None else f"{bits} bit"
    words += ", gradient checkpointing" if gradient_checkpointing else ""
    words += f", layers sharded over {processes} processes" if processes > 1 else ""
    return MemoryEstimate(
        weights=weights,
        activations=activations,
        logits=logits,
        reference=reference_bytes,
        prompt=BYTES_PER_TRAINED * sum(math.prod(one) for one in shapes),
        step=words,
    )


def _floating(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point type of torch, by itself or by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}; expected torch.bfloat16, torch.float16, torch.float32, or such a name.")
    return found


def _weights(base: Any, dtype: torch.dtype, bits: int | None, processes: int) -> int:
    """Bytes of a base's weights and buffers on one device."""
    head = base.get_output_embeddings()
    # What bitsandbytes quantizes: all linear maps but the head, which may be the embeddings, too.
    linear = [module for module in base.modules() if isinstance(module, LINEAR) and module.weight is not head.weight]
    quantized = set() if bits is None else {id(module.weight) for module in linear}
    transposed = {id(module.weight) for module in linear if isinstance(module, Conv1D)}

    def size(tensors: Iterable[Tensor]) -> int:
        found = {id(tensor): tensor for tensor in tensors}  # tied ones once
        return sum(t.numel() * bits // 8 if bits and key in quantized else t.nbytes for key, t in found.items())

    layers = list(decoder_layers(base))
    each = [size(layer.parameters()) for layer in layers]
    rest = size(base.parameters()) - sum(each) + size(base.buffers())
    for tensor in base.parameters():
        if id(tensor) in quantized:  # scales in float32, whole in each process
            outputs = tensor.shape[1 if id(tensor) in transposed else 0]
            rest += 4 * (-(-tensor.numel() // BLOCK) if bits == 4 else outputs)
    rest += max((p.numel() for p in base.parameters() if id(p) in quantized), default=0) * dtype.itemsize  # unpacked
    if processes > 1:
        # Two layers are whole at a time: one computes while the next is gathered.
        return rest + sum(-(-one // processes) for one in each) + 2 * max(each)
    return rest + sum(each)


def _step(base: Any, prompt: Any, shape: tuple[int, int, int, int], checkpointing: bool) -> tuple[int, int]:
    """Bytes of activations and of logits at the peak of a step: forward and backward, on tensors without values."""
    batch_size, length, responses, retain_rows = shape
    width, num_virtual = base.get_input_embeddings().weight.shape[1], prompt.num_virtual_tokens
    vocab = base.get_output_embeddings().weight.shape[0]
    zero_dropout(base.eval())
    if checkpointing:  # of the layers alone: OPT draws a number, whose value is asked for, in training
        switch_checkpointing(base, "enable", {"use_reentrant": False, "preserve_rng_state": False})
        decoder_layers(base).train()
        base.training = True  # of this module, not of those in it
    with TensorMemory(vocab, (*base.parameters(), *base.buffers())) as memory:
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        last = {"logits_to_keep": torch.zeros(batch_size, responses, dtype=torch.long)}
        inputs = last if selects_positions(base) else {}
        embeds = torch.zeros(1, num_virtual, width, dtype=base.dtype, requires_grad=True)
        states = compute_states(base, embeds)
        if states is None:
            raise ValueError(f"{type(base).__name__} has no plain key/value cache; its memory is not estimated.")
        if holds_states(prompt):  # keys and values themselves, no pass
            states = PromptStates([LayerStates(_leaf(k), _leaf(v), seen) for k, v, seen in states.layers])
        with in_front(base, states, torch.ones_like(ids)) as prefix:
            out = base(input_ids=ids, **prefix, **inputs)
        logits = out.logits if inputs else out.logits[:, -responses:]
        _loss(logits, retain_rows).backward()
        del out
    return memory.peak, memory.peak_of_last


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _loss(logits: Tensor, retain_rows: int) -> Tensor:
    """The loss of a batch, as `UnlearningLoss` computes it: of copies of each group's logits, and of the reference."""
    groups = [logits[rows] for rows in torch.arange(len(logits)).split([len(logits) - retain_rows, retain_rows])]
    targets = torch.zeros(logits.shape[:2], dtype=torch.long)
    total = torch.stack([token_nll(some, targets[: len(some)]).sum() for some in groups]).sum()
    if retain_rows:
        reference = logits.detach()[torch.arange(retain_rows)]
        total = total + token_kl(groups[1], reference, "reverse").sum()
    return total


ADVICE = (
    "A step does not fit into memory. Lower, in this order: per_device_train_batch_size, with "
    "gradient_accumulation_steps raised by as much (the same step); the collator's max_length; or turn on "
    "gradient_checkpointing=True. Where the weights take most of it: load the base in bfloat16 or 4 bit, or shard it "
    "(FSDP). spul.estimate_memory(model.config, batch_size=..., max_length=...) says what each of them saves."
)


@contextmanager
def advised(batch: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: the error of a step without enough memory says what to lower; the batch's shape with it.

    Raises:
        RuntimeError: of the type that it was: `torch.OutOfMemoryError` on a GPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        rows, tokens = batch["input_ids"].shape
        raise type(error)(f"{error}\n{ADVICE} This batch has {rows} rows of {tokens} tokens.") from error

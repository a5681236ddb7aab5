"""Starts of fresh prompts: rows of input embeddings, near the base, put into a prompt of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from peft import PeftType, PromptTuningConfig, PromptTuningInit
from torch import Tensor, nn

from ..models.causal_lm import evaluation_mode
from ..models.compat import is_sharded
from ..models.compat_checkpointing import unswitched
from ..models.compat_devices import device_of
from .configs import holds_states
from .discriminative import DiscriminativeStart
from .near import NearStart
from .states import compute_states, packed_states

StartName = Literal["random", "vocabulary", "peft"]
STARTS = get_args(StartName)
LEAST_SINGULAR_VALUE = 1e-3  # relative, of an encoder's hidden output; smaller ones would make its last layer huge
SHARED = 0.8  # of random rows' standard deviation, the part that they share
WIDEST = 0.1  # standard deviation of random rows; Gemma's vocabulary has 1, and such rows take it far from itself
SHARDED_SCALE = 0.1  # of the random keys and values on a base whose shards cannot compute any


@dataclass(frozen=True)
class InstructionStart:
    """A start from a written instruction, such as `"Decline to answer about Jane Doe."`.

    Prompt tuning starts as the embeddings of its tokens, prefix tuning as the keys and values that the base computes
    for them, P-tuning as an encoder that puts them out. An instruction that is longer than the prompt is cut at its
    end; a shorter one is repeated, without the special tokens around it, and the last repetition is cut.

    Args:
        text: the instruction, tokenized as a text of its own; a chat template is applied beforehand, if at all.
        tokenizer: the base's tokenizer, an object: nothing is fetched by name.

    Raises:
        TypeError: if the text is not text, or the tokenizer is not an object that tokenizes.
        ValueError: if the text is blank.
    """

    text: str
    tokenizer: Any = field(repr=False)  # messages name the text

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text is a {type(self.text).__name__}; expected an instruction's text.")
        if not self.text.strip():
            raise ValueError(f"text={self.text!r}: expected an instruction, such as 'Decline to answer about ...'.")
        if isinstance(self.tokenizer, str) or not callable(self.tokenizer):
            raise TypeError(
                f"tokenizer is a {type(self.tokenizer).__name__}; expected the base's tokenizer as an object, as "
                "AutoTokenizer.from_pretrained gives it."
            )

    def token_ids(self, num_virtual_tokens: int) -> list[int]:
        """The instruction's token ids, cut or repeated to the prompt's length.

        Args:
            num_virtual_tokens: the length.
        """
        ids = list(self.tokenizer(self.text)["input_ids"])
        repeated = list(self.tokenizer(self.text, add_special_tokens=False)["input_ids"])
        if not repeated:
            raise ValueError(f"text={self.text!r} has no tokens; expected an instruction.")
        ends = range(len(ids), len(repeated) - 1, -1)  # some tokenizers end every text, which is not over yet
        ids = ids[: next((end for end in ends if ids[end - len(repeated) : end] == repeated), len(ids))]
        while len(ids) < num_virtual_tokens:
            ids += repeated
        return ids[:num_virtual_tokens]


Start = StartName | InstructionStart | NearStart | DiscriminativeStart


def check_start(start: Any, peft_config: Any) -> None:
    """Raise unless a start can be given to a prompt.

    Args:
        start: None, a name, an `InstructionStart`, a `NearStart`, or a `DiscriminativeStart`.
        peft_config: the prompt's config.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the name is unknown, the config names a start of its own, or has no keys to be fitted.
    """
    if start is None:
        return
    others = "an InstructionStart(text, tokenizer), a NearStart or a DiscriminativeStart(dataset, collator)"
    if not isinstance(start, str | InstructionStart | NearStart | DiscriminativeStart):
        raise TypeError(f"start is a {type(start).__name__}; expected one of {STARTS}, {others}.")
    if isinstance(start, str) and start not in STARTS:
        raise ValueError(f"start={start!r}; expected one of {STARTS}, {others}.")
    if isinstance(start, DiscriminativeStart) and not holds_states(peft_config):
        raise ValueError(
            f"start is a DiscriminativeStart, which fits keys, and {type(peft_config).__name__} has none; expected a "
            "PrefixTuningConfig or a CartridgeConfig, or another start."
        )
    if start != "peft" and (own := _start_of_config(peft_config)):
        raise ValueError(f"start={start!r}, and {own} in the {type(peft_config).__name__}; give one of the two.")


def _start_of_config(peft_config: Any) -> str:
    """PEFT's own option of how the prompt starts, if it is set."""
    init = getattr(peft_config, "prompt_tuning_init", PromptTuningInit.RANDOM)
    if isinstance(peft_config, PromptTuningConfig) and init != PromptTuningInit.RANDOM:
        return f"prompt_tuning_init={PromptTuningInit(init).value!r}"
    weights = getattr(peft_config, "init_weights", None)
    return f"init_weights={weights!r}" if holds_states(peft_config) and weights is not None else ""


@torch.no_grad()
def start_prompt(model: Any, adapter_name: str, start: Start | None) -> None:
    """Put a start into a fresh prompt.

    Args:
        model: a `SoftPromptUnlearner`.
        adapter_name: the prompt.
        start: None for what the config's own option says, else "peft" for P-tuning, whose network begins near the base
            by itself, and "random" for the other kinds.

    Raises:
        ValueError: if an instruction is not that of this base's tokenizer, a start does not fit into the prompt's
            encoder, the base is sharded, or keys cannot be fitted to its queries.
    """
    config = model.peft_config[adapter_name]
    as_peft = _start_of_config(config) or config.peft_type == PeftType.P_TUNING
    if start == "peft" or (start is None and as_peft):
        return
    base, encoder, num = model.get_base_model(), model.prompt_encoder[adapter_name], config.num_virtual_tokens
    if isinstance(start, NearStart):
        if is_sharded(base):
            raise ValueError(f"start={start!r}: the base is sharded, and answers no rows yet; leave it out.")
        start.draw(model, adapter_name, lambda: _draw_default(model, adapter_name))
        return
    if holds_states(config) and is_sharded(base):
        if start is not None:
            raise ValueError(f"start={start!r}: the base is sharded, and computes no keys and values; leave it out.")
        _scale(encoder, SHARDED_SCALE)
        return
    ids = _token_ids(model, num, start, by_token=_looks_up_tokens(base) and holds_states(config))
    inside = model.spul_configs[adapter_name].prompt_position == "message"
    rows = _random_rows(model, num, begins=not inside) if ids is None else model.word_embeddings(ids)
    if holds_states(config):
        rows = _keys_and_values(base, rows, ids, config)
    _put(encoder, rows, is_exact=isinstance(start, InstructionStart | DiscriminativeStart))
    if isinstance(start, DiscriminativeStart):  # rows are read behind a prefix near the base
        _put(encoder, start.keys_and_values(model, adapter_name), is_exact=True)


def _draw_default(model: Any, adapter_name: str) -> None:
    """Draw the default start of a prompt's kind anew."""
    if model.peft_config[adapter_name].peft_type != PeftType.P_TUNING:
        start_prompt(model, adapter_name, "random")
        return
    encoder = model.prompt_encoder[adapter_name]
    device = device_of(encoder)
    encoder.cpu()  # drawn there: a seed gives the same on every device
    for module in encoder.modules():
        if isinstance(module, nn.Embedding | nn.Linear | nn.LSTM):
            module.reset_parameters()  # as PyTorch initializes them, which PEFT leaves as it is
    encoder.to(device)


def _token_ids(model: Any, num: int, start: Start | None, by_token: bool) -> Tensor | None:
    """The token ids (p,) of a start that is made of tokens; None for random rows.

    Args:
        model: the PEFT model.
        num: virtual tokens.
        start: the start.
        by_token: whether the base takes no input embeddings that are not of tokens.
    """
    device, size = device_of(model.word_embeddings), _vocabulary_size(model)
    if isinstance(start, InstructionStart):
        ids = start.token_ids(num)
        if max(ids) >= size:
            raise ValueError(
                f"the start's tokenizer gives the token id {max(ids)}, and the base has {size} input embeddings; "
                "expected the base's own tokenizer."
            )
        return torch.tensor(ids, device=device)
    if start == "vocabulary" or by_token:
        return torch.randint(size, (num,)).to(device)  # drawn on the CPU: a seed gives the same on every device
    return None


def _random_rows(model: Any, num: int, begins: bool) -> Tensor:
    """Rows (p, d) at the mean and standard deviation of the vocabulary's embeddings, behind that of BOS at the start.

    PEFT draws them with a standard deviation of 1. Many models rest their attention on the first position, if it holds
    a token that they know; inside a row, another BOS turns it from the row's first. Rows that share a direction, as
    those of an untrained P-tuning network do, disturb the base less than unlike ones.

    Args:
        model: the PEFT model.
        num: rows.
        begins: whether the prompt stands in front of every row.
    """
    size = _vocabulary_size(model)
    some = torch.arange(0, size, max(1, size // 4096), device=device_of(model.word_embeddings))
    looked_up = model.word_embeddings(some).float()  # through the module: Gemma scales its embeddings
    shared, own = torch.randn(1, looked_up.shape[1]), torch.randn(num, looked_up.shape[1])
    rows = (SHARED * shared + (1 - SHARED**2) ** 0.5 * own).to(looked_up.device)
    rows = rows * looked_up.std().clamp(max=WIDEST) + looked_up.mean()
    bos = getattr(model.get_base_model().config.get_text_config(), "bos_token_id", None)
    if begins and isinstance(bos, int) and 0 <= bos < size:
        rows[0] = model.word_embeddings(some.new_tensor([bos]))[0]
    return rows


def _vocabulary_size(model: Any) -> int:
    return len(model.word_embeddings.weight)


def _looks_up_tokens(base: Any) -> bool:
    """Whether each layer looks the input tokens up again (Gemma 3n), so that rows must be tokens."""
    return bool(getattr(base.config.get_text_config(), "hidden_size_per_layer_input", 0))


def _keys_and_values(base: Any, rows: Tensor, ids: Tensor | None, config: Any) -> Tensor:
    """Keys and values of rows (p, d) by a pass of the base, in the layout of PEFT.

    Raises:
        ValueError: if the base caches more than keys and values, as layers of two kinds beside each other do.
    """
    prompt = rows[None].to(base.get_input_embeddings().weight.dtype)
    with unswitched(base), evaluation_mode(base):
        states = compute_states(base, prompt, token_ids=None if ids is None else ids[None])
    if states is None:
        raise ValueError(
            f"layers of {type(base).__name__} cache more than keys and values (Mamba beside attention does), so that "
            "a prefix is a part of what a prompt is there, and no start of it can be read. Use PromptTuningConfig or "
            "PromptEncoderConfig."
        )
    return packed_states(states.layers, config)


def _put(encoder: Any, rows: Tensor, is_exact: bool) -> None:
    """Make a prompt's encoder put out rows (p, width).

    One that computes them (P-tuning, prefix tuning with a projection) keeps its random layers but the last, which is
    the linear map of least norm from their output to the rows.

    Raises:
        ValueError: if `is_exact`, and the encoder is too narrow.
    """
    linear = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not linear:
        if hasattr(encoder, "trainable_embedding"):  # a cartridge, in two parts
            encoder.load_prompt_embeddings(rows)
        else:
            encoder.embedding.weight.copy_(rows)
        return
    last = linear[-1]
    hidden = _input_of(last, encoder).double()
    target = rows.to(hidden.device).double()
    solution = torch.linalg.pinv(hidden - hidden.mean(0), rtol=LEAST_SINGULAR_VALUE) @ (target - target.mean(0))
    found = (hidden - hidden.mean(0)) @ solution + target.mean(0)
    if is_exact and (found - target).norm() > 0.01 * target.norm():
        raise ValueError(
            f"the prompt's encoder has {hidden.shape[1]} hidden numbers, too few to put out a start of "
            f"{len(rows)} virtual tokens; expected more: encoder_hidden_size={4 * len(rows)}, or a prompt without "
            "an encoder."
        )
    last.weight.copy_(solution.T)
    last.bias.copy_(target.mean(0) - hidden.mean(0) @ solution)


def _input_of(layer: nn.Module, encoder: Any) -> Tensor:
    """The input (p, hidden) of an encoder's layer, without dropout."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with evaluation_mode(encoder):
            encoder(torch.arange(encoder.embedding.num_embeddings, device=encoder.embedding.weight.device)[None])
    finally:
        hook.remove()
    return seen[0].flatten(0, 1)


def _scale(encoder: Any, factor: float) -> None:
    """Scale what a prompt's encoder puts out."""
    linear = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    for parameter in linear[-1].parameters() if linear else encoder.parameters():
        parameter.mul_(factor)

"""Hidden states of a frozen model, read text by text with every adapter disabled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.batching import by_length
from ..models.causal_lm import bare_model, check_model, max_positions
from ..models.compat_devices import device_of
from ..models.sharding import check_gathered
from ..models.unlearner import detached_base


class Batch(NamedTuple):
    """Hidden states of some texts of similar length, padded on the right.

    Attributes:
        rows: index of each text (B,).
        states: by layer, (B, n, d), float32.
        mask: (B, n), true for tokens, false for pads.
    """

    rows: list[int]
    states: dict[int, Tensor]
    mask: Tensor


class HiddenStates:
    """Reader of the hidden states of the base, with every adapter disabled.

    Args:
        model: the base, or any unlearner on it.
        tokenizer: its tokenizer.
        batch_size: texts per forward pass, at most; of long ones fewer, as `by_length` says.

    Raises:
        TypeError: if they are no model and no tokenizer.
        ValueError: if the base was loaded in shards that nothing gathers yet.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        check_model(model)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; expected the base's tokenizer.")
        check_gathered(bare_model(model))
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @property
    def num_layers(self) -> int:
        """The number of the base's layers; hidden states are numbered 0 (embeddings) to this."""
        base: Any = bare_model(self.model)
        return base.config.get_text_config().num_hidden_layers

    @property
    def width(self) -> int:
        """The width of the base's hidden states."""
        base: Any = bare_model(self.model)
        return base.config.get_text_config().hidden_size

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, as the tokenizer begins a sequence.

        Raises:
            ValueError: if a text has no token, or more than the base has positions.
        """
        found: list[list[int]] = [[] for _ in texts]
        bos = self.tokenizer.bos_token
        for begun in (False, True):  # with its first token, as chat templates render it, a text gets no second one
            chosen = [i for i, text in enumerate(texts) if (bos is not None and text.startswith(bos)) == begun]
            if chosen:
                part = [texts[i] for i in chosen]
                encoded = self.tokenizer(part, add_special_tokens=not begun, truncation=False, verbose=False)
                for i, ids in zip(chosen, encoded["input_ids"], strict=True):
                    found[i] = ids
        most = max_positions(bare_model(self.model))
        for text, ids in zip(texts, found, strict=True):
            if not ids or (most is not None and len(ids) > most):
                raise ValueError(
                    f"a text of {len(text):,} characters has {len(ids):,} tokens; expected at least 1"
                    + ("." if most is None else f" and at most {most:,}, the positions of the base. Shorten it.")
                )
        return found

    @torch.no_grad()
    def batches(self, texts: Sequence[str], layers: Sequence[int]) -> Iterator[Batch]:
        """Hidden states of texts, in batches of similar length, longest first.

        Args:
            texts: texts with at least one token.
            layers: layers to read, 0 to `num_layers`.

        Raises:
            ValueError: if a text is too long or has no token, `batch_size` is below 1, or the base has diverged: its
                states are not finite.
        """
        ids = self.token_ids(texts)
        for rows in by_length([len(each) for each in ids], self.batch_size):
            lengths = torch.tensor([len(ids[row]) for row in rows])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            padded = torch.zeros(mask.shape, dtype=torch.long)
            padded[mask] = torch.tensor([token for row in rows for token in ids[row]])
            with detached_base(self.model) as base:  # not around the yield, after which the caller may stop
                inputs = {"input_ids": padded, "attention_mask": mask.long()}
                out = base.base_model(  # without the output head
                    **{name: value.to(device_of(base)) for name, value in inputs.items()},
                    output_hidden_states=True,
                    use_cache=False,
                )
            states = {layer: out.hidden_states[layer].float() for layer in layers}
            for layer, state in states.items():
                if not state[mask.to(state.device)].isfinite().all():
                    raise ValueError(f"hidden states of layer {layer} are not finite; the base has diverged.")
            yield Batch(rows, states, mask)

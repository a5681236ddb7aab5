"""Rival: the protocol of an unlearner for methods that act at inference only, on requests or on answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from ..data.checks import whole_number
from ..data.encoded import left_padded_ids
from ..losses.positions import ends_before_labels, ends_before_responses, own_tokens, pack_right
from ..losses.terms import IGNORE_INDEX
from ..models.causal_lm import check_bare, check_no_layers, logits_at
from ..models.protocol import Unlearner, drop_adapter_names
from ..prompts.arguments import CACHES, check_no_empty_row, check_rows, mask_from_pads, named_arguments
from ..prompts.pads import filled_pads, with_own_tokens
from ..records.fields import Checks
from ..records.spul_config import without_local_path
from .files import GATE_DIGEST, read_rival, write_rival

if TYPE_CHECKING:
    from ..gates.gate import Gate

R = TypeVar("R", bound="Rival")

# Arguments of `generate` that would go around what a rival does to requests, or return more than token ids.
_REFUSED = (
    *("inputs_embeds", "position_ids", "cache_position", "assistant_model", "custom_generate", "streamer"),
    *("max_length", "return_dict_in_generate", *CACHES),
)
# Settings that are checked here: the base, which refuses wrong ones, does not run where a text is fixed.
_NUMBERS = ("max_new_tokens", "num_return_sequences", "num_beams")


class Rival(nn.Module, Unlearner):
    """A method without training, around a frozen base: an unlearner, so that all metrics and attacks run it.

    A subclass writes `changed_logits` and `changed_answers`; and `saved_fields`, `fields_saved` and `restored`, by
    which it is saved, put on another base, and told from others in an evaluation. The base and its weights are not
    changed; inside `disable_adapter()` the model is the base.

    Args:
        model: a causal LM of transformers, without an adapter.
        tokenizer: its tokenizer.

    Attributes:
        kind: name of the method in reports, in the identity of an evaluation and in its file.
        gate: its gate; None if it has none.
        name: folder (its last part) or Hub name that it was loaded from; None if it was made here.
        streams: whether `generate` takes a `streamer`.
        fields_saved: checks of the fields in its file, the digest of a gate among them where there is one.

    Raises:
        TypeError: if `model` is no causal LM of transformers, or has an adapter.
    """

    kind = ""
    in_words = "the method"
    gate: Gate | None = None
    name: str | None = None
    streams = False
    fields_saved: ClassVar[Checks] = {}
    follows_embeddings = False
    reads_tokens = True
    hides_pads = True
    is_trained = False
    trains_base = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        check_bare(model)
        check_no_layers(model)
        self.base_model, self.tokenizer = model, tokenizer

    # ---- what a method does ----

    def changed_logits(self, rows: Sequence[list[int]], ends: Sequence[int], positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of the rows' own tokens.

        Args:
            rows: token ids of each row, without padding.
            ends: number of tokens of each row's request; what follows is the answer so far.
            positions: counted in the rows' own tokens, within the longest row; those beyond a row's own end may have
                any logits.
        """
        raise NotImplementedError

    def changed_answers(self, requests: Sequence[list[int]], **settings: Any) -> Tensor:
        """New tokens of each request, padded on the right: (B * sequences per request, new tokens).

        Args:
            requests: token ids of each request, without padding.
            settings: arguments of the base's `generate`.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """All that the method works by beside the base, as plain values: its identity in an evaluation."""
        return self.saved_fields()

    def on(self, base: PreTrainedModel) -> Any:
        """The same method around another base."""
        return self.restored(base, self.tokenizer, self.saved_fields(), self.gate)

    def extra_repr(self) -> str:
        """Its gate, if it has one."""
        return "" if self.gate is None else f"gate: {self.gate!r}"

    # ---- files ----

    def saved_fields(self) -> dict[str, Any]:
        """All that the method works by beside base, tokenizer and gate, as values of JSON, for `restored`.

        Raises:
            TypeError: if a subclass does not write it.
        """
        raise TypeError(
            f"a {type(self).__name__} has no saved_fields, and its base would be saved without what it does to "
            "requests; write saved_fields, fields_saved and restored, or save its settings by yourself."
        )

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> Any:
        """The method of saved fields, checked by `fields_saved`, with its gate, around a base."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the method in `spul_rival.json`, and its gate, if it has one, in `gate/`. The base is not saved.

        Args:
            save_directory: the folder; created if missing.
            kwargs: none.

        Raises:
            FileExistsError: if the folder is a file, or holds an adapter.
            TypeError: for another argument.
            ValueError: if the gate is a plain function, which cannot be saved.
        """
        if kwargs:
            raise TypeError(
                f"save_pretrained of a {type(self).__name__} takes a folder alone; found {sorted(kwargs)}."
            )
        write_rival(save_directory, self.kind, self.saved_fields(), self.gate)

    @classmethod
    def from_pretrained(
        cls: type[R], model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, **hub: Any
    ) -> R:
        """Load the method, and its gate, around a base.

        Args:
            model: the base.
            folder: folder or Hub name, which `save_pretrained` wrote.
            tokenizer: the base's tokenizer.
            hub: Hub arguments, such as `revision`, `token`, `cache_dir`.

        Raises:
            FileNotFoundError: if the folder has no rival, or lacks its gate.
            ValueError: if it is another kind of rival, or a file is damaged, of a later version, or not the one that
                was saved with the others.
        """
        saved = read_rival(folder, **hub)
        if saved.kind != cls.kind:
            raise ValueError(
                f"{saved.path} is of another method, {saved.kind}; expected that of a {cls.__name__}, {cls.kind}."
            )
        saved.check(cls.fields_saved)
        gate = saved.gate(model, tokenizer) if GATE_DIGEST in cls.fields_saved else None
        found: R = cls.restored(model, tokenizer, saved.fields, gate)
        found.name = without_local_path(os.fspath(folder))
        return found

    # ---- forward and generation ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """A forward of the base as the method changes it.

        Args:
            input_ids: (B, n), padded on either side.
            attention_mask: (B, n); all ones unless given.
            labels: (B, n), the answer's token ids, -100 elsewhere. A row's request is then what stands before its
                first label; without labels the row as a whole.
            kwargs: none but `adapter_names=None` and `use_cache`.

        Returns:
            `logits` (B, n, V) at the rows' own tokens, and `loss`, the mean over the labels' tokens, with labels.

        Raises:
            ValueError: without `input_ids`, and for other arguments.
        """
        drop_adapter_names(kwargs)
        kwargs.pop("use_cache", None)
        if input_ids is None or any(value is not None for value in kwargs.values()):
            found = sorted(name for name, value in kwargs.items() if value is not None)
            raise ValueError(
                f"forward of a {type(self).__name__} takes input_ids, which it needs, attention_mask and labels; "
                f"found {found}."
            )
        check_rows(input_ids, attention_mask)
        if not self.enabled:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        ends = [0] * len(input_ids) if labels is None else ends_before_labels(labels, mask)
        packed, ids, order = pack_right(mask, input_ids, columns)
        logits = self._logits(ids, packed, columns, ends)
        logits = logits.take_along_dim(order.argsort(dim=1)[..., None], dim=1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
        return CausalLMOutput(loss=cast(Any, loss), logits=cast(Any, logits))

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate as the method changes requests or answers.

        Args:
            inputs: (B, n) token ids, padded on either side, also as `input_ids`; each row is one request. Without an
                `attention_mask` pad tokens are pads, as in transformers.
            args: as in `generate` of transformers.
            kwargs: the same; `max_new_tokens` is required, there or in a `generation_config`.

        Returns:
            (B * sequences per request, n + new tokens): the requests as given, and the new tokens.

        Raises:
            ValueError: without `input_ids` or `max_new_tokens`, for numbers of tokens, answers or beams that are not
                whole or below 1, for arguments that would go around the method, for a row without tokens, and for
                requests that are too long for the base with what the method adds.
        """
        drop_adapter_names(kwargs)
        kwargs |= named_arguments(cast(Any, self.base_model).generate, args)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        mask = kwargs.pop("attention_mask", None)
        kwargs.setdefault("tokenizer", self.tokenizer)  # by which stop texts are found, also those of the base
        check_rows(input_ids, mask)
        if not self.enabled:
            return cast(Any, self.base_model).generate(input_ids, attention_mask=mask, **kwargs)
        self._check_generation(kwargs)
        if mask is None:  # as the base itself would take it
            mask = mask_from_pads(input_ids, *(self.setting(f"{name}_token_id", kwargs) for name in ("pad", "eos")))
        check_no_empty_row(mask)
        new = self.changed_answers(own_tokens(input_ids, mask), **kwargs)
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), dim=0), new], dim=1)

    def _check_generation(self, kwargs: dict[str, Any]) -> None:
        for name in _REFUSED:
            if (value := kwargs.get(name)) is None or value is False:
                kwargs.pop(name, None)
            elif name != "streamer" or not self.streams:
                raise ValueError(
                    f"generate of a {type(self).__name__} takes no {name}: pass input_ids, attention_mask, "
                    "max_new_tokens and how to decode; token ids are returned."
                )
        if self.setting("max_new_tokens", kwargs) is None:
            raise ValueError(
                f"generate of a {type(self).__name__} needs max_new_tokens, the number of tokens that it may add."
            )
        for name in _NUMBERS:
            value = self.setting(name, kwargs)
            if value is not None and (whole_number(value, bools=False) or 0) < 1:
                raise ValueError(f"{name}={value!r}; expected a whole number of 1 or more.")

    def setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of a call of `generate`: its argument, else that of the given config, else the base's own."""
        config, own = kwargs.get("generation_config"), cast(Any, self.base_model).generation_config
        given = (kwargs.get(name), getattr(config, name, None), getattr(own, name, None))
        return next((value for value in given if value is not None), None)

    def base_answers(self, requests: Sequence[list[int]], **settings: Any) -> Tensor:
        """New tokens of the base for requests, which it gets padded on the left."""
        pad = self.pad_token(settings)
        batch = {name: tensor.to(self.device) for name, tensor in left_padded_ids(requests, pad).items()}
        if self.setting("pad_token_id", settings) is None:
            settings["pad_token_id"] = pad
        names = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
        size, encoder_size, penalty = (self.setting(name, settings) for name in names)
        settings = with_own_tokens(settings, size, encoder_size, penalty, **batch)
        batch["input_ids"] = filled_pads(**batch)
        out = cast(Any, self.base_model).generate(**batch, **settings)
        return (out if isinstance(out, Tensor) else out.sequences)[:, batch["input_ids"].shape[1] :]

    def pad_token(self, settings: dict[str, Any]) -> int:
        """The token that pads answers: that of the settings, else of the tokenizer, else its end token."""
        own = (self.setting("pad_token_id", settings), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in own if token is not None), 0)

    # ---- the protocol of an unlearner ----

    def response_logits(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of a right-padded batch.

        A row's request ends at the first of its positions; a text without a request, whose first token has one of the
        `labels` (B, n), is one as a whole.
        """
        if not self.enabled:
            return self.base_logits(input_ids, attention_mask, positions)
        return self._logits(input_ids, attention_mask, positions, ends_before_responses(positions, labels))

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) of the base there."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return logits_at(self.base_model, positions, **inputs)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, ends: Sequence[int]) -> Tensor:
        rows = own_tokens(input_ids, attention_mask)
        positions = positions.to(self.device).clamp(max=max(map(len, rows)) - 1)  # columns of pads alone are gone
        return self.changed_logits(rows, [end or len(row) for end, row in zip(ends, rows, strict=True)], positions)

    def padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of rows, padded on the right."""
        width, pad = max(map(len, rows)), self.pad_token({})
        ids = [row + [pad] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Refused: the method reads token ids, which embeddings are not.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"a {type(self).__name__} reads token ids, and input embeddings are none; pass input_ids.")

    def get_base_model(self) -> PreTrainedModel:
        """The causal LM behind the method."""
        return self.base_model

    def check_trainable(self) -> None:
        """Refused: nothing of it trains.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"model is a {type(self).__name__}, which acts at inference only; nothing of it trains.")

    def adapter_parameters(self) -> list[nn.Parameter]:
        """None: nothing trains."""
        return []

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The method and its settings; empty where it is disabled."""
        return {self.kind: {"peft_type": self.kind, **self.settings()}} if self.enabled else {}

    def on_base(self, base: PreTrainedModel, folder: Path) -> Rival:
        """The same method around another base."""
        return self.on(base).eval()

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base, such as `config` and `generation_config`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

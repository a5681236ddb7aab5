"""A gate and a fixed refusal: flagged requests get one text, all others the base's answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria

from ..data.checks import fault_of_text
from ..data.encoder import NO_LIMIT, RowEncoder
from ..gates.gate import Gate
from ..prompts.arguments import OF_THE_BATCH
from ..records.fields import Checks
from .chat import USER, ChatForm, ends_with
from .files import GATE_CHECK, write_rival
from .gated import GatedRival


class FixedRefusal(GatedRival):
    """A gate in front of the base: requests that it flags get a fixed text, all others the base.

    A request on which the gate fails gets the text, too. `generate` does not run the base for flagged requests, and
    gives their text to a `streamer` token by token, as the base gives its own. `max_new_tokens`, end tokens and stop
    texts end the text as they end an answer of the base.

    **As probabilities.** Behind a flagged request the tokens of the text, then its end token for ever, have
    probability 1, in this order and whatever tokens of an answer stand before; all others have 0 (logits 0 and minus
    infinity). So greedy and sampled answers, accuracy, the share of generic answers and the probability of an answer
    are those of a model that says the text, and the loss of any other answer is infinite. Measures that compare
    likelihoods (KL, membership, truth ratios) have no meaning there: they raise, and `spul.evaluate` skips them.
    Hidden states are the base's, which still runs where logits are computed.

    Args:
        model: a causal LM of transformers, without an adapter.
        tokenizer: its tokenizer, by which requests are read.
        gate: a gate of `spul.gates`, or a function from a list of texts to a bool for each.
        refusal: the text, as a completion is written: with a leading space where completions have one. One of the
            collator's generic completions counts as generic.

    Raises:
        TypeError: if `model`, `gate` or `refusal` is of another type.
        ValueError: if the refusal is blank, no text in UTF-8, without tokens or in words that the tokenizer does not
            know, or the tokenizer has no end-of-sequence token.

    Source: input filtering of Thaker et al., *Guardrail Baselines for Unlearning in LLMs*,
    https://arxiv.org/abs/2403.03329

    Example:
        ```python
        refusing = FixedRefusal(model, tokenizer, NameGate(["Jane Doe"]), " unknown")
        print(score_completions(refusing, forget, collator))
        refusing.save_pretrained("refusal")
        again = FixedRefusal.from_pretrained(model, "refusal", tokenizer)
        ```
    """

    kind = "fixed refusal"
    in_words = "the gate and its refusal"
    answers_fixed = True
    streams = True
    fields_saved: ClassVar[Checks] = {**GATE_CHECK, "refusal": (lambda value: isinstance(value, str), "a text")}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gate: Gate | Callable[[list[str]], Any],
        refusal: str,
    ) -> None:
        super().__init__(model, tokenizer, gate)
        check_refusal(refusal)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, with which a refusal ends; set one.")
        self.refusal = refusal
        encoder, eos = RowEncoder(tokenizer, NO_LIMIT), tokenizer.eos_token_id
        if not (text := encoder.completion_ids(refusal)):
            raise ValueError(f"refusal={refusal!r} has no tokens; expected a text that answers a request.")
        read = str(tokenizer.decode(text, skip_special_tokens=True))
        if tokenizer.unk_token_id in text or not read.strip():
            raise ValueError(
                f"refusal={refusal!r} has words that the tokenizer does not know: it would be read as "
                f"{tokenizer.decode(text)!r}. Expected a text in words of this tokenizer's vocabulary."
            )
        self._text_ids = [*text, eos]
        self._chat_ids: list[int] = []
        self._chat = ChatForm.of(tokenizer)
        if self._chat.after_user:
            turns = [{"role": "user", "content": USER}], [{"role": "assistant", "content": refusal}]
            ids = encoder.encode({"prompt": turns[0], "completion": turns[1]}, refusal).completion_ids
            self._chat_ids = ids if ids[-1] == eos else [*ids, eos]

    def refusal_ids(self, request: list[int]) -> list[int]:
        """Token ids of the refusal behind a request, its end token included; in a conversation as a turn of it."""
        return self._chat_ids if ends_with(request, self._chat.after_user) else self._text_ids

    def changed_logits(self, rows: Sequence[list[int]], ends: Sequence[int], positions: Tensor) -> Tensor:
        """The base's logits; the text's behind flagged requests."""
        requests = [row[:end] for row, end in zip(rows, ends, strict=True)]
        logits = self.base_logits(**self.padded(rows), positions=positions).clone()
        for i, (request, flagged) in enumerate(zip(requests, self.flags(requests), strict=True)):
            if flagged:
                ids = torch.tensor(self.refusal_ids(request), device=logits.device)
                step = (positions[i] - (len(request) - 1)).clamp(0, len(ids) - 1)
                logits[i] = logits.new_full(logits[i].shape, -torch.inf).scatter(1, ids[step][:, None], 0.0)
        return logits

    def changed_answers(self, requests: Sequence[list[int]], **settings: Any) -> Tensor:
        """The text for flagged requests, the base's answers to the others."""
        if whole := [name for name in OF_THE_BATCH if name != "streamer" and settings.get(name) is not None]:
            raise ValueError(
                f"generate of a {type(self).__name__} takes no {', '.join(whole)}: flagged requests get a fixed "
                "text, which does not follow it, and the others are another batch than the one given."
            )
        times = self.setting("num_return_sequences", settings) or 1
        streamer, pad = settings.get("streamer"), self.pad_token(settings)
        if streamer is not None:
            self._check_stream(len(requests), times, settings)
        flags = self.flags(requests)
        others = [request for request, flagged in zip(requests, flags, strict=True) if not flagged]
        answers = iter(self.base_answers(others, **settings).tolist() if others else [])
        found: list[list[int]] = []
        for request, flagged in zip(requests, flags, strict=True):
            said = self._said(request, settings) if flagged else []
            found += [said if flagged else next(answers) for _ in range(times)]
        if streamer is not None and not others:
            streamer.put(torch.tensor(requests))  # first, as the base does
            for token in found[0]:
                streamer.put(torch.tensor([token]))
            streamer.end()
        width = max(map(len, found))
        return torch.tensor([row + [pad] * (width - len(row)) for row in found], device=self.device)

    def _check_stream(self, num_requests: int, times: int, settings: dict[str, Any]) -> None:
        """Raise unless there is one answer to stream, whatever the gate will say of the request."""
        beams = self.setting("num_beams", settings) or 1
        if (num_requests, times, beams) != (1, 1, 1):
            raise ValueError(
                f"a streamer takes one answer as it comes; found requests: {num_requests}, num_return_sequences: "
                f"{times}, num_beams: {beams}. Call generate for each request, without beams, or leave the streamer "
                "out."
            )

    def _said(self, request: list[int], settings: dict[str, Any]) -> list[int]:
        """The refusal behind a request up to where an answer of the base would end."""
        ids = self.refusal_ids(request)[: self.setting("max_new_tokens", settings)]
        ends, stops = self.setting("eos_token_id", settings), self.setting("stop_strings", settings)
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        is_stop = StopStringCriteria(settings["tokenizer"], stops) if stops else None
        row = torch.tensor([request + ids])
        for num, token in enumerate(ids, start=1):
            if token in ends or (is_stop and bool(is_stop(row[:, : len(request) + num], cast(Any, None)))):
                return ids[:num]
        return ids

    def saved_fields(self) -> dict[str, Any]:
        """The text."""
        return _fields(self.refusal)

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> FixedRefusal:
        """The refusal of saved fields."""
        return cls(model, tokenizer, gate, fields["refusal"])


def write_refusal(folder: str | os.PathLike, gate: Gate, refusal: str) -> None:
    """Write what `FixedRefusal.save_pretrained` writes, without a base: the text and the gate are all of it.

    Args:
        folder: the folder; created if missing.
        gate: a gate of `spul.gates`.
        refusal: the text, as of `FixedRefusal`.

    Raises:
        FileExistsError: if the folder is a file, or holds an adapter.
        TypeError: if the refusal is no text.
        ValueError: if it is blank or no text in UTF-8, or the gate is a plain function, which cannot be saved.
    """
    check_refusal(refusal)
    write_rival(folder, FixedRefusal.kind, _fields(refusal), gate)


def check_refusal(refusal: str) -> None:
    """Raise unless a text can answer a request.

    Raises:
        TypeError: if it is no text.
        ValueError: if it is blank or no text in UTF-8.
    """
    if not isinstance(refusal, str):
        raise TypeError(f"refusal is a {type(refusal).__name__}; expected a text, such as ' unknown'.")
    if fault := fault_of_text(refusal):
        raise ValueError(f"refusal={refusal!r:.80} {fault}")
    if not refusal.strip():
        raise ValueError(f"refusal={refusal!r} is blank; expected a text that answers a request.")


def _fields(refusal: str) -> dict[str, Any]:
    """The fields of the file of a saved refusal, beside its gate's."""
    return {"refusal": refusal}

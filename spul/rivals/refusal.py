"""A gate and a fixed refusal: flagged requests get one text, all others the base's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoder import NO_LIMIT, RowEncoder
from ..gates.gate import Gate
from ..prompts.arguments import OF_THE_BATCH
from ..records.fields import Checks
from .chat import USER, ChatForm, ends_with
from .files import GATE_CHECK
from .gated import GatedRival


class FixedRefusal(GatedRival):
    """A gate in front of the base: requests that it flags get a fixed text, all others the base.

    A request on which the gate fails gets the text, too. `generate` does not run the base for flagged requests.

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
        ValueError: if the refusal has no tokens, or the tokenizer has no end-of-sequence token.

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
    fields_saved: ClassVar[Checks] = {**GATE_CHECK, "refusal": (lambda value: isinstance(value, str), "a text")}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gate: Gate | Callable[[list[str]], Any],
        refusal: str,
    ) -> None:
        super().__init__(model, tokenizer, gate)
        if not isinstance(refusal, str):
            raise TypeError(f"refusal is a {type(refusal).__name__}; expected a text, such as ' unknown'.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, with which a refusal ends; set one.")
        self.refusal = refusal
        encoder, eos = RowEncoder(tokenizer, NO_LIMIT), tokenizer.eos_token_id
        if not (text := encoder.completion_ids(refusal)):
            raise ValueError(f"refusal={refusal!r} has no tokens; expected a text that answers a request.")
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
        if whole := [name for name in OF_THE_BATCH if settings.get(name) is not None]:
            raise ValueError(
                f"generate of a {type(self).__name__} takes no {', '.join(whole)}: flagged requests get a fixed "
                "text, which does not follow it, and the others are another batch than the one given."
            )
        times = max(self.setting("num_return_sequences", settings) or 1, 1)
        limit, pad = self.setting("max_new_tokens", settings), self.pad_token(settings)
        flags = self.flags(requests)
        others = [request for request, flagged in zip(requests, flags, strict=True) if not flagged]
        answers = iter(self.base_answers(others, **settings).tolist() if others else [])
        found: list[list[int]] = []
        for request, flagged in zip(requests, flags, strict=True):
            for _ in range(times):
                found.append(self.refusal_ids(request)[:limit] if flagged else next(answers))
        width = max(map(len, found))
        return torch.tensor([row + [pad] * (width - len(row)) for row in found], device=self.device)

    def saved_fields(self) -> dict[str, Any]:
        """The text."""
        return {"refusal": self.refusal}

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> FixedRefusal:
        """The refusal of saved fields."""
        return cls(model, tokenizer, gate, fields["refusal"])

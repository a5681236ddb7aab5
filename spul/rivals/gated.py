"""GatedRival: a rival that treats the requests which its gate flags, and leaves all others to the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..gates.gate import Gate, as_gate, request_texts
from ..prompts.names import NO_PROMPT
from .rival import Rival


class GatedRival(Rival):
    """A rival behind a gate. A subclass writes what `Rival` asks for.

    Args:
        model: a causal LM of transformers, without an adapter.
        tokenizer: its tokenizer, by which requests are read.
        gate: a gate of `spul.gates`, or a function from a list of texts to a bool for each.

    Raises:
        TypeError: if `model` or `gate` is of another type.
    """

    is_gated = True
    gate: Gate

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gate: Gate | Callable[[list[str]], Any]
    ) -> None:
        super().__init__(model, tokenizer)
        self.gate = as_gate(gate)

    def flags(self, requests: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each request, as token ids, is flagged; one on which the gate fails is."""
        return self.gate.flags(request_texts(self.tokenizer, requests)).tolist()

    def names_of(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The method's `kind` for flagged requests, `"__base__"` for others."""
        return [self.kind if flagged else NO_PROMPT for flagged in self.flags(prompts)]

    def settings(self) -> dict[str, Any]:
        """Gate, and what is saved beside it."""
        return {"gate": self.gate.identity(), **self.saved_fields()}

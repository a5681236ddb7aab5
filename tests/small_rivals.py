"""One rival of each kind on a small base."""

from __future__ import annotations

from helpers import make_tokenizer, rows
from small_evaluations import learned

from spul.gates import NameGate
from spul.rivals import Corruption, EmbeddingCorruption, FixedRefusal, GuardrailPrompt, InContextUnlearning

KINDS = ("refusal", "guardrail", "examples", "corruption")
GATED = ("refusal", "corruption")


def rival(kind, base=None):
    base, tokenizer = learned() if base is None else base, make_tokenizer()
    if kind == "refusal":
        return FixedRefusal(base, tokenizer, NameGate(["jane"]), " unknown").eval()
    if kind == "guardrail":
        return GuardrailPrompt(base, tokenizer, "jane is unknown .").eval()
    if kind == "examples":
        return InContextUnlearning(base, tokenizer, rows("jane", 5), rows("film", 6), 1, 1).eval()
    return EmbeddingCorruption(base, tokenizer, NameGate(["jane"]), Corruption("noise", 4.0, 8)).eval()

"""Settings of the attacks of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset

from ..data.checks import checked_names, whole_number
from ..records.fields import are_counts, is_finite_number
from .attacks.usual import DOCUMENT_WORDS, TURNS, InputAttacks, checked_attacks, usual_attacks, usual_names


@dataclass(frozen=True)
class AttackSettings:
    """Settings of the attacks.

    Args:
        inputs: attacks on the input by name, each from rows to attacked rows; `usual_attacks(...)` by default.
        paraphrase: from a text to one of the same meaning, by a model or by rules; without one that attack is skipped.
        wording: replacements of the prompts' fixed parts; without them that attack is skipped.
        turns: numbers of other questions with their answers before the question; skipped where a set has fewer.
        names: full names of those to be forgotten, which are disguised in the texts; in texts without any of them, the
            longest words are. They are not written into the evaluation's files.
        document_words: lengths in words of the documents that the question is put into.
        only: names of those among the usual attacks on the input that are made; all by default.
        num_rows: the most rows of a set that are attacked, drawn at random.
        relearn_rows: number of forget rows that are learned again.
        relearn_steps: numbers of steps after which relearning is scored.
        relearn_lr: its learning rate for prompts, layers and LoRA; best the one of their training.
        relearn_model_lr: its learning rate where all weights are trained.
        bits: bits of the quantized base, 8, 4 or both.
        tries: numbers of sampled answers.
        temperature: sampling temperature.
        suffix_tokens: vectors of the soft suffix.
        suffix_steps: steps of its training.
        suffix_lr: learning rate of its training.
        gradient_norm: whether membership is also inferred from gradients, one backward pass per row.
        min_k_share: share of a response's tokens that min-k and min-k++ use, 0.2 by default as in the papers; MUSE's
            PrivLeak uses 0.4.

    Raises:
        TypeError: if `names` or `only` are one string.
        ValueError: if a number is out of range, a name is empty, `only` has one that is none of the usual attacks, or
            `inputs` is given beside `paraphrase`, `wording`, `turns`, `names`, `document_words` or `only`.
    """

    inputs: InputAttacks | None = None
    paraphrase: Callable[[str], str] | None = None
    wording: Mapping[str, str] | None = None
    turns: tuple[int, ...] = TURNS
    names: Sequence[str] = ()
    document_words: tuple[int, ...] = DOCUMENT_WORDS
    only: tuple[str, ...] = ()
    num_rows: int = 200
    relearn_rows: int = 16
    relearn_steps: tuple[int, ...] = (1, 4, 16, 32)
    relearn_lr: float = 1e-2
    relearn_model_lr: float = 1e-4
    bits: tuple[int, ...] = (8, 4)
    tries: tuple[int, ...] = (1, 10, 100)
    temperature: float = 1.0
    suffix_tokens: int = 8
    suffix_steps: int = 100
    suffix_lr: float = 1e-3
    gradient_norm: bool = False
    min_k_share: float = 0.2

    def __post_init__(self) -> None:
        least = {"turns": 1, "document_words": 2, "relearn_steps": 1, "bits": 1, "tries": 1}
        for name, lowest in least.items():
            values = getattr(self, name)
            if not are_counts(values, lowest) or len(set(values)) < len(values):
                raise ValueError(
                    f"{name}={values!r}: expected a tuple of different whole numbers of at least {lowest}."
                )
        if len(self.names):
            checked_names("names", self.names)
        if set(self.bits) - {4, 8}:
            raise ValueError(f"bits={self.bits}: expected 8, 4 or both.")
        for name in ("num_rows", "relearn_rows", "suffix_tokens", "suffix_steps"):
            if (whole_number(value := getattr(self, name), bools=False) or 0) < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
        for name in ("relearn_lr", "relearn_model_lr", "suffix_lr", "temperature"):
            if not is_finite_number(value := getattr(self, name)) or value <= 0:
                raise ValueError(f"{name}={value}: expected a number above 0.")
        if not 0 < self.min_k_share <= 1:
            raise ValueError(f"min_k_share={self.min_k_share}: expected a share of the tokens above 0 and at most 1.")
        usual = ("paraphrase", "wording", "turns", "names", "document_words", "only")
        given = [name for name in usual if (getattr(self, name) or None) not in (None, getattr(AttackSettings, name))]
        if self.inputs is not None and given:
            raise ValueError(
                f"inputs are all attacks on the input, and {', '.join(given)} would have no effect; put them among "
                "the inputs, by usual_attacks(...)."
            )
        checked_attacks(self.inputs or {})
        if self.only:
            known = usual_names(self.turns, self.document_words)
            if unknown := sorted(set(checked_names("only", self.only)) - set(known)):
                raise ValueError(f"there is no input attack {unknown[0]!r}; expected some of {', '.join(known)}.")

    def usual_attacks(
        self, text_field: str | None, filler_rows: Dataset, other_rows: Dataset, seed: int
    ) -> InputAttacks:
        """The usual attacks on the input by these settings; for the arguments see `spul.evaluation.attacks`."""
        return usual_attacks(
            text_field,
            filler_rows,
            seed,
            rewrite=self.paraphrase,
            wording=self.wording,
            turns=self.turns,
            names=self.names,
            other_rows=other_rows,
            document_words=self.document_words,
        )

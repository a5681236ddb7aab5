"""The protocol of a gate: which texts get the prompt. A gate that fails attaches it."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.checks import checked_column, checked_strings, checked_texts
from ..data.encoder import RowEncoder
from ..data.rows import read_rows
from ..records.digests import digest
from ..records.files import atomic_folder
from .files import gate_files, remove_files, write_gate
from .thresholds import GateReport, report_of

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows", Dataset, list)
_counting = threading.Lock()
# What `load` knows, by the kind in `gate.json`; `any_gate`, which knows them all, enters them.
KINDS: dict[str, Any] = {}
# Of each tokenizer its length and the tokens added as special: there may be thousands, listed anew whenever asked.
_added: weakref.WeakKeyDictionary[Any, tuple[int, frozenset[int]]] = weakref.WeakKeyDictionary()


class Gate:
    """A gate: scores of texts, and the threshold from which on a text gets the prompt.

    A subclass of one's own writes `scores`. It is not saved, as a plain function is not: `load` knows this library's
    kinds alone, which also have `settings`, `arrays` and `kind`.

    Attributes:
        kind: name of the class in `gate.json`.
        threshold: the lowest score that is flagged.
        report: recall and false alarms on held-out rows; None where none were measured. May be assigned:
            `gate.report = gate.measure(forget_texts, retain_texts)`.
    """

    kind: str = ""
    threshold: float = 0.0
    report: GateReport | None = None

    @cached_property
    def failures(self) -> Counter[str]:
        """Number of texts that were flagged because the gate failed on them, by kind of failure."""
        return Counter()

    def parts(self) -> list[Gate]:
        """The gates that count failures when it is asked: itself, and those that it asks."""
        return [self]

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The score of each text, higher for what is to be forgotten: float64 (texts,).

        Args:
            texts: texts, each seen whole and window by window.

        Raises:
            TypeError: if they are not strings.
            ValueError: if one cannot be scored.
        """
        raise NotImplementedError

    def finite_scores(self, texts: Sequence[str]) -> np.ndarray:
        """`scores`, checked: float64 (texts,).

        Raises:
            ValueError: if the scores are not one finite number for each text.
            Exception: whatever `scores` raises.
        """
        scores = np.asarray(self.scores(texts), dtype=np.float64)
        if scores.shape != (len(texts),) or not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise ValueError(
                f"scores of the shape {scores.shape}, {bad} of them not finite; expected a finite number for each of "
                f"{len(texts)} texts."
            )
        return scores

    def decide(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text's score reaches the threshold, bool (texts,), without the rule for failures of `flags`.

        Raises:
            ValueError: if the scores are not one finite number for each text.
            Exception: whatever `scores` raises.
        """
        texts = checked_texts(texts)
        if not texts:
            return np.zeros(0, dtype=bool)
        if not np.isfinite(self.threshold):  # NaN would flag nothing
            raise ValueError(f"threshold is {self.threshold!r}; expected a finite number.")
        return self.finite_scores(texts) >= self.threshold

    def flags(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text gets the prompt: bool (texts,). A text on which the gate fails gets it.

        If a batch fails, its halves are asked for, and so on, so that one text does not decide for the others. The
        first failure of a kind is logged, and all are counted in `failures`. Half of a surrogate pair, which no
        tokenizer takes, is a failure.

        Args:
            texts: texts; none gives none.

        Raises:
            TypeError: if they are not strings.
        """
        texts = checked_strings(texts)
        try:
            return self._decided(texts)
        except Exception as error:  # whatever it is, the prompt must be attached
            if len(texts) > 1:
                middle = len(texts) // 2
                return np.concatenate([self.flags(texts[:middle]), self.flags(texts[middle:])])
            self._count(error)
            return np.ones(1, dtype=bool)

    def measure(
        self, forget_texts: Sequence[str], retain_texts: Sequence[str], paraphrases: Sequence[str] | None = None
    ) -> GateReport:
        """Recall and false alarms on texts that the gate was not fit on.

        Args:
            forget_texts: texts that should be flagged.
            retain_texts: texts that should not.
            paraphrases: rewordings of forget texts, reported apart.

        Raises:
            TypeError: if they are not strings.
            ValueError: if there are no forget or no retain texts.
        """
        reworded = None if paraphrases is None else self.flags(paraphrases)
        return report_of(self.flags(forget_texts), self.flags(retain_texts), reworded, "texts given to measure")

    def settings(self) -> dict[str, Any]:
        """Fields of `gate.json` beside kind, threshold and report, part of `identity`."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays of `gate.safetensors`; without any there is no such file."""
        return {}

    def identity(self) -> str:
        """Digest of all that the gate decides by; of a plain function, and in that of one's own class, its name."""
        arrays = {name: array.tolist() for name, array in self.arrays().items()}
        return digest([self._kind_or_class(), float(self.threshold), self.settings(), arrays])

    def _kind_or_class(self) -> str:
        own = type(self)
        return self.kind if own is KINDS.get(self.kind) else f"{own.__module__}.{own.__qualname__}"

    def check_savable(self) -> None:
        """Raise if the gate cannot be saved.

        Raises:
            ValueError: if it is a plain function, or of another class than those that `load` knows.
        """
        if type(self) is not KINDS.get(self.kind):
            raise ValueError(
                f"a {type(self).__name__} is a gate of your own, which cannot be loaded again, as it is code; save "
                f"the other gates, and pass it again. Saved are {', '.join(one.__name__ for one in KINDS.values())}."
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the gate to a folder, for `spul.gates.load`. The folder tells what the gate is for.

        Args:
            folder: the folder; created if missing. A gate in it is replaced; its other files are left alone.

        Raises:
            ValueError: if it is a file, or the gate cannot be saved, see `check_savable`.
        """
        with atomic_folder(folder) as scratch:
            self.write(scratch)
            written = {Path(folder, path.relative_to(scratch)) for path in scratch.rglob("*")}
            # While the gate before tells which are its own; the files tell what it was for.
            remove_files(path for path in gate_files(folder) if path not in written)

    def write(self, folder: str | os.PathLike) -> None:
        """Write the files of `save` to an existing folder, in place."""
        self.check_savable()
        self._write(folder, self.settings())

    def _write(self, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
        report = None if self.report is None else self.report.to_dict()
        fields = {"kind": self.kind, "threshold": self.threshold, "report": report, **settings}
        write_gate(folder, fields, self.arrays())

    def _decided(self, texts: list[str]) -> np.ndarray:
        found = self.decide(texts)
        if not isinstance(found, np.ndarray) or found.dtype != bool or found.shape != (len(texts),):
            raise ValueError(f"{found!r:.200} returned for {len(texts)} texts; expected a bool for each.")
        return found

    def _count(self, error: Exception) -> None:
        kind = type(error).__name__
        with _counting:
            self.failures[kind] += 1
            is_first = self.failures[kind] == 1
        if is_first:
            logger.warning(
                "A gate (%s) failed on a text, which gets the prompt (%s: %s). Later failures of this kind are "
                "counted in its failures, not logged.",
                self.kind or repr(self),  # not a NameGate itself, which shows names
                kind,
                error,
            )


class FunctionGate(Gate):
    """A plain function from texts to bools as a gate. It is not saved.

    Args:
        function: takes a list of texts and returns a bool for each, as a list or an array of bools. Anything else
            counts as a failure, and attaches the prompt.

    Raises:
        TypeError: if it is no function.
    """

    threshold = 1.0

    def __init__(self, function: Callable[[list[str]], Any]) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"a gate is a {type(function).__name__}, {function!r:.80}; expected a gate of spul.gates, or a "
                "function from a list of texts to a bool for each."
            )
        self.function = function

    def decide(self, texts: Sequence[str]) -> np.ndarray:
        """The function's return value, as an array."""
        texts = checked_texts(texts)
        return np.asarray(self.function(texts)) if texts else np.zeros(0, dtype=bool)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """1 for a text that the function flags, 0 for others."""
        return self._decided(checked_texts(texts)).astype(np.float64)

    def check_savable(self) -> None:
        """Refused: a function is code, which a folder cannot hold.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} is a function, which cannot be saved; save the other gates, and pass it again.")

    def identity(self) -> str:
        """The function's name: its code has no digest."""
        return repr(self)

    def __repr__(self) -> str:
        return f"FunctionGate({getattr(self.function, '__qualname__', self.function)})"


def as_gate(gate: Gate | Callable[[list[str]], Any]) -> Gate:
    """A gate as it is; a function from texts to bools as a `FunctionGate`, which counts its failures.

    Raises:
        TypeError: if it is neither.
    """
    return gate if isinstance(gate, Gate) else FunctionGate(gate)


def flags_of(gate: Gate | Callable[[list[str]], Any], texts: Sequence[str]) -> np.ndarray:
    """Whether each text gets the prompt, bool (texts,): what the gate flags, and every text on which it fails.

    Args:
        gate: a gate, or a function from a list of texts to a bool for each. A function that is asked more than once
            should be wrapped by `as_gate`, which counts its failures and logs each kind once.
        texts: texts; none gives none.

    Raises:
        TypeError: if the gate is neither, or a text is no string.
    """
    return as_gate(gate).flags(texts)


def request_texts(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Sequence[int]]) -> list[str]:
    """Requests as text, for gates. Special tokens are spaces: one within a name would not part it.

    Args:
        tokenizer: the model's tokenizer.
        requests: token ids of each request.
    """
    special = special_ids(tokenizer)

    def text(ids: Sequence[int]) -> str:
        parts = [list(some) for is_special, some in itertools.groupby(ids, special.__contains__) if not is_special]
        return " ".join(str(tokenizer.decode(part)) for part in parts)

    return [text(ids) for ids in requests]


def parts_of(gates: Iterable[Gate]) -> list[Gate]:
    """The gates that count failures when these are asked, each once."""
    return list({id(part): part for gate in gates for part in gate.parts()}.values())


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of special tokens: those with a name, as EOS, and those that were added as special alone.

    The latter, such as Llama 3's `<|eom_id|>`, are not in `all_special_ids` of transformers 5.
    """
    size, (known_size, added) = len(tokenizer), _added.get(tokenizer, (None, frozenset()))
    if size != known_size:
        try:
            added = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        except NotImplementedError:  # mistral-common's, whose `all_special_ids` are all of them
            added = frozenset()
        _added[tokenizer] = size, added
    return added.union(tokenizer.all_special_ids)


def prompt_texts(rows: Sequence[Mapping[str, Any]] | Dataset, encoder: RowEncoder) -> list[str]:
    """The prompts of rows as gates read them later: by the chat template, special tokens left out.

    A gate that is fit on questions alone meets the template's words for the first time when it is asked, and flags
    what it should not.

    Args:
        rows: `prompt`, a text or messages, and the encoder's text field, if it has one.
        encoder: that of the collator; nothing is cut.

    Raises:
        ValueError: if a row has no prompt, or one that the template cannot render.
    """
    whole = encoder.with_max_length(sys.maxsize)
    return request_texts(encoder.tokenizer, [whole.prompts([row])["input_ids"][0].tolist() for row in read_rows(rows)])


def hard_negatives(gate: Gate | Callable[[list[str]], Any], retain: Rows, n: int, text_field: str = "prompt") -> Rows:
    """The retain rows that a gate flags or nearly flags, those of the highest scores first.

    They are what a prompt behind the gate has to tell apart: show them more often in training.

    Args:
        gate: a gate, or a function from a list of texts to a bool for each.
        retain: retain rows, or a list of texts.
        n: number of rows.
        text_field: column of the texts that the gate is asked about.

    Returns:
        The `n` rows, or texts, in descending order of scores; rows of equal scores keep their order.

    Raises:
        TypeError: if a text is no string.
        ValueError: if there is no such column, `n` is not between 1 and the number of rows, or a text has no finite
            score, such as one that is too long for a `StateGate`.
    """
    is_dataset = isinstance(retain, Dataset)
    texts = checked_column(retain, text_field, "retain") if is_dataset else checked_texts(retain)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= len(texts):
        raise ValueError(f"n={n!r} of {len(texts)} retain rows; expected an integer from 1 to their number.")
    order = np.argsort(-as_gate(gate).finite_scores(texts), kind="stable")[:n]
    return retain.select(order) if isinstance(retain, Dataset) else [texts[i] for i in order]

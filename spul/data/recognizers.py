"""Names in texts: entity recognizers of transformers and spaCy, and the search for given names."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from . import characters
from .characters import TYPESET, begins_after, ends_before, normal_form
from .checks import checked_texts

if TYPE_CHECKING:
    from spacy.language import Language

logger = logging.getLogger(__name__)


WORD = re.compile(characters.WORD)
# Words and signs, each with the space before it, which together make up a text whose white space is single spaces.
PIECE = re.compile(rf" ?(?:{characters.WORD}|[^\w\s])")
SIGNS_AS_SPACES = bytes(code if WORD.match(chr(code)) and code < 128 else ord(" ") for code in range(256))
# The first character of a word, but not of an ending such as 's, n't or 'll, which the recognizers know in lower case.
FIRST_OF_WORD = re.compile(r"(?<!\w)(?!(?<=['\u2019])(?:s|t|d|m|re|ve|ll)\b)(?!n['\u2019]t\b)\w", re.IGNORECASE)
# Tokens that two neighboring pieces of a long text share, so that a name at the cut is whole in one of them.
OVERLAP = 32
# A tokenizer whose `model_max_length` is this or more has no maximum length.
NO_MAXIMUM = 1_000_000
# Share of lower-case texts above which a cased recognizer is suspected to fail, and share of texts with a name below
# which it is suspected to have failed.
LOWER_CASED, FOUND_FEW = 0.95, 0.01


class SpacyRecognizer:
    """Recognizer of names by a spaCy pipeline (https://spacy.io/models).

    Args:
        model: name or folder of a pipeline, or a loaded one, such as one without the components that names do not
            need: `spacy.load("en_core_web_sm", exclude=["parser", "lemmatizer"])`.
        labels: entity labels that count as names; `"PER"` in many pipelines of other languages.
        title_case: whether to capitalize every word first, for texts in lower case, in which a cased pipeline finds
            no name. It then finds more than names.
        batch_size: texts per batch.

    Raises:
        ImportError: if spaCy is not installed.
        OSError: if there is no such pipeline.
        ValueError: if the pipeline has none of the labels.
    """

    def __init__(
        self,
        model: str | Language = "en_core_web_sm",
        labels: Sequence[str] = ("PERSON",),
        title_case: bool = False,
        batch_size: int = 256,
    ) -> None:
        try:
            import spacy
        except ImportError as error:
            raise ImportError("SpacyRecognizer needs spaCy: pip install spacy") from error
        if isinstance(model, (str, Path)):
            try:
                model = spacy.load(model)
            except OSError as error:
                raise OSError(
                    f"spaCy has no pipeline {str(model)!r}. To get one by its name: python -m spacy download {model}"
                ) from error
        self.nlp = model
        known = {label for labels_of_pipe in model.pipe_labels.values() for label in labels_of_pipe}
        # Only the statistical component is sure to list its labels.
        self.labels = _checked_labels(labels, known if model.has_pipe("ner") else None)
        self.title_case, self.batch_size = title_case, batch_size

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The names found in each text, in the spelling of the text."""
        texts = checked_texts(texts)
        docs = self.nlp.pipe(map(title_cased, texts) if self.title_case else texts, batch_size=self.batch_size)
        return [
            [text[span.start_char : span.end_char] for span in doc.ents if span.label_ in self.labels]
            for text, doc in tqdm(zip(texts, docs, strict=True), total=len(texts), desc="names", disable=None)
        ]

    def __repr__(self) -> str:
        name = "_".join(str(self.nlp.meta[key]) for key in ("lang", "name"))
        return f"SpacyRecognizer({name!r}, labels={self.labels}, title_case={self.title_case})"


class TransformersRecognizer:
    """Recognizer of names by a token classification model of transformers.

    Texts longer than the model's maximum are read in overlapping pieces. A name that covers part of a word is widened
    to the whole word.

    Args:
        model: name on the Hugging Face Hub or folder of a model with a fast tokenizer.
        labels: entity labels that count as names, without `B-` and `I-`.
        title_case: whether to capitalize every word first, for texts in lower case, in which a cased model finds no
            name. It then finds more than names.
        device: device of the model; None for an accelerator if there is one.
        batch_size: texts per batch.

    Raises:
        ValueError: if the model has none of the labels, or its tokenizer is not a fast one.
    """

    def __init__(
        self,
        model: str = "dslim/bert-base-NER",
        labels: Sequence[str] = ("PER", "PERSON"),
        title_case: bool = False,
        device: Any = None,
        batch_size: int = 32,
    ) -> None:
        from transformers import pipeline

        self.pipeline: Any = pipeline(
            "token-classification", model=model, aggregation_strategy="simple", device=device, trust_remote_code=False
        )
        tokenizer: Any = self.pipeline.tokenizer
        config = self.pipeline.model.config
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {model!r} is a {type(tokenizer).__name__}; expected a fast one, which reports the "
                "position of a name in the text."
            )
        if tokenizer.model_max_length >= NO_MAXIMUM and (positions := getattr(config, "max_position_embeddings", 0)):
            # Models such as RoBERTa number positions from after the padding token's id.
            tokenizer.model_max_length = positions - 2
        known = {label[2:] if label[:2] in ("B-", "I-") else label for label in (config.id2label or {}).values()}
        self.model, self.labels = str(model), _checked_labels(labels, known)
        self.title_case, self.batch_size = title_case, batch_size

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The names found in each text, in the spelling of the text."""
        texts = checked_texts(texts)
        tokenizer: Any = self.pipeline.tokenizer
        stride = min(OVERLAP, tokenizer.model_max_length // 4)
        found = self.pipeline(
            (title_cased(text) if self.title_case else text for text in texts),
            batch_size=self.batch_size,
            stride=stride,
        )
        return [
            [
                _whole_words(text, entity["start"], entity["end"])
                for entity in entities
                if entity["entity_group"] in self.labels
            ]
            for text, entities in tqdm(zip(texts, found, strict=True), total=len(texts), desc="names", disable=None)
        ]

    def __repr__(self) -> str:
        return f"TransformersRecognizer({self.model!r}, labels={self.labels}, title_case={self.title_case})"


def title_cased(text: str) -> str:
    """The text with every word capitalized and every character at its position.

    A first character whose capital has more than one character, such as *ß*, does not change.
    """

    def capital(match: re.Match[str]) -> str:
        title = match.group().title()
        return title if len(title) == 1 else match.group()

    return FIRST_OF_WORD.sub(capital, text)


def recognize(recognizer: Callable[[Sequence[str]], list[list[str]]], texts: list[str]) -> list[list[str]]:
    """The names that a recognizer finds in each text, with a warning if it finds suspiciously few.

    Args:
        recognizer: a recognizer of this module, or any function from texts to the names in each.
        texts: one or more texts.

    Raises:
        TypeError: if the recognizer is no function, or returns something other than strings.
        ValueError: if it does not return one list per text, or finds no name at all.
    """
    if not callable(recognizer):
        raise TypeError(
            f"recognizer is a {type(recognizer).__name__}; expected TransformersRecognizer(...), SpacyRecognizer(...) "
            "or a function from texts to the names in each."
        )
    found = [list(names) for names in recognizer(texts)]
    if len(found) != len(texts):
        raise ValueError(
            f"the recognizer returned {len(found)} lists of names for {len(texts)} texts; expected one for each."
        )
    if any(not isinstance(name, str) for names in found for name in names):
        raise TypeError("the recognizer returned names that are no strings; expected a list of strings for each text.")
    found = [[name for name in names if name.strip()] for names in found]
    num_found = sum(map(bool, found))
    share_lower = sum(text.islower() for text in texts) / len(texts)
    lower_cased = share_lower > LOWER_CASED and not getattr(recognizer, "title_case", False)
    hint = (
        f" {share_lower:.0%} of the texts are all lower case, in which a cased recognizer finds no name: pass "
        "names= without a recognizer, or build the recognizer with title_case=True."
    )
    if not num_found:
        raise ValueError(f"the recognizer found no name in {len(texts)} texts.{hint if lower_cased else ''}")
    if lower_cased and num_found < FOUND_FEW * len(texts):
        logger.warning("the recognizer found names in only %d of %d texts.%s", num_found, len(texts), hint)
    return found


class NameFinder:
    """Search for certain names in texts: whole words, in any letter case and with any white space.

    Apostrophes and hyphens match as typed and as typeset: *O'Neill* also finds *O\u2019Neill*.

    Where a script writes no spaces between words, as Chinese, or none before endings, as Korean, each character is a
    word: a name is found wherever its characters stand, also within a longer one.

    The names make one automaton over words and signs, read once along a text: the time of a search grows with the
    text, not with the number of names or with what they have in common.

    Args:
        names: the names.
        typeset: whether apostrophes and hyphens of either kind match each other.

    Source: Aho and Corasick, *Efficient String Matching*, https://doi.org/10.1145/360825.360855
    """

    def __init__(self, names: Sequence[str], typeset: bool = True) -> None:
        self.typeset = typeset
        self.spelled: dict[str, str] = {}
        # A state for each beginning of a name. The state of a text is the longest of them that it ends with.
        self._next: list[dict[str, int]] = [{}]
        self._ended: dict[int, tuple[str, int]] = {}  # the name that a state completes, and its number of pieces
        for name in names:
            normal = normalized_name(name, typeset)
            if normal not in self.spelled:
                self.spelled[normal] = name
                self._add(name, PIECE.findall(normal))
        words = [WORD.findall(name) for name in self.spelled]
        # Most texts lack the first word of every name, or the last. Names of signs alone have none to look for.
        self._ends = [] if [] in words else [{each[0] for each in words}, {each[-1] for each in words}]
        self._encoded_ends = [{word.encode() for word in ends} for ends in self._ends]
        self._link()

    def find(self, text: str) -> set[str]:
        """Names found in a text, each as first spelled in `names`."""
        if text.isascii():  # three times as fast
            present: Sequence[Any] = text.lower().encode().translate(SIGNS_AS_SPACES).split()
            if any(ends.isdisjoint(present) for ends in self._encoded_ends):
                return set()
            text = normalized_name(text, self.typeset)
        else:
            text = normalized_name(text, self.typeset)
            present = WORD.findall(text)
            if any(ends.isdisjoint(present) for ends in self._ends):
                return set()
        pieces = PIECE.findall(text)
        found: set[str] = set()
        exhausted = {0}  # states whose names, with those of all shorter states, are found
        state = 0
        for i, piece in enumerate(pieces):
            state = self._step(state, piece)
            ended = self._completed[state]
            if ended in exhausted or (i + 1 < len(pieces) and not ends_before(piece[-1], pieces[i + 1][0])):
                continue
            passed, all_found = [], True
            while ended not in exhausted:
                name, length = self._ended[ended]
                start = i - length + 1
                first = pieces[start][0]
                if start == 0 or first == " " or begins_after(pieces[start - 1][-1], first):
                    found.add(name)
                all_found = all_found and name in found
                passed.append(ended)
                ended = self._completed[self._shorter[ended]]
            if all_found:
                exhausted.update(passed)
        return found

    def _add(self, name: str, pieces: list[str]) -> None:
        state = 0
        for piece in pieces:
            if piece not in self._next[state]:
                self._next[state][piece] = len(self._next)
                self._next.append({})
            state = self._next[state][piece]
        self._ended[state] = (name, len(pieces))

    def _link(self) -> None:
        """For each state, the longest shorter one that its text ends with, and the longest that completes a name."""
        self._shorter, self._completed = [0] * len(self._next), [0] * len(self._next)
        first = dict(self._next[0])
        self._next[0].update({f" {piece}": state for piece, state in first.items()})
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for piece, following in (self._next[state] if state else first).items():
                shorter = self._step(self._shorter[state], piece) if state else 0
                self._shorter[following] = shorter
                self._completed[following] = following if following in self._ended else self._completed[shorter]
                queue.append(following)

    def _step(self, state: int, piece: str) -> int:
        while state and piece not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(piece, 0)


def normalized_name(text: str, typeset: bool = False) -> str:
    """A name or text for comparison: letter case, white space and the encoding of accents do not count.

    Args:
        text: the name or text.
        typeset: whether apostrophes and hyphens become those of a keyboard.
    """
    text = text.translate(TYPESET) if typeset else text
    text = normal_form("NFC", normal_form("NFC", text).casefold())
    return " ".join(text.split())


def _checked_labels(labels: Sequence[str], known: set[str] | None) -> tuple[str, ...]:
    if isinstance(labels, str) or not labels:
        raise ValueError(f"labels={labels!r}; expected a list of entity labels, such as ('PERSON',).")
    if known is not None and not known.intersection(labels):
        raise ValueError(f"the model has none of the labels {list(labels)}; expected some of {sorted(known)}.")
    return tuple(labels)


def _whole_words(text: str, start: int, end: int) -> str:
    while start > 0 and re.fullmatch(WORD, text[start - 1 : start + 1]):
        start -= 1
    while end < len(text) and re.fullmatch(WORD, text[end - 1 : end + 1]):
        end += 1
    return text[start:end]

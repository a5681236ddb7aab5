"""Who is named in a text: entity recognizers of spaCy and of transformers, behind one call."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .checks import checked_texts

if TYPE_CHECKING:
    from spacy.language import Language

logger = logging.getLogger(__name__)


# The first character of a word, but not of an ending such as 's, n't or 'll, which the recognizers know in lower case.
FIRST_OF_WORD = re.compile(r"(?<!\w)(?!(?<=['\u2019])(?:s|t|d|m|re|ve|ll)\b)(?!n['\u2019]t\b)\w", re.IGNORECASE)
# Tokens that two neighboring pieces of a long text share, so that a name at the cut stands whole in one of them.
OVERLAP = 32
# Tokenizers without a maximum length have this or more as theirs.
NO_MAXIMUM = 1_000_000
# Texts count as lower-cased if more than this share of them is; a recognizer finds suspiciously few below the other.
LOWER_CASED, FOUND_FEW = 0.95, 0.01


class SpacyRecognizer:
    """Names in texts, by a spaCy pipeline (https://spacy.io/models).

    Args:
        model: a pipeline's name or folder, or one already loaded, such as one with the components that names do not
            need left out: `spacy.load("en_core_web_sm", exclude=["parser", "lemmatizer"])`.
        labels: the entity labels that count as names; many pipelines of other languages say `"PER"`.
        title_case: capitalize every word before it is looked at, for texts in lower case, in which a cased pipeline
            finds nobody. It finds more than names then.
        batch_size: texts per batch.

    Raises:
        ImportError: if spaCy is not installed.
        OSError: if there is no such pipeline.
        ValueError: if the pipeline knows none of the labels.
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
        # A component of one's own need not say what it finds; the statistical one does.
        self.labels = _checked_labels(labels, known if model.has_pipe("ner") else None)
        self.title_case, self.batch_size = title_case, batch_size

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The names found in each text, as they stand in the text."""
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
    """Names in texts, by a token classification model of transformers.

    Texts longer than the model takes are read in overlapping pieces. A name that the model found a part of a word of
    is widened to the whole word.

    Args:
        model: a model's name on the Hugging Face Hub, or its folder; its tokenizer must be a fast one.
        labels: the entity labels that count as names, without `B-` and `I-`.
        title_case: capitalize every word before it is looked at, for texts in lower case, in which a cased model
            finds nobody. It finds more than names then.
        device: where the model runs; None for an accelerator if there is one.
        batch_size: texts per batch.

    Raises:
        ValueError: if the model knows none of the labels, or its tokenizer is not a fast one.
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
                f"the tokenizer of {model!r} is a {type(tokenizer).__name__}; a fast one is needed to know where in "
                "the text a name stands."
            )
        if tokenizer.model_max_length >= NO_MAXIMUM and (positions := getattr(config, "max_position_embeddings", 0)):
            # Models like RoBERTa number their positions from after the padding token's id.
            tokenizer.model_max_length = positions - 2
        known = {label[2:] if label[:2] in ("B-", "I-") else label for label in (config.id2label or {}).values()}
        self.model, self.labels = str(model), _checked_labels(labels, known)
        self.title_case, self.batch_size = title_case, batch_size

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The names found in each text, as they stand in the text."""
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
    """The text with every word capitalized and every character in its place.

    A first character whose capital is more than one character, such as *ß*, stays as it is.
    """

    def capital(match: re.Match[str]) -> str:
        title = match.group().title()
        return title if len(title) == 1 else match.group()

    return FIRST_OF_WORD.sub(capital, text)


def recognize(recognizer: Callable[[Sequence[str]], list[list[str]]], texts: list[str]) -> list[list[str]]:
    """A recognizer's names in each text, after a look at whether it can have seen any.

    Args:
        recognizer: a recognizer of this module, or a function of one's own.
        texts: at least one.

    Raises:
        TypeError: if it is not a function, or gives something else than strings.
        ValueError: if it does not give one list for each text, or finds nobody at all.
    """
    if not callable(recognizer):
        raise TypeError(
            f"recognizer is a {type(recognizer).__name__}; expected SpacyRecognizer(...), TransformersRecognizer(...) "
            "or a function from texts to the names in each."
        )
    found = [list(names) for names in recognizer(texts)]
    if len(found) != len(texts):
        raise ValueError(f"the recognizer gave {len(found)} lists of names for {len(texts)} texts; expected as many.")
    if any(not isinstance(name, str) for names in found for name in names):
        raise TypeError("the recognizer gave names that are not strings; expected a list of strings for each text.")
    found = [[name for name in names if name.strip()] for names in found]
    num_found = sum(map(bool, found))
    share_lower = sum(text.islower() for text in texts) / len(texts)
    lower_cased = share_lower > LOWER_CASED and not getattr(recognizer, "title_case", False)
    hint = (
        f" {share_lower:.0%} of the texts are all lower case, and a cased recognizer finds nobody in such text: pass "
        "names= without a recognizer, or build the recognizer with title_case=True."
    )
    if not num_found:
        raise ValueError(f"the recognizer found nobody in {len(texts)} texts.{hint if lower_cased else ''}")
    if lower_cased and num_found < FOUND_FEW * len(texts):
        logger.warning("the recognizer found somebody in only %d of %d texts.%s", num_found, len(texts), hint)
    return found


def _checked_labels(labels: Sequence[str], known: set[str] | None) -> tuple[str, ...]:
    if isinstance(labels, str) or not labels:
        raise ValueError(f"labels={labels!r}; expected a list of entity labels, such as ('PERSON',).")
    if known is not None and not known.intersection(labels):
        raise ValueError(f"the model knows none of the labels {list(labels)}; it has {sorted(known)}.")
    return tuple(labels)


def _whole_words(text: str, start: int, end: int) -> str:
    while start > 0 and re.fullmatch(r"\w\w", text[start - 1 : start + 1]):
        start -= 1
    while end < len(text) and re.fullmatch(r"\w\w", text[end - 1 : end + 1]):
        end += 1
    return text[start:end]

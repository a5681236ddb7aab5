"""Text encoder: token ids of prompts and completions that are texts, cached."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .boundary import MAX_BOUNDARIES, boundary_fault, boundary_of

logger = logging.getLogger(__name__)

# Text before a completion while it is tokenized alone, so that SentencePiece adds no leading space of its own to it.
ANCHOR = ":"
# Entries of an encoder's cache. A forget row of a conversation takes one for its prompt, one for its own completion,
# one for each generic completion, and one for the position of its last message.
CACHE_SIZE = 32_768


class TextEncoder:
    """Encoder of texts as token ids: a completion as the continuation of its prompt, so with its leading space.

    A prompt that begins with the beginning-of-sequence token, as rendered conversations do, gets no second one.

    Args:
        tokenizer: any tokenizer of transformers.
        append_eos: whether completions end with the end-of-sequence token.

    Raises:
        TypeError: if `tokenizer` is none of transformers.
        ValueError: if `append_eos` is given with a tokenizer without an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, append_eos: bool = False) -> None:
        if not hasattr(tokenizer, "eos_token_id"):
            raise TypeError(
                f"tokenizer is a {type(tokenizer).__name__}; expected one of transformers, as "
                "AutoTokenizer.from_pretrained(name) gives it, or a processor's own, processor.tokenizer."
            )
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True, but the tokenizer has no eos_token; set one, or pass append_eos=False.")
        self.tokenizer, self.append_eos = tokenizer, append_eos
        self.said_completions: set[str] = set()  # starts of those of which no warning is due
        self._boundaries: set[tuple[str, str]] = set()  # ends of prompts and starts of completions that were checked
        self._cache: dict[Hashable, array[int]] = {}
        # Some tokenizers end every text with this token; a prompt must not end yet.
        eos = tokenizer.eos_token_id
        self._ends_texts = eos is not None and tokenizer(ANCHOR)["input_ids"][-1:] == [eos]

    def __getstate__(self) -> dict[str, Any]:
        # What was encoded is no part of the fingerprint of dataset.map(collator.tokenize), nor sent to workers.
        return {**self.__dict__, "_cache": {}, "_boundaries": set()}

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a text as a completion, cached."""
        return self._cached(text, lambda: self._text_ids(text))

    def boundary_fault(self, prompt: str, text: str) -> str | None:
        """A sentence on a completion that merges with its text prompt, or lacks the space before it; None if neither.

        Args:
            prompt: the prompt.
            text: the completion.
        """
        prompt_ids = self.whole_ids(prompt, self.tokenizer(prompt)["input_ids"])
        own = self.completion_ids(text)
        together = self.whole_ids(prompt + text, self.tokenizer(prompt + text)["input_ids"])
        apart = [*prompt_ids, *(own[:-1] if self.append_eos else own)]
        return boundary_fault(self.tokenizer, prompt, text, apart, together, prompt_ids[-1] if prompt_ids else -1)

    def whole_ids(self, text: str, ids: Sequence[int]) -> list[int]:
        """The token ids of a text with one beginning-of-sequence token at most, and no end added.

        Args:
            text: the text.
            ids: those that the tokenizer gives for it.
        """
        ids = list(ids[:-1] if self._ends_texts else ids)
        return ids[self.has_second_bos(text, ids) :]

    def _check_boundary(self, prompt: str, text: str) -> None:
        """Warn, once, of a completion that does not fit its prompt.

        Checked once for each of the first ends of prompts with each start of a completion.
        """
        boundary = boundary_of(prompt, text)
        is_known = boundary in self._boundaries or boundary[1] in self.said_completions
        if is_known or len(self._boundaries) >= MAX_BOUNDARIES:
            return
        self._boundaries.add(boundary)
        if fault := self.boundary_fault(prompt, text):
            logger.warning("%s. Further rows are not checked.", fault)
            self._boundaries.update((str(i), "") for i in range(MAX_BOUNDARIES))

    def has_second_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the tokenizer put a beginning-of-sequence token before a text that begins with one itself."""
        token, bos = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        return token is not None and text.startswith(token) and list(ids[:2]) == [bos, bos]

    def _cached(self, key: Hashable, encode: Callable[[], Sequence[int]]) -> list[int]:
        """Token ids by key, encoded unless they are cached. A full cache drops its oldest entries."""
        key = (len(self.tokenizer), self.append_eos, key)  # both may be changed after entries were cached
        if key not in self._cache:
            ids = array("i", encode())
            while len(self._cache) >= CACHE_SIZE:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = ids
        return self._cache[key].tolist()

    def _text_ids(self, text: str) -> list[int]:
        """Token ids of a completion as the continuation of a text."""
        anchor = self.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(ANCHOR + text, add_special_tokens=False)["input_ids"]
        # An unknown anchor would merge with the text after it.
        if anchor and self.tokenizer.unk_token_id not in anchor and ids[: len(anchor)] == anchor:
            ids = ids[len(anchor) :]
        else:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if self.append_eos else ids

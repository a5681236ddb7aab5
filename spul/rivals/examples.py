"""In-context unlearning: forget rows with another label and retain rows with their own in front of every request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import check_rows
from ..data.encoder import RowEncoder
from ..data.rows import completion_text
from ..gates.gate import request_texts
from ..records.digests import digest
from .chat import ChatForm, starts_with
from .rewriting import Edit, RewritingRival

# The encoder of examples shortens nothing.
NO_LIMIT = 1 << 30
# Ends an example of plain text.
SEPARATOR = "\n"
# Rows with more different completions than this are no classes, which labels could be flipped among.
MOST_LABELS = 32


class InContextUnlearning(RewritingRival):
    """Examples in front of every request: forget rows with a flipped label, then retain rows with their own (ICUL).

    ```text
    x_f1 flipped(y_f1) \\n ... x_fK flipped(y_fK) \\n   x_r1 y_r1 \\n ... x_rL y_rL \\n   request
    ```

    `x y` is a row's prompt and completion as the collator encodes them, without a beginning-of-sequence token of its
    own; conversations stand as turns before the request's first user message, without the newline. A flipped label is
    the other one of two, one of the others at random of more. The method was defined for classification, for one
    request to forget at a time, whose own row is in the context. Where the forget set has more than `num_forget` rows,
    the context of a request holds the forget rows most like it (cosine of TF-IDF of words, a choice of ours, since all
    rows of a large set have no room), so that a trained row that is asked about again is itself the first. Retain rows
    are drawn once, by `seed`, for all requests; the authors draw new ones for each.

    Args:
        model: a causal LM of transformers, without an adapter.
        tokenizer: its tokenizer.
        forget: training rows with `prompt` and `completion`. Never pass test rows.
        retain: training rows that keep their label.
        num_forget: K, the forget rows in a context, at most all; 1 as published.
        num_retain: L, the retain rows behind them. The authors' contexts have 2, 4 or 6 examples, one of them flipped:
            1, 3 or 5 retain rows.
        seed: of the draw of retain rows, and of the flipped label among more than one.

    Raises:
        TypeError: if `model`, `forget` or `retain` is of another type.
        ValueError: if `num_forget` is below 1, there are not so many rows, or their completions are not 2 to 32
            different labels.

    Source: Pawelczyk, Neel and Lakkaraju, *In-Context Unlearning*, https://arxiv.org/abs/2310.07579; numbers and
    template as in its program, https://github.com/MartinPawel/In-Context-Unlearning (`eval.py`, style `vary`)
    """

    kind = "in-context unlearning"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        forget: Dataset,
        retain: Dataset,
        num_forget: int = 1,
        num_retain: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer)
        check_rows(forget)
        check_rows(retain)
        if not 1 <= num_forget <= len(forget) or not 0 <= num_retain <= len(retain):
            raise ValueError(
                f"num_forget={num_forget} of {len(forget)} forget rows and num_retain={num_retain} of {len(retain)} "
                "retain rows; expected 1 or more, and 0 or more, and no more than there are rows."
            )
        own = [[completion_text(text) for text in rows["completion"][:]] for rows in (forget, retain)]
        labels = sorted({*own[0], *own[1]})
        if not 2 <= len(labels) <= MOST_LABELS:
            raise ValueError(
                f"the rows have {len(labels)} different completions; expected 2 to {MOST_LABELS} labels, of which one "
                "is flipped to another. In-context unlearning is not defined for free-form answers."
            )
        self.forget, self.retain = forget, retain
        self.num_forget, self.num_retain, self.seed = num_forget, num_retain, seed
        self._chat = ChatForm.of(tokenizer)
        self._of_turns = not isinstance(forget[0]["prompt"], str)
        draws, encoder = random.Random(seed), RowEncoder(tokenizer, NO_LIMIT)
        flipped = [draws.choice([label for label in labels if label != text]) for text in own[0]]
        self._forget = [self._example(encoder, row, text) for row, text in zip(forget, flipped, strict=True)]
        picked = draws.sample(range(len(retain)), num_retain)
        self._retain = [self._example(encoder, retain[i], None) for i in picked]
        self._nearest: Callable[[str], Sequence[int]] | None = None
        if num_forget < len(forget):
            # The prompts as the model reads them, as the requests are.
            prompts = [encoder.encode(row).prompt_ids for row in forget]
            self._nearest = _nearest(request_texts(tokenizer, prompts), num_forget)

    def _example(self, encoder: RowEncoder, row: dict[str, Any], label: str | None) -> list[int]:
        """Token ids of a row with a label, its own for None, up to where the next text begins."""
        encoded = encoder.encode(row, label)
        prompt = encoded.prompt_ids
        if isinstance(row["prompt"], str):
            start = int(prompt[0] == self.tokenizer.bos_token_id)
            gap = self.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
            return [*prompt[start:], *encoded.completion_ids, *gap]
        if not starts_with(prompt, self._chat.before_user):
            raise ValueError(
                f"a row is a conversation that does not begin with a user message: {row['prompt']!r:.200}."
            )
        body = prompt[len(self._chat.before_user) :]
        return [*body, *encoded.without_ending().completion_ids, *self._chat.answer_to_user]

    def edit(self, request: list[int]) -> Edit:
        """The examples in front of a request."""
        near: Sequence[int] = range(len(self._forget))
        if self._nearest is not None:
            near = self._nearest(request_texts(self.tokenizer, [request])[0])
        examples = [*(self._forget[i] for i in near), *self._retain]
        context = [token for example in examples for token in example]
        at = int(request[:1] == [self.tokenizer.bos_token_id])
        if not self._of_turns:
            return Edit(at, 0, context)
        if (start := self._chat.user_start(request)) is not None:
            return Edit(start, 0, context)
        before = list(self._chat.before_user)  # plain text is the user message after them
        return Edit(at, 0, [*(before[1:] if before[:1] == request[:at] else before), *context])

    def most_added(self) -> int:
        """Tokens of the longest context."""
        longest = sorted(map(len, self._forget), reverse=True)[: self.num_forget]
        around = len(self._chat.before_user) if self._of_turns else 0
        return around + sum(longest) + sum(map(len, self._retain))

    def settings(self) -> dict[str, Any]:
        """Numbers of examples, and a digest of all."""
        found = {"num_forget": self.num_forget, "num_retain": self.num_retain}
        return {**found, "examples": digest([self._forget, self._retain])}

    def on(self, base: PreTrainedModel) -> InContextUnlearning:
        """The same examples in front of another base."""
        rows = (self.forget, self.retain)
        return InContextUnlearning(base, self.tokenizer, *rows, self.num_forget, self.num_retain, self.seed)


def _nearest(texts: Sequence[str], num: int) -> Callable[[str], Sequence[int]]:
    """A function from a text to the indices of the `num` texts most like it, nearest first; equal ones in order."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    vectors = vectorizer.fit_transform(texts)

    def nearest(text: str) -> list[int]:
        likeness = np.asarray((vectors @ vectorizer.transform([text]).T).todense()).ravel()
        return np.argsort(-likeness, kind="stable")[:num].tolist()

    return nearest

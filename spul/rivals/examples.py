"""In-context unlearning: forget rows with another label and retain rows with their own in front of every request."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import check_rows
from ..data.encoder import NO_LIMIT, RowEncoder
from ..data.row_checks import check_texts
from ..data.rows import completion_text, read_rows, rows_at
from ..gates.gate import request_texts
from ..records.digests import digest
from ..records.fields import Checks, is_count
from .chat import ChatForms, starts_with
from .rewriting import Edit, RewritingRival
from .rival import Rival

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
    own; conversations stand as turns before the request's first user message, without the newline. Token ids are put
    together: where a role header ends in a space, as in "USER: ", a message's first token has it, also where a system
    message stands between the two. A flipped label is the other one of two, one of the others at random of more. The
    method was defined for classification, for one request to forget at a time, whose own row is in the context. Where
    the forget set has more than `num_forget` rows, the context of a request holds the forget rows most like it (cosine
    of TF-IDF of words, a choice of ours, since all rows of a large set have no room), so that a trained row that is
    asked about again is itself the first. Retain rows are drawn once, by `seed`, for all requests; the authors draw
    new ones for each.

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
    in_words = "the examples in context"
    fields_saved: ClassVar[Checks] = {
        "num_forget": (lambda value: is_count(value, 1), "a whole number of 1 or more"),
        "forget": (lambda value: value != [] and _are_examples(value), "rows of prompt and completion, one or more"),
        "retain": (lambda value: _are_examples(value), "rows of prompt and completion"),
    }

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
        draws = random.Random(seed)
        flipped = [draws.choice([label for label in labels if label != text]) for text in own[0]]
        picked = draws.sample(range(len(retain)), num_retain)
        self._take(
            [_example(row, label) for row, label in zip(read_rows(forget), flipped, strict=True)],
            [_example(row) for row in rows_at(retain, picked)],
            num_forget,
        )

    def _take(self, forget: list[dict[str, Any]], retain: list[dict[str, Any]], num_forget: int) -> None:
        """The rows that stand in contexts, with the labels that they have there."""
        self.forget_examples, self.retain_examples, self.num_forget = forget, retain, num_forget
        self._forms = ChatForms(self.tokenizer)
        self._of_turns = not isinstance(forget[0]["prompt"], str)
        encoder = RowEncoder(self.tokenizer, NO_LIMIT)
        self._forget, self._retain = ([self._ids(encoder, row) for row in rows] for rows in (forget, retain))
        self._nearest: Callable[[str], Sequence[int]] | None = None
        if num_forget < len(forget):
            # The prompts as the model reads them, as the requests are.
            prompts = [encoder.encode(row).prompt_ids for row in forget]
            self._nearest = _nearest(request_texts(self.tokenizer, prompts), num_forget)

    def _ids(self, encoder: RowEncoder, row: dict[str, Any]) -> list[int]:
        """Token ids of a row, up to where the next text begins."""
        encoded = encoder.encode(row)
        prompt = encoded.prompt_ids
        if isinstance(row["prompt"], str):
            start = int(prompt[0] == self.tokenizer.bos_token_id)
            gap = self.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
            return [*prompt[start:], *encoded.completion_ids, *gap]
        chat = self._forms.known[0]
        start = len(chat.before_user)
        if not starts_with(prompt, chat.before_user) or chat.user_start(prompt) != start:
            raise ValueError(
                f"a row is a conversation that does not begin with a user message: {row['prompt']!r:.200}. In-context "
                "examples are turns of their own; give rows without a system message."
            )
        return [*prompt[start:], *encoded.without_ending().completion_ids, *chat.answer_to_user]

    def on(self, base: PreTrainedModel) -> InContextUnlearning:
        """The same examples in front of another base; conversations of days that are over stay known."""
        found: InContextUnlearning = super().on(base)
        found._forms = self._forms
        return found

    def edit(self, request: list[int]) -> Edit:
        """The examples in front of a request.

        Raises:
            ValueError: if examples are turns, and the request a conversation that does not begin as those of the chat
                template do.
        """
        near: Sequence[int] = range(len(self._forget))
        if self._nearest is not None:
            near = self._nearest(request_texts(self.tokenizer, [request])[0])
        examples = [*(self._forget[i] for i in near), *self._retain]
        context = [token for example in examples for token in example]
        at = int(request[:1] == [self.tokenizer.bos_token_id])
        if not self._of_turns:
            return Edit(at, 0, context)
        start = self._forms.find(request, lambda form: form.user_start(request))
        own = request[at if start is None else start :][:1]
        if not self._begins_with_space(own):  # that of the header in front of it now
            context += self._forms.known[-1].space
        if start is not None:
            return Edit(start, 0, context)
        before = list(self._forms.known[-1].before_user)  # plain text is the user message after them
        return Edit(at, 0, [*(before[1:] if before[:1] == request[:at] else before), *context])

    def _begins_with_space(self, ids: list[int]) -> bool:
        return any(str(token).startswith(("▁", "Ġ", " ")) for token in self.tokenizer.convert_ids_to_tokens(ids))

    def most_added(self) -> int:
        """Tokens of the longest context."""
        longest = sorted(map(len, self._forget), reverse=True)[: self.num_forget]
        form = self._forms.known[-1]
        around = len(form.before_user) + len(form.space) if self._of_turns else 0
        return around + sum(longest) + sum(map(len, self._retain))

    def settings(self) -> dict[str, Any]:
        """Numbers of examples, and a digest of all."""
        found = {"num_forget": self.num_forget, "num_retain": len(self.retain_examples)}
        return {**found, "examples": digest([self._forget, self._retain])}

    def saved_fields(self) -> dict[str, Any]:
        """The rows that stand in contexts, with the labels that they have there; no other rows."""
        rows = {"forget": self.forget_examples, "retain": self.retain_examples}
        return {"num_forget": self.num_forget, **rows}

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> InContextUnlearning:
        """The examples of saved fields."""
        forget, num_forget = fields["forget"], fields["num_forget"]
        if num_forget > len(forget):
            raise ValueError(
                f"num_forget={num_forget} of {len(forget)} saved forget rows; expected no more. Save again."
            )
        found = cls.__new__(cls)  # without the draws of __init__, of which these are the result
        Rival.__init__(found, model, tokenizer)
        found._take(forget, fields["retain"], num_forget)
        return found


def _example(row: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """Prompt and completion of a row, with another label if one is given."""
    completion = row["completion"]
    if label is not None:
        is_text = isinstance(completion, str)
        completion = label if is_text else [{"role": completion[-1]["role"], "content": label.strip()}]
    return {"prompt": row["prompt"], "completion": completion}


def _are_examples(value: Any) -> bool:
    """Whether a value is a list of rows as `_example` gives them."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return False
    try:
        for row in value:
            check_texts(row)
    except ValueError:
        return False
    return True


def _nearest(texts: Sequence[str], num: int) -> Callable[[str], Sequence[int]]:
    """A function from a text to the indices of the `num` texts most like it, nearest first; equal ones in order."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    if not any(re.search(r"\w", text) for text in texts):  # of which it makes no vocabulary
        return lambda text: range(num)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    vectors = vectorizer.fit_transform(texts)

    def nearest(text: str) -> list[int]:
        likeness = np.asarray((vectors @ vectorizer.transform([text]).T).todense()).ravel()
        return np.argsort(-likeness, kind="stable")[:num].tolist()

    return nearest

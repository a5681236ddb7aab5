"""Pads of left-padded rows, kept from processors of `generate`: each reads of a row what it reads of it alone."""

from __future__ import annotations

from typing import Any, cast

from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
)

from .arguments import changed_settings


def filled_pads(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Rows (B, n) whose pads are their own first tokens, so that a repetition penalty that counts pads adds none."""
    is_own = attention_mask.ne(0)
    return input_ids.where(is_own, input_ids.gather(1, is_own.long().argmax(dim=1, keepdim=True)))


def with_own_tokens(
    kwargs: dict[str, Any],
    size: int | None,
    encoder_size: int | None,
    encoder_penalty: float | None,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> dict[str, Any]:
    """Arguments of `generate` under which n-grams, and tokens of requests, are sought in the rows' own tokens.

    Args:
        kwargs: the arguments; a processor of the caller's own of one of these kinds stays the only one of its kind.
        size: `no_repeat_ngram_size`, of the arguments or of a config.
        encoder_size: `encoder_no_repeat_ngram_size`, of n-grams of the requests.
        encoder_penalty: `encoder_repetition_penalty`, of tokens that are not of the requests. transformers drops it
            where the requests are embeddings, and penalizes some beams alone.
        input_ids: the rows, left-padded, (B, n).
        attention_mask: (B, n).
    """
    given = kwargs.get("logits_processor") or []
    kinds = {type(one) for one in given}
    size = 0 if NoRepeatNGramLogitsProcessor in kinds else size
    encoder_size = 0 if EncoderNoRepeatNGramLogitsProcessor in kinds else encoder_size
    if encoder_penalty not in (None, 1.0) and EncoderRepetitionPenaltyLogitsProcessor not in kinds:
        given = [RequestPenalty(encoder_penalty, filled_pads(input_ids, attention_mask)), *given]
        kwargs = changed_settings(kwargs, encoder_repetition_penalty=1.0)
        kwargs = {**kwargs, "logits_processor": LogitsProcessorList(given)}
    if not (encoder_size or (size and not bool(attention_mask.all()))):
        return kwargs
    own = OwnNGrams(size or 0, encoder_size or 0, input_ids, attention_mask)
    kwargs = changed_settings(kwargs, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0)
    return {**kwargs, "logits_processor": LogitsProcessorList([own, *given])}


class OwnNGrams(LogitsProcessor):
    """A logits processor that forbids n-grams to repeat within the own tokens of each row.

    Args:
        size: length of n-grams that no row repeats; 0 for any.
        encoder_size: length of those that no answer takes from its request; 0 for any.
        input_ids: the requests, left-padded, (B, n).
        attention_mask: (B, n).
    """

    def __init__(self, size: int, encoder_size: int, input_ids: Tensor, attention_mask: Tensor) -> None:
        pads: list[int] = attention_mask.eq(0).sum(dim=1).tolist()
        self.num_rows = len(pads)
        self._groups: list[tuple[int, list[int], LogitsProcessorList]] = []
        for num in sorted(set(pads)):
            rows = [row for row, pad in enumerate(pads) if pad == num]
            processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(size)] if size else [])
            if encoder_size:
                own = cast(LongTensor, input_ids[rows, num:])
                processors.append(EncoderNoRepeatNGramLogitsProcessor(encoder_size, own))
            self._groups.append((num, rows, processors))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B * times, V) of rows that follow each other as beams or samples of a request, -inf where forbidden.

        A token that is forced, which has the only score, stays, as where transformers forces it last.
        """
        times, found = len(input_ids) // self.num_rows, scores.clone()
        for num, own, processors in self._groups:
            rows = [row * times + k for row in own for k in range(times)]
            seen, before = cast(LongTensor, input_ids[rows, num:]), cast(FloatTensor, scores[rows])
            found[rows] = processors(seen, before)
        return scores.where(found.isneginf().all(dim=1, keepdim=True), found)


class RequestPenalty(LogitsProcessor):
    """A logits processor that favors, above a penalty of 1, the tokens of each row's request, in all of its beams.

    Args:
        penalty: `encoder_repetition_penalty`.
        input_ids: the requests, their pads filled, (B, n).
    """

    def __init__(self, penalty: float, input_ids: Tensor) -> None:
        self.penalty, self.input_ids = penalty, input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B * times, V) of rows that follow each other as beams or samples of a request."""
        own = self.input_ids.repeat_interleave(len(scores) // len(self.input_ids), dim=0)
        of_rows = EncoderRepetitionPenaltyLogitsProcessor(self.penalty, cast(LongTensor, own))
        return of_rows(cast(LongTensor, input_ids), cast(FloatTensor, scores))

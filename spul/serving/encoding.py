"""Requests to token ids: by the chat template, by the tokenizer, or as they are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ..data.conversations import INSTRUCTING, conversation_prompt_ids, leaves_out, message_start
from ..data.text_encoder import TextEncoder
from ..models.causal_lm import max_positions
from .engine import Job
from .errors import ApiError, too_long
from .requests import ChatRequest, Limits
from .served import ServedPrompts


class RequestEncoder:
    """Makes jobs of requests: the ids that the model reads, which are those that the gates read.

    Args:
        served: the prompts, whose tokenizer and base it is.
        limits: the server's.
    """

    def __init__(self, served: ServedPrompts, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.tokenizer = copy.deepcopy(served.gated.tokenizer)  # fast tokenizers are for one thread at a time
        self._texts = TextEncoder(self.tokenizer)
        self._left_out = [role for role in INSTRUCTING if leaves_out(self.tokenizer, role)]
        base: Any = served.gated.get_base_model()
        self.room = max_positions(base)
        self._stops = _stop_texts(base)
        self._num_rows = min(len(self.tokenizer), base.get_input_embeddings().weight.shape[0])

    def job(self, request: ChatRequest) -> Job:
        """The request as the engines take it.

        Raises:
            ApiError: 400 if it is empty, too long, or cannot be rendered.
        """
        ids, position = self._ids(request)
        if not ids:
            raise ApiError(400, "the request has no tokens.")
        if not all(0 <= one < self._num_rows for one in ids):  # also of a tokenizer with more tokens than the base
            param = "messages" if request.kind == "chat" else "prompt"
            raise ApiError(400, f"the request has a token id outside 0 to {self._num_rows - 1}.", param)
        num, most = len(ids), self.limits.max_prompt_tokens
        if most is not None and num > most:
            raise ApiError(
                400, f"the request has {num} tokens; at most {most} are taken.", code="context_length_exceeded"
            )
        wanted = request.max_tokens
        sampling = dataclasses.replace(request.sampling, stop=(*request.sampling.stop, *self._stops))
        if self.room is None:
            return Job(ids, sampling, wanted or self.limits.max_new_tokens, position)
        room = self.room - self.served.longest  # for every request, whatever the gates will say of it
        max_tokens = wanted or min(self.limits.max_new_tokens, max(room - num, 1))
        if num + max_tokens > room:
            raise too_long(room, num, max_tokens)
        return Job(ids, sampling, max_tokens, position)

    def _ids(self, request: ChatRequest) -> tuple[list[int], int | None]:
        """Token ids, and how many of them stand before a prompt at the message."""
        tokenizer: Any = self.tokenizer
        if request.kind == "chat":
            if not tokenizer.chat_template:
                raise ApiError(400, "the model has no chat template; send a completion.", "messages")
            if left_out := [one["role"] for one in request.content if one["role"] in self._left_out]:
                said = f"the model's chat template leaves out messages of the role {left_out[0]!r}; take another role."
                raise ApiError(400, said, "messages")
            try:
                ids = conversation_prompt_ids(tokenizer, request.content, _computed)
                at = message_start(tokenizer, request.content, _computed) if self.served.stands_inside else None
            except ValueError as error:
                raise ApiError(400, "the model's chat template does not take these messages.", "messages") from error
            return ids, at
        if self.served.stands_inside:
            raise ApiError(400, "a completion does not say where its message begins; send a chat.", "prompt")
        if isinstance(request.content, str):
            return self._texts.whole_ids(request.content, tokenizer(request.content)["input_ids"]), None
        return request.content, None


def _stop_texts(base: Any) -> tuple[str, ...]:
    """The texts at which the base's own settings end every answer."""
    found = base.generation_config.stop_strings or ()
    return tuple(one for one in ([found] if isinstance(found, str) else found) if one)


def _computed(key: Hashable, compute: Callable[[], Sequence[int]]) -> list[int]:
    """For functions that cache: requests seldom come twice."""
    return list(compute())

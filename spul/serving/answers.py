"""Answers: text from tokens as they come, and the bodies of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

# Tokens of the request that are decoded before an answer's first, which may begin with a space only after them.
CONTEXT = 5
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Args:
        text: what comes next.
        num_tokens: tokens of the answer so far.
        finish_reason: `"stop"` or `"length"` in the last part.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None


class AnswerText:
    """The text of tokens as they come, up to a stop text; all that is returned, joined, is the answer.

    Args:
        tokenizer: the model's.
        request: token ids of the request.
        stop: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, request: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self._ids = list(request[-CONTEXT:])
        self._start, self._read, self._held = 0, len(self._ids), ""

    def push(self, token: int) -> str:
        """Text to send after one more token: whole characters that are not the start of a stop text."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._up_to_stop(text)

    def finish(self) -> str:
        """Text that was held back, at the answer's end."""
        text = self._up_to_stop(self._new_text()) + self._held
        self._held = ""
        return text

    def _new_text(self) -> str:
        before, whole = (self._decoded(self._ids[self._start : end]) for end in (self._read, len(self._ids)))
        return whole[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _up_to_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        num = max((_overlap(text, one) for one in self.stop), default=0)
        self._held = text[len(text) - num :]
        return text[: len(text) - num]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the start of a stop text."""
    return next((num for num in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-num:])), 0)


class AnswerParts:
    """The parts of an answer as its tokens come, up to an end token, a stop text or the most tokens.

    Args:
        tokenizer: the model's.
        request: token ids of the request.
        stop: texts before which the answer ends.
        max_tokens: of the answer.
        ends: tokens that end it.
    """

    def __init__(
        self, tokenizer: Any, request: Sequence[int], stop: Sequence[str], max_tokens: int, ends: Collection[int]
    ) -> None:
        self.max_tokens, self.ends, self.num_tokens, self.is_done = max_tokens, ends, 0, False
        self._text = AnswerText(tokenizer, request, stop)

    def push(self, token: int) -> Piece | None:
        """Take one more token; what can be sent by now."""
        self.num_tokens += 1
        text = "" if token in self.ends else self._text.push(token)
        reason = "stop" if token in self.ends or self._text.stopped else None
        if reason is None and self.num_tokens >= self.max_tokens:
            reason = "length"
        return self._piece(text, reason)

    def end(self) -> Piece | None:
        """The last part of an answer that has no more tokens; None if it had ended."""
        return None if self.is_done else self._piece("", "length")

    def _piece(self, text: str, reason: str | None) -> Piece | None:
        if reason is not None:
            self.is_done = True
            text += self._text.finish()
            reason = "stop" if self._text.stopped else reason
        return Piece(text, self.num_tokens, reason) if text or reason else None


class Answer:
    """The bodies of one answer, whole or in chunks.

    Args:
        kind: `"chat"` or `"completion"`.
        model: the model's name.
        num_prompt: tokens of the request, without virtual tokens.
    """

    def __init__(self, kind: str, model: str, num_prompt: int) -> None:
        self.is_chat, self.model, self.num_prompt = kind == "chat", model, num_prompt
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The answer in one body."""
        said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(last)}

    def chunk(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        """A part of the answer; the first names the role."""
        role = {"role": "assistant"} if is_first else {}
        said = {"delta": {**role, "content": piece.text}} if self.is_chat else {"text": piece.text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": piece.finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, last: Piece) -> dict[str, Any]:
        """The numbers of tokens, which end a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(last)}

    def _head(self, chat_object: str) -> dict[str, Any]:
        kind = chat_object if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, last: Piece) -> dict[str, int]:
        total = self.num_prompt + last.num_tokens
        return {"prompt_tokens": self.num_prompt, "completion_tokens": last.num_tokens, "total_tokens": total}

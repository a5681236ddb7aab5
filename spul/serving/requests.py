"""Requests of OpenAI's API: read and checked; what is not supported is refused, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..records.fields import RepeatedKeyError, is_count, is_finite_number, unique_keys
from .errors import ApiError, other_model

MOST_STOPS, LONGEST_STOP = 4, 200  # four, as in OpenAI's API; characters
LARGEST = 2**31 - 1  # of a limit: more seconds than an event loop can wait are as wrong as infinitely many
# A completion without max_tokens has 16, as in OpenAI's API; a chat answer as many as the server allows.
DEFAULT_COMPLETION_TOKENS = 16

_COMMON = ("model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options", "user")
_FIELDS = {"chat": (*_COMMON, "messages", "max_completion_tokens"), "completion": (*_COMMON, "prompt")}
# Fields that are not supported, with the values by which a client asks for nothing; null is one for each.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
}
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_body_bytes: bytes of a request.
        max_prompt_tokens: tokens of a request, without virtual tokens; None for what the model has positions for.
        max_new_tokens: tokens of an answer.
        max_batch: requests that are answered together.
        max_waiting: requests that wait; further ones get 429.
        timeout: seconds from a request to its answer's last token.
        gather_seconds: how long the first request of a batch waits for others.

    Raises:
        ValueError: if one is not above 0, or above 2,147,483,647.
    """

    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 512
    max_batch: int = 16
    max_waiting: int = 128
    timeout: float = 120.0
    gather_seconds: float = 0.005

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value <= LARGEST:
                raise ValueError(f"{name}={value!r}; expected a number above 0, at most {LARGEST:,}.")


def check_header_text(text: str, what: str, least: int = 1) -> None:
    """Raise unless a text, such as a key, can stand in an HTTP header as it is.

    Args:
        text: the text; it is not in the message.
        what: its name, for the message.
        least: how many characters it must have.

    Raises:
        ValueError: if it is too short, or has other characters than those of ASCII that are seen.
    """
    if len(text) < least:
        raise ValueError(f"{what} has {len(text)} characters; take {least} or more.")
    if not all("!" <= one <= "~" for one in text):
        raise ValueError(f"{what} has white space in it, or a character outside ASCII; take letters and digits.")


@dataclass(frozen=True)
class Sampling:
    """Choice of an answer's tokens.

    Args:
        temperature: 0 for the most probable token.
        top_p: share of the probability that is sampled from.
        seed: the same answer for the same request; None for another one each time.
        stop: texts before which the answer ends.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A request to be answered.

    Args:
        kind: `"chat"` or `"completion"`.
        content: messages with a role and a text, or parts of text, each; or a text; or token ids.
        sampling: how tokens are chosen.
        max_tokens: of the answer; None for as many as the server allows.
        stream: whether the answer is sent as it comes.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    kind: str
    content: Any
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False


def read_body(kind: str, body: bytes, model: str, limits: Limits) -> ChatRequest:
    """The request in a body.

    Args:
        kind: `"chat"` or `"completion"`.
        body: JSON.
        model: the name of the model that is served.
        limits: the server's.

    Raises:
        ApiError: 400 for what is malformed or not supported, 404 for another model.
    """
    data = read_json(body)
    for name, value in data.items():
        if name in _FIELDS[kind] or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"the field {name!r} is not supported; leave it out.", name, "unsupported_parameter")
        if not any(type(value) is type(one) and value == one for one in _numbers_too(_NEUTRAL[name])):
            raise ApiError(400, f"this value of {name} is not supported; leave it out.", name, "unsupported_parameter")
    if not isinstance(data.get("model"), str):
        raise ApiError(400, f"model is missing; expected {model!r}.", "model")
    if data["model"] != model:
        raise other_model(model)
    content = _messages(data.get("messages")) if kind == "chat" else _prompt(data.get("prompt"))
    stream = _flag(data, "stream")
    options = {} if data.get("stream_options") is None else data["stream_options"]
    if not isinstance(options, dict) or set(options) - {"include_usage"} or (options and not stream):
        raise ApiError(400, 'stream_options goes with stream and has "include_usage" alone.', "stream_options")
    return ChatRequest(
        kind, content, _sampling(data), _max_tokens(kind, data, limits), stream, _flag(options, "include_usage")
    )


def read_json(body: bytes) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        ApiError: 400 if it is none, or an object in it has a key twice.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant, object_pairs_hook=unique_keys)
        json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair is no character, and nothing takes it
    except RepeatedKeyError as error:
        raise ApiError(400, f"{error}.") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is no valid JSON (UTF-8).") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body is no JSON object.")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON.")


def _numbers_too(values: Sequence[Any]) -> list[Any]:
    """The values, whole numbers also as floats."""
    return [*values, *(float(one) for one in values if type(one) is int)]


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} is no boolean.", name)
    return bool(value)


def _number(data: Mapping[str, Any], name: str, high: float) -> float:
    """A number from 0; 1 where none is given."""
    value = data.get(name)
    if value is None:
        return 1.0
    if not is_finite_number(value) or not 0 <= value <= high:
        raise ApiError(400, f"{name} is no number from 0 to {high:g}.", name)
    return float(value)


def _sampling(data: Mapping[str, Any]) -> Sampling:
    seed = data.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise ApiError(400, "seed is no integer of 64 bits.", "seed")
    top_p = _number(data, "top_p", 1.0)
    if not top_p:
        raise ApiError(400, "top_p is 0; expected a number above 0, at most 1.", "top_p")
    stop = data.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    is_stops = isinstance(stop, list) and len(stop) <= MOST_STOPS
    if not is_stops or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stop):
        raise ApiError(400, f"stop is no text, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters.", "stop")
    return Sampling(_number(data, "temperature", 2.0), top_p, seed, tuple(stop))


def _max_tokens(kind: str, data: Mapping[str, Any], limits: Limits) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if data.get(name) is not None]
    if not names:
        return None if kind == "chat" else min(DEFAULT_COMPLETION_TOKENS, limits.max_new_tokens)
    if len(names) > 1 and data[names[0]] != data[names[1]]:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", names[0])
    value = data[names[-1]]
    if not is_count(value, 1) or value > limits.max_new_tokens:
        raise ApiError(400, f"{names[-1]} is no integer from 1 to {limits.max_new_tokens}.", names[-1])
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages is no list of messages.", "messages")
    return [_message(one, f"messages[{i}]") for i, one in enumerate(value)]


def _message(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise ApiError(400, f"{param} is no message with a role of {', '.join(_ROLES)}.", param)
    if unknown := [name for name, one in value.items() if name not in ("role", "content") and one not in (None, [])]:
        raise ApiError(400, f"{param} has the field {unknown[0]!r}, which is not supported.", param)
    return {"role": value["role"], "content": _content(value.get("content"), param)}


def _content(value: Any, param: str) -> str | list[dict[str, str]]:
    """A message's text or its parts, which the chat template joins as in training."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"{param} has no content; expected a text, or parts of text.", param)
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise ApiError(400, f"{param} has a part that is no text; others are not supported.", param)
        _text(part["text"], param)
    return value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{param} is no text.", param)
    return value


def _prompt(value: Any) -> str | list[int]:
    """A text, or token ids; one alone within a list is taken as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return _text(value, "prompt")
    is_ids = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if not is_ids or not value:
        raise ApiError(400, "prompt is no text and no list of token ids; several in one request are not supported.",
                       "prompt")  # fmt: skip
    return value

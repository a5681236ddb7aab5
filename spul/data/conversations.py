"""Conversations by a tokenizer's chat template: token ids of prompt and answer, and where the last message begins."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, UndefinedError

from .encoded import token_at
from .rows import completion_text, shortened

# An answer that no template changes, to see what a chat template puts after an answer.
MARK = "answer"
# Messages that differ from their first character on, to see where a chat template puts a message, and whether it does.
MARKS = ("a", "z")
INSTRUCTING = ("system", "developer")  # roles of which a chat template may know one alone

Cached = Callable[[Hashable, Callable[[], Sequence[int]]], list[int]]
"""Numbers by key, computed by a function unless they are cached."""


def conversation_ids(
    tokenizer: Any, prompt: list, completion: list, text: str | None, cached: Cached
) -> tuple[list[int], list[int], int]:
    """Token ids of prompt and completion of a conversation by the chat template, cached by their content.

    Args:
        tokenizer: has the chat template.
        prompt: messages.
        completion: messages; the last is the answer.
        text: replaces the answer's content; None leaves it.
        cached: keeps what was computed.

    Returns:
        The ids of the prompt, those of the completion, and how many of the latter's last are the template's end of
        turn.

    Raises:
        ValueError: if the template cannot render the messages, or renders the prompt differently before a completion.
    """
    if text is not None:
        completion = [{"role": completion[-1]["role"], "content": text.strip()}]
    template = str(tokenizer.chat_template)

    def completion_ids() -> list[int]:
        both = _rendered(tokenizer, [*prompt, *completion], False)
        if both[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the chat template renders the prompt differently, token by token, when the completion follows, so it "
                f"cannot be separated: {prompt!r}. Use a template whose generation prompt is the start of an answer, "
                "and ends in a special token or a line break, not in a space, which merges with the answer."
            )
        ids = both[len(prompt_ids) :]
        after = cached((template, completion[-1]["role"]), after_mark)
        if not after or ids[-len(after) :] != after:
            after = _after(tokenizer, ids, completion_text(completion).strip())
        num_ending = _end_of_turn(tokenizer, after)
        return [num_ending, *ids[: len(ids) - len(after) + num_ending]]

    def after_mark() -> list[int]:
        message = {"role": completion[-1]["role"], "content": MARK}
        return _after(tokenizer, _rendered(tokenizer, [*prompt, message], False)[len(prompt_ids) :], MARK)

    prompt_ids = conversation_prompt_ids(tokenizer, prompt, cached)
    num_ending, *ids = cached((*_key(tokenizer, prompt), repr(completion)), completion_ids)
    return prompt_ids, ids, num_ending


def conversation_prompt_ids(tokenizer: Any, prompt: list, cached: Cached) -> list[int]:
    """Token ids of a conversation up to the answer; as `conversation_ids`."""
    return cached(_key(tokenizer, prompt), lambda: _rendered(tokenizer, prompt, True))


def message_start(tokenizer: Any, prompt: list, cached: Cached) -> int:
    """Number of tokens before the content of a conversation's last user message, after its role header.

    Args:
        tokenizer: a fast one, with a chat template.
        prompt: messages.
        cached: keeps what was computed.

    Raises:
        ValueError: if there is no user message, the tokenizer is slow, or the template does not show where the
            message stands.
    """

    def start() -> list[int]:
        last = last_user_message(prompt)
        if last is None or not tokenizer.is_fast:
            found = "there is none" if last is None else f"{type(tokenizer).__name__} is not a fast tokenizer"
            raise ValueError(
                f'prompt_position="message" puts the soft prompt before the last message of the role "user", and '
                f"{found}: {shortened(repr(prompt))}. Expected one, and a tokenizer that knows its tokens' characters."
            )
        marked = [[*prompt[:last], with_content(prompt[last], mark), *prompt[last + 1 :]] for mark in MARKS]
        whole, *others = (_rendered(tokenizer, one, True, tokenize=False) for one in (prompt, *marked))
        columns = enumerate(zip(whole, *others, strict=False))
        character = next((i for i, characters in columns if len(set(characters)) > 1), len(whole))
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        shows = all(other.startswith(mark, character) for other, mark in zip(others, MARKS, strict=True))
        if not shows or list(encoded["input_ids"]) != conversation_prompt_ids(tokenizer, prompt, cached):
            raise ValueError(
                "the chat template does not show where the last user message stands, before which the soft prompt is "
                f"to stand: {shortened(whole)!r}. Use a template that renders messages word for word, or "
                'prompt_position="start".'
            )
        return [token_at(encoded["offset_mapping"], character)]

    return cached((*_key(tokenizer, prompt), MARKS), start)[0]


def leaves_out(tokenizer: Any, role: str) -> bool:
    """Whether a chat template drops a message of a role in front of the user's in silence; not where it raises.

    Args:
        tokenizer: has the chat template.
        role: the role.
    """

    def message(role: str, text: str) -> dict[str, Any]:  # in parts, of which `_rendered` makes a text where needed
        return {"role": role, "content": [{"type": "text", "text": text}]}

    asked = message("user", MARK)
    try:
        first, other = (_rendered(tokenizer, [message(role, mark), asked], True, tokenize=False) for mark in MARKS)
    except ValueError:
        return False
    return bool(first == other)


def check_instructions(tokenizer: Any, prompt: list, cached: Cached) -> None:
    """Raise if a chat template drops the system or developer message of a conversation in silence.

    Args:
        tokenizer: has the chat template.
        prompt: messages.
        cached: keeps what was found of the template.

    Raises:
        ValueError: if it does.
    """
    if not (roles := {one["role"] for one in prompt}.intersection(INSTRUCTING)):
        return
    key = (str(tokenizer.chat_template), INSTRUCTING)
    left_out = cached(key, lambda: [leaves_out(tokenizer, role) for role in INSTRUCTING])
    for role, is_left_out in zip(INSTRUCTING, left_out, strict=True):
        if is_left_out and role in roles:
            raise ValueError(
                f"the chat template leaves out messages of the role {role!r}, and a row has one: "
                f"{shortened(repr(prompt))}. Move its text to a role that the tokenizer's chat_template renders, or "
                "into the first user message."
            )


def last_user_message(prompt: Sequence[Mapping[str, Any]]) -> int | None:
    """Which message of a conversation is the last of the role `user`; None without one."""
    return max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)


def content_of(message: Mapping[str, Any]) -> str | None:
    """The text of a message, that of several parts joined as chat templates render it; None without one."""
    content = message.get("content")
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [part["text"] for part in content if _is_text(part)]
    return "".join(texts) if texts else None


def texts_of(value: Any) -> list[str]:
    """The texts of a prompt: itself, or those of a conversation's messages, every part of them."""
    if not isinstance(value, list):
        return [str(value)]
    contents = [message.get("content") for message in value if isinstance(message, Mapping)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def with_content(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A message with another text: among parts, in place of the first with a text and of all further ones."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": text}
    first = next((i for i, part in enumerate(content) if _is_text(part)), len(content))
    own = content[first] if first < len(content) else {"type": "text"}
    behind = [part for part in content[first:] if not _is_text(part)]
    return {**message, "content": [*content[:first], {**own, "text": text}, *behind]}


def with_whole_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose parts are one text, if all of them are texts; else as it is."""
    content = message.get("content")
    if not isinstance(content, list) or not all(map(_is_text, content)):
        return message
    return {**message, "content": content_of(message) or ""}


def comparable(texts: Any) -> str | tuple[str, ...]:
    """A prompt or a completion in a form in which equal ones are equal: a text itself, messages as a tuple of texts.

    The order of fields, empty ones that a column adds, and texts as parts or whole make no difference.
    """
    if isinstance(texts, str):
        return texts
    messages = texts if isinstance(texts, list) else [texts]
    whole = (with_whole_text(one) if isinstance(one, Mapping) else one for one in messages)
    return tuple(json.dumps(_without_none(one), sort_keys=True, default=str) for one in whole)


def _is_text(part: Any) -> bool:
    """Whether a part of a message has a text; in a column of them, others have None."""
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _key(tokenizer: Any, prompt: list) -> tuple[str, bytes]:
    return str(tokenizer.chat_template), hashlib.sha256(repr(prompt).encode()).digest()


def _rendered(tokenizer: Any, messages: list, add_generation_prompt: bool, tokenize: bool = True) -> Any:
    """Messages by the chat template: token ids, or text.

    A template that takes contents as texts gets the text of parts, of which it would render Python's notation.
    """

    def rendered(some: list, tokenize: bool) -> Any:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tokenize": tokenize}
        return tokenizer.apply_chat_template(some, **options, return_dict=False)

    def takes_texts(some: list) -> bool:
        in_parts = [str(message["content"]) for message in some if isinstance(message["content"], list)]
        try:
            return any(map(str(rendered(some, False)).__contains__, in_parts))
        except (TypeError, UndefinedError):  # most join contents by "+", or ask them for `startswith`
            return True

    try:
        # Fields that only their column has are none to a template, which may ask whether there is a field.
        plain: list[Mapping[str, Any]] = [{"content": "", **_without_none(message)} for message in messages]
        if any(isinstance(message["content"], list) for message in plain) and takes_texts(plain):
            plain = list(map(with_whole_text, plain))
            if any(isinstance(message["content"], list) for message in plain):
                raise ValueError("it takes contents as texts, and a message has parts other than texts")
        found = rendered(plain, tokenize)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"the tokenizer has no chat template, and a row is a conversation, {shortened(repr(messages))}. Take "
                "the tokenizer of a chat model, set its chat_template, or pass prompts and completions as texts."
            ) from error
        raise ValueError(
            f"the chat template cannot render the messages of a row, {shortened(repr(messages))}: "
            f"{str(error).rstrip('.')}. Expected roles and fields that the tokenizer's chat_template knows."
        ) from error
    return list(found) if tokenize else found


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return list(map(_without_none, value)) if isinstance(value, list) else value


def _after(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """The token ids after a text; none if the text is not among them."""

    def holds_text(num: int) -> bool:
        return text in tokenizer.decode(ids[:num], clean_up_tokenization_spaces=False)

    num = bisect.bisect_left(range(len(ids) + 1), True, key=holds_text)
    return ids[num:]


def _end_of_turn(tokenizer: Any, after: Sequence[int]) -> int:
    """Number of token ids after an answer that end its turn: up to the first special token, or all but spaces."""
    special = tokenizer.added_tokens_decoder
    for num, token in enumerate(after, start=1):
        if token in special:
            return num
    texts = [str(tokenizer.decode([token])) for token in after]
    return max((num for num, text in enumerate(texts, start=1) if text.strip()), default=0)

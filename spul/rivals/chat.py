"""A chat template's parts: where a system message's text begins, what stands around a user's text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Texts that stand for messages while the template is read. No template changes them.
USER, SYSTEM, ANSWER, NEXT = "spul-user-text", "spul-system-text", "spul-answer-text", "spul-next-text"

T = TypeVar("T")


@dataclass(frozen=True)
class ChatForm:
    """Token ids around messages, as they are in whole conversations. Without a chat template all are empty.

    A space at a role header's end is the message's, as that of "USER: ": most tokenizers make one token of it and the
    first word.

    Attributes:
        before_user: from the start to a first user message's text, where no system message is given.
        before_system: from the start to a system message's text; empty if the template takes none.
        system_to_user: between a system message's text and that of the user message after it, without line breaks
            right behind the former, which may be one token with its end.
        after_user: from the end of a last user message's text to where an answer begins, likewise.
        answer_to_user: between an answer's text and that of the user message after it.
        space: the one at the end of a user message's header; empty if there is none.
    """

    before_user: tuple[int, ...] = ()
    before_system: tuple[int, ...] = ()
    system_to_user: tuple[int, ...] = ()
    after_user: tuple[int, ...] = ()
    answer_to_user: tuple[int, ...] = ()
    space: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatForm:
        """The parts of a tokenizer's chat template."""
        if tokenizer.chat_template is None:
            return cls()

        def between(text: str, start: int, end: int) -> tuple[int, ...]:
            # Both from the text's start: in the middle many tokenizers would put a space in front.
            return _ids(tokenizer, text[:end].rstrip(" "))[len(_ids(tokenizer, text[:start])) :]

        def behind(text: str, mark: str) -> int:
            end = text.index(mark) + len(mark)
            return end + len(text[end:]) - len(text[end:].lstrip("\n"))

        asked = _rendered(tokenizer, ("user", USER))
        if USER not in asked:
            raise ValueError(
                "the tokenizer's chat_template does not render a user message; remove it for requests of plain text."
            )
        found: dict[str, tuple[int, ...]] = {"before_user": between(asked, 0, asked.index(USER))}
        told = _rendered(tokenizer, ("system", SYSTEM), ("user", USER))
        if USER in told.partition(SYSTEM)[2]:  # else the template has no place for a system message
            found["before_system"] = between(told, 0, told.index(SYSTEM))
            found["system_to_user"] = between(told, behind(told, SYSTEM), told.index(USER))
        turns = _rendered(tokenizer, ("user", USER), ("assistant", ANSWER), ("user", NEXT))
        if NEXT in turns.partition(ANSWER)[2]:
            found["answer_to_user"] = between(turns, turns.index(ANSWER) + len(ANSWER), turns.index(NEXT))
        found["after_user"] = _ids(tokenizer, asked)[len(_ids(tokenizer, asked[: behind(asked, USER)])) :]
        if asked.partition(USER)[0].endswith(" "):
            found["space"] = _ids(tokenizer, " ")
        return cls(**found)

    def user_start(self, request: list[int]) -> int | None:
        """Index at which the first user message's text begins; None if a request is no conversation."""
        start = len(self.before_user) if starts_with(request, self.before_user) else None
        system, width = len(self.before_system), len(self.system_to_user)
        # A system message may stand within the user's turn; without an end that is found it is of the text.
        if not width or system <= (start or 0) or not starts_with(request, self.before_system):
            return start
        ends = range(system + width, len(request) + 1)
        return next((end for end in ends if tuple(request[end - width : end]) == self.system_to_user), start)


class ChatForms:
    """The forms of conversations by a tokenizer's chat template: one, or one a day where it writes the date.

    Args:
        tokenizer: has the template, if there is one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.known = [ChatForm.of(tokenizer)]

    def find(self, request: list[int], place: Callable[[ChatForm], T | None]) -> T | None:
        """A place in a request by the first form that has one; None for plain text.

        Args:
            request: token ids.
            place: gives the place by a form, or None.

        Raises:
            ValueError: if the request ends as a conversation does, and no form has a place: a text that was put in
                front would stand outside its messages.
        """
        if (found := _first(place, self.known)) is not None:
            return found
        after, width = self.known[0].after_user, len(self.known[0].after_user)
        if not (width and self.known[0].before_user):
            return None
        if all(tuple(request[i : i + width]) != after for i in range(len(request) - width + 1)):
            return None
        new = ChatForm.of(self._tokenizer)
        if (found := place(new)) is None:
            if not ends_with(request, after):  # plain text, in which these words stand
                return None
            raise ValueError(
                f"a request asks for an answer as conversations by the chat template do, by "
                f"{self._tokenizer.decode(list(after))!r}, and does not begin as they do: "
                f"{self._tokenizer.decode(request)!r:.200}. Expected a first message of the role system or user, by "
                "the template and whole (raise max_length if it was cut); remove the tokenizer's chat_template for "
                "requests of plain text."
            )
        self.known.append(new)
        return found


def ids_before(tokenizer: PreTrainedTokenizerBase, mark: str, *messages: tuple[str, str]) -> list[int]:
    """Token ids of a conversation up to a text in it, without a space in front of the text.

    Args:
        tokenizer: has the chat template.
        mark: the text.
        messages: role and text of each.
    """
    return list(_ids(tokenizer, _rendered(tokenizer, *messages).partition(mark)[0].rstrip(" ")))


def starts_with(ids: list[int], start: tuple[int, ...]) -> bool:
    """Whether token ids begin with others, of which there are any."""
    return bool(start) and tuple(ids[: len(start)]) == start


def ends_with(ids: list[int], end: tuple[int, ...]) -> bool:
    """Whether token ids end with others, of which there are any."""
    return bool(end) and tuple(ids[-len(end) :]) == end


def _first(place: Callable[[ChatForm], T | None], forms: list[ChatForm]) -> T | None:
    return next((found for form in forms if (found := place(form)) is not None), None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: PreTrainedTokenizerBase, *messages: tuple[str, str]) -> str:
    """A conversation as text; empty if the template refuses it."""
    turns = [{"role": role, "content": text} for role, text in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return ""

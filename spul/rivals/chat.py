"""A chat template's parts: where a system message's text begins, what stands around a user's text."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Texts that stand for messages while the template is read. No template changes them.
USER, SYSTEM, ANSWER, NEXT = "spul-user-text", "spul-system-text", "spul-answer-text", "spul-next-text"


@dataclass(frozen=True)
class ChatForm:
    """Token ids around messages. Without a chat template all are empty.

    Attributes:
        before_user: from the start to a first user message's text, where no system message is given.
        before_system: from the start to a system message's text; empty if the template takes none.
        system_to_user: between a system message's text and that of the user message after it.
        after_user: from the end of a last user message's text to where an answer begins.
        answer_to_user: between an answer's text and that of the user message after it.
    """

    before_user: tuple[int, ...] = ()
    before_system: tuple[int, ...] = ()
    system_to_user: tuple[int, ...] = ()
    after_user: tuple[int, ...] = ()
    answer_to_user: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatForm:
        """The parts of a tokenizer's chat template."""
        if tokenizer.chat_template is None:
            return cls()

        def rendered(*messages: tuple[str, str]) -> str:
            turns = [{"role": role, "content": text} for role, text in messages]
            try:
                return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            except TemplateError:
                return ""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        before_user, found, after_user = rendered(("user", USER)).partition(USER)
        if not found:
            raise ValueError(
                "the tokenizer's chat_template does not render a user message; remove it for requests of plain text."
            )
        before_system, system, rest = rendered(("system", SYSTEM), ("user", USER)).partition(SYSTEM)
        between, user, _ = rest.partition(USER)
        if not (system and user):
            before_system = between = ""  # the template has no place for a system message
        turns = rendered(("user", USER), ("assistant", ANSWER), ("user", NEXT))
        next_turn = turns.partition(ANSWER)[2].partition(NEXT)[0]
        return cls(ids(before_user), ids(before_system), ids(between), ids(after_user), ids(next_turn))

    def user_start(self, request: list[int]) -> int | None:
        """Index at which the first user message's text begins; None if a request is no conversation."""
        if starts_with(request, self.before_user):
            return len(self.before_user)
        width = len(self.system_to_user)
        if not (starts_with(request, self.before_system) and width):
            return None
        ends = range(len(self.before_system) + width, len(request) + 1)
        return next((end for end in ends if tuple(request[end - width : end]) == self.system_to_user), None)


def starts_with(ids: list[int], start: tuple[int, ...]) -> bool:
    """Whether token ids begin with others, of which there are any."""
    return bool(start) and tuple(ids[: len(start)]) == start


def ends_with(ids: list[int], end: tuple[int, ...]) -> bool:
    """Whether token ids end with others, of which there are any."""
    return bool(end) and tuple(ids[-len(end) :]) == end

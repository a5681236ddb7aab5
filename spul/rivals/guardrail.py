"""A guardrail text prompt: an instruction in front of every request to decline about certain topics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import checked_names
from ..records.fields import Checks
from .chat import SYSTEM, USER, ChatForm, ChatForms, ids_before, starts_with
from .rewriting import Edit, RewritingRival

# Between an instruction and the text after it.
GAP = "\n\n"


def guardrail_instruction(topics: Sequence[str], answer: str | None = None) -> str:
    """An instruction to decline about some topics, in words of our own.

    Args:
        topics: names or topics to be forgotten, each in the list of the instruction.
        answer: the text to answer with; unless given, the instruction asks to answer that it is not known.

    Raises:
        TypeError: if `topics` is a single text.
        ValueError: if there are no topics.
    """
    listed = "\n".join(f"- {topic}" for topic in checked_names("topics", topics))
    reply = "say that you do not know" if answer is None else f'answer "{answer.strip()}"'
    return (
        f"You know nothing about the following:\n{listed}\n"
        f"If a request concerns any of these, {reply} and nothing else. Answer all other requests as usual."
    )


class GuardrailPrompt(RewritingRival):
    """An instruction in front of every request, which the base is left to follow.

    Where a request is a conversation by the tokenizer's chat template, the instruction stands at the start of its
    system message, in a system message of its own if there is none, and at the start of the first user message if the
    template takes no system message. In front of other text it stands by itself, after the beginning-of-sequence
    token, with an empty line behind it. Token ids are put together, so that the request's own are unchanged: where a
    role header ends in a space, as in "USER: ", and the message's first token has it, it stands there, too.

    Args:
        model: a causal LM of transformers, without an adapter. Only a model that follows instructions will.
        tokenizer: its tokenizer.
        instruction: the text, such as that of `guardrail_instruction`.

    Raises:
        TypeError: if `model` or `instruction` is of another type.
        ValueError: if the instruction is empty.

    Source: Thaker et al., *Guardrail Baselines for Unlearning in LLMs*, https://arxiv.org/abs/2403.03329. Its
    instructions differ by benchmark and are not ours: pass them as they are printed to compare with its results.
    """

    kind = "guardrail prompt"
    in_words = "the guardrail's instruction"
    fields_saved: ClassVar[Checks] = {
        "instruction": (lambda value: isinstance(value, str) and value.strip() != "", "a text")
    }

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instruction: str) -> None:
        super().__init__(model, tokenizer)
        if not isinstance(instruction, str):
            raise TypeError(f"instruction is a {type(instruction).__name__}; expected a text.")
        if not instruction.strip():
            raise ValueError("instruction is empty; expected a text, such as that of guardrail_instruction(names).")
        self.instruction = instruction.strip()
        self._with_gap = list(tokenizer(self.instruction + GAP, add_special_tokens=False)["input_ids"])
        self._forms = ChatForms(tokenizer)
        self._edits = {form: self._of(form) for form in self._forms.known}

    def on(self, base: PreTrainedModel) -> GuardrailPrompt:
        """The same instruction around another base; conversations of days that are over stay known."""
        found: GuardrailPrompt = super().on(base)
        found._forms, found._edits = self._forms, self._edits
        return found

    def edit(self, request: list[int]) -> Edit:
        """Where the instruction stands in a request.

        Raises:
            ValueError: if the request is a conversation that does not begin as the chat template's do.
        """

        def place(form: ChatForm) -> Edit | None:
            if form not in self._edits:  # just read, so that both have the same date
                self._edits[form] = self._of(form)
            return next((edit for start, edit in self._edits[form].items() if starts_with(request, start)), None)

        if (found := self._forms.find(request, place)) is not None:
            return found
        return Edit(int(request[:1] == [self.tokenizer.bos_token_id]), 0, self._with_gap)

    def _of(self, form: ChatForm) -> dict[tuple[int, ...], Edit]:
        """The change of a conversation by how it begins."""
        system, user, text = form.before_system, form.before_user, self.instruction
        edits: dict[tuple[int, ...], Edit] = {}
        if system:  # first: it may be the template's own
            whole = ids_before(self.tokenizer, SYSTEM, ("system", text + GAP + SYSTEM), ("user", USER))
            edits[system] = Edit(len(system), 0, whole[len(system) :])
            whole = ids_before(self.tokenizer, USER, ("system", text), ("user", USER))
            edits.setdefault(user, Edit(0, len(user), whole))
        elif user:
            whole = ids_before(self.tokenizer, USER, ("user", text + GAP + USER))
            edits[user] = Edit(len(user), 0, whole[len(user) :])
        return edits

    def most_added(self) -> int:
        """Tokens of the instruction, with a system message around it where the template has none."""
        shifts = [edit.shift for form in self._forms.known for edit in self._edits[form].values()]
        return max([len(self._with_gap), *shifts])

    def saved_fields(self) -> dict[str, Any]:
        """The instruction."""
        return {"instruction": self.instruction}

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> GuardrailPrompt:
        """The instruction of saved fields."""
        return cls(model, tokenizer, fields["instruction"])

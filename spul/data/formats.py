"""Tasks as prompt formats: from a row of any columns to a prompt and a completion."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

REFUSALS = (
    " I don't know.",
    " I do not know the answer to that.",
    " I'm not sure.",
    " I am not certain about this one.",
    " I can't answer that question.",
    " I'm unable to answer this.",
    " I have no information on that.",
    " I have no knowledge of this subject.",
    " That is not something I know about.",
    " This is beyond what I know.",
    " I haven't learned anything about that.",
    " I'm afraid I can't say.",
    " I can't help with that.",
    " No answer to this comes to mind.",
    " Nothing that I know answers this.",
    " I would have to guess, so I'd rather not say.",
    " My knowledge does not cover this.",
    " I'm sorry, but I don't have an answer.",
    " You would have to look that up elsewhere.",
    " I cannot tell you anything about this.",
)
"""Generic completions for free-form questions: one refusal in many wordings."""


def _fields_of(template: str) -> set[str]:
    """The columns that a template asks for."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed: {error}. Write a literal brace twice.") from error
    if bad := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"template {template!r} has the field(s) {bad}; expected column names, such as {{text}}.")
    return set(names)


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt and its completion.

    A format of your own is an instance with another template; where columns must be combined first, a subclass that
    defines `fields`.

    Args:
        template: the prompt, a `str.format` template over the row's columns, such as `"### Text: {text}\\n..."`.
        completion: the template of the completion; it begins with the space that parts it from the prompt.
        generic_completions: what to pass to `ForgetRetainCollator` as such.
        text_field: the column that may be cut where a row is too long; what to pass to the collator as such.

    Raises:
        ValueError: if the template does not use `text_field`, a template is malformed, or there are no
            `generic_completions`.

    Example:
        ```python
        topics = PromptFormat("### News: {text}\\n### Topic:", completion=" {topic}", generic_completions=(" none",))
        rows = topics.apply(Dataset.from_list([{"text": "Rain all week.", "topic": "weather"}]))
        collator = ForgetRetainCollator(tokenizer, topics.generic_completions, text_field=topics.text_field)
        ```
    """

    template: str
    completion: str = " {label_text}"
    generic_completions: tuple[str, ...] = (" neutral", " unknown")
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.text_field not in _fields_of(self.template):
            raise ValueError(f"text_field={self.text_field!r} does not stand in the template {self.template!r}.")
        _fields_of(self.completion)
        if isinstance(self.generic_completions, str) or not self.generic_completions:
            raise ValueError(
                f"generic_completions={self.generic_completions!r}; expected one or more texts in a tuple, such as "
                "(' neutral', ' unknown')."
            )

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the templates are filled with: the columns of a row, unless a subclass says otherwise."""
        return dict(row)

    def row(self, row: Mapping[str, Any]) -> dict[str, str]:
        """`prompt`, `completion` and the text field of a row.

        Raises:
            ValueError: if a template asks for a column that the row does not have or has no value in, or if the
                completion is empty.
        """
        fields = self.fields(row)
        wanted = _fields_of(self.template) | _fields_of(self.completion)
        if missing := sorted(wanted - fields.keys()):
            raise ValueError(
                f"the format {self.template!r} -> {self.completion!r} asks for the column(s) {missing}; the row has "
                f"{sorted(row)}. Rename or map your columns, or write another PromptFormat."
            )
        if empty := sorted(name for name in wanted if fields[name] is None):
            raise ValueError(f"a row has no value in {empty}: {dict(row)!r}. Drop it, or fill it in.")
        text = str(fields[self.text_field]).strip()
        fields[self.text_field] = text
        completion = self.completion.format(**fields)
        if not completion.strip():
            raise ValueError(f"a row has an empty completion: {dict(row)!r}. Drop it, or fill it in.")
        return {"prompt": self.template.format(**fields), "completion": completion, self.text_field: text}

    def apply(self, rows: Dataset) -> Dataset:
        """All rows in prompt-completion form, as `forget_retain_dataset` takes them; other columns are left out."""
        return Dataset.from_list([self.row(row) for row in rows])


@dataclass(frozen=True)
class MultipleChoiceFormat(PromptFormat):
    """A question with lettered options, answered with a letter. Rows have `question`, `choices` and `answer`.

    `choices` is a list of texts and `answer` the place of the right one, from 0. The template may use `{question}`
    and `{options}`, the options one a line (`A. ...`); the completion `{letter}`.
    """

    template: str = "### Question: {question}\n### Options:\n{options}\n### Answer:"
    completion: str = " {letter}"
    generic_completions: tuple[str, ...] = (" None",)
    text_field: str = "question"

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row, with `options`, one a line, and the `letter` of the right one."""
        if missing := sorted({"question", "choices", "answer"} - row.keys()):
            raise ValueError(
                f"a multiple-choice row lacks {missing}; it has {sorted(row)}. Expected question (text), choices (a "
                "list of texts) and answer (the place of the right one, from 0)."
            )
        choices, answer = list(row["choices"]), row["answer"]
        letters = string.ascii_uppercase[: len(choices)]
        if not isinstance(answer, int) or not 0 <= answer < len(choices) or len(choices) > 26:
            raise ValueError(
                f"answer={answer!r} with {len(choices)} choices: expected at most 26 choices, and the place of the "
                "right one as an integer from 0."
            )
        options = "\n".join(f"{letter}. {str(c).strip()}" for letter, c in zip(letters, choices, strict=True))
        return {**row, "options": options, "letter": letters[answer]}


SENTIMENT = PromptFormat(
    "### Text: {text}\n### Question: What is the sentiment of the given text?\n### Sentiment:",
)
"""Text classification as the SPUL paper prompts it: three fields, the label as the response."""

MULTIPLE_CHOICE = MultipleChoiceFormat()
"""Multiple choice with lettered options; *None* is the generic answer, as in the SPUL paper."""

QUESTION_ANSWER = PromptFormat(
    "### Question: {question}\n### Answer:",
    completion=" {answer}",
    generic_completions=REFUSALS,
    text_field="question",
)
"""Free-form question answering; the generic answers are `REFUSALS`."""

"""Prompt formats: a prompt and a completion from a row of any columns."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .collator import ForgetRetainCollator
from .rows import read_rows

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
"""Generic completions for free-form questions: a refusal in 20 wordings."""


def _fields_of(template: str) -> set[str]:
    """The columns that a template requires."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed: {error}. Write a literal brace twice.") from error
    if bad := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"template {template!r} has the field(s) {bad}; expected column names, such as {{text}}.")
    return set(names)


@dataclass(frozen=True)
class PromptFormat:
    """Format of a task: templates of prompt and completion, and the collator's settings for it.

    For a format of your own, pass another template. To combine columns first, define `fields` in a subclass.

    Args:
        template: template of the prompt for `str.format` with the row's columns, such as `"### Text: {text}\\n..."`.
        completion: template of the completion; it begins with the space that separates it from the prompt.
        generic_completions: `generic_completions` of `ForgetRetainCollator`.
        text_field: `text_field` of the collator: the column that is cut if a row is too long.
        append_eos: `append_eos` of the collator: whether completions are free text, whose end is trained too. Labels
            have no end of their own.

    Raises:
        ValueError: if the template does not use `text_field`, a template is malformed, or there are no
            `generic_completions`.

    Example:
        ```python
        topics = PromptFormat("### News: {text}\\n### Topic:", completion=" {topic}", generic_completions=(" none",))
        rows = topics.apply(Dataset.from_list([{"text": "Rain all week.", "topic": "weather"}]))
        collator = topics.collator(tokenizer, max_length=512)
        ```
    """

    template: str
    completion: str = " {label_text}"
    generic_completions: tuple[str, ...] = (" neutral", " unknown")
    text_field: str = "text"
    append_eos: bool = False

    def __post_init__(self) -> None:
        if self.text_field not in _fields_of(self.template):
            raise ValueError(
                f"text_field={self.text_field!r} is not in the template {self.template!r}; expected one of its fields."
            )
        _fields_of(self.completion)
        if isinstance(self.generic_completions, str) or not self.generic_completions:
            raise ValueError(
                f"generic_completions={self.generic_completions!r}; expected one or more texts in a tuple, such as "
                "(' neutral', ' unknown')."
            )

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values for the templates: the columns of a row, unless a subclass changes them."""
        return dict(row)

    def row(self, row: Mapping[str, Any]) -> dict[str, str]:
        """`prompt`, `completion` and the text field of a row.

        Raises:
            ValueError: if the row lacks a column that a template requires, or has no value in it, or if the
                completion is empty.
        """
        fields = self.fields(row)
        required = _fields_of(self.template) | _fields_of(self.completion)
        if missing := sorted(required - fields.keys()):
            raise ValueError(
                f"the format {self.template!r} -> {self.completion!r} requires the column(s) {missing}; the row has "
                f"{sorted(row)}. Rename or map your columns, or write another PromptFormat."
            )
        if empty := sorted(name for name in required if fields[name] is None):
            raise ValueError(f"a row has no value in {empty}: {dict(row)!r}. Drop it, or fill it in.")
        text = str(fields[self.text_field]).strip()
        fields[self.text_field] = text
        completion = self.completion.format(**fields)
        if not completion.strip():
            raise ValueError(f"a row has an empty completion: {dict(row)!r}. Drop it, or fill it in.")
        return {"prompt": self.template.format(**fields), "completion": completion, self.text_field: text}

    def collator(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> ForgetRetainCollator:
        """A collator with the settings of this format.

        Args:
            tokenizer: the model's.
            options: further arguments of `ForgetRetainCollator`, such as `max_length`; those given replace the
                format's `generic_completions`, `text_field` and `append_eos`.

        Raises:
            ValueError: as of `ForgetRetainCollator`, such as for a tokenizer without the end-of-sequence token that
                `append_eos` asks for.
        """
        own = {
            "generic_completions": self.generic_completions,
            "text_field": self.text_field,
            "append_eos": self.append_eos,
        }
        return ForgetRetainCollator(tokenizer, **{**own, **options})

    def apply(self, rows: Dataset) -> Dataset:
        """All rows as `prompt`, `completion` and the text field; other columns are dropped."""
        return Dataset.from_list([self.row(row) for row in read_rows(rows)])


@dataclass(frozen=True)
class MultipleChoiceFormat(PromptFormat):
    """Format of questions with lettered options, answered with a letter.

    Rows have `question`, `choices`, a list of texts, and `answer`, the index of the correct one, from 0. The template
    may use `{question}` and `{options}`, one option per line (`A. ...`), and the completion `{letter}`.
    """

    template: str = "### Question: {question}\n### Options:\n{options}\n### Answer:"
    completion: str = " {letter}"
    generic_completions: tuple[str, ...] = (" None",)
    text_field: str = "question"

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row, with `options`, one per line, and the `letter` of the correct one."""
        if missing := sorted({"question", "choices", "answer"} - row.keys()):
            raise ValueError(
                f"a multiple-choice row lacks {missing}; it has {sorted(row)}. Expected question (text), choices (a "
                "list of texts) and answer (the index of the correct one, from 0)."
            )
        choices, answer = list(row["choices"]), row["answer"]
        letters = string.ascii_uppercase[: len(choices)]
        if not isinstance(answer, int) or not 0 <= answer < len(choices) or len(choices) > 26:
            raise ValueError(
                f"answer={answer!r} with {len(choices)} choices: expected at most 26 choices, and the index of the "
                "correct one as an integer from 0."
            )
        options = "\n".join(f"{letter}. {str(c).strip()}" for letter, c in zip(letters, choices, strict=True))
        return {**row, "options": options, "letter": letters[answer]}


SENTIMENT = PromptFormat(
    "### Text: {text}\n### Question: What is the sentiment of the given text?\n### Sentiment:",
)
"""Text classification as in the SPUL paper: three fields, the label as the completion."""

MULTIPLE_CHOICE = MultipleChoiceFormat()
"""Multiple choice with lettered options and the generic completion *None*, as in the SPUL paper."""

QUESTION_ANSWER = PromptFormat(
    "### Question: {question}\n### Answer:",
    completion=" {answer}",
    generic_completions=REFUSALS,
    text_field="question",
    append_eos=True,
)
"""Free-form question answering with the generic completions `REFUSALS`; the end of an answer is trained too."""

"""Token ids around the messages of chat templates, against those of whole conversations."""

from __future__ import annotations

import pytest
from chats import TEMPLATES, chatty, conversation
from encoded import sentencepiece_like

from spul.data.encoder import RowEncoder
from spul.rivals.chat import ChatForm, ends_with, starts_with

# As of Llama 2 in the letters of the tokenizer.
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set first = 'p: ' + messages[0].content + ' :p ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<s>film: {{ first if loop.first else '' }}{{ m.content }} :film"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_whole_conversation_has_a_start(template):
    tokenizer = chatty(template)
    form, encoder = ChatForm.of(tokenizer), RowEncoder(tokenizer, 90)
    for system in (None, "be bad") if template != "refused" else (None,):
        request = encoder.encode(conversation("film .", "good", system)).prompt_ids
        text = tokenizer.decode(request[form.user_start(request) :])
        # A system message within the user's turn is of its text where nothing but line breaks ends it.
        inside = system is not None and template in ("within", "marked")
        before = {"within": "be bad\n\n", "marked": "# be bad\n\n"}[template] if inside else ""
        assert text.startswith(f"{before}film .</s>")


@pytest.mark.parametrize("by", ["normalizer", "pre-tokenizer"])
def test_where_spaces_go_with_words_conversations_have_the_parts(by):
    tokenizer = sentencepiece_like(by)
    tokenizer.chat_template = TEMPLATE
    form, encoder = ChatForm.of(tokenizer), RowEncoder(tokenizer, 90)
    for system in (None, "the film"):
        row = conversation("positive film", "negative", system)
        request = encoder.encode(row).prompt_ids
        start = form.user_start(request)
        assert "".join(tokenizer.convert_ids_to_tokens(request[start:])) == "▁positive▁film▁:film"
        assert starts_with(request, form.before_user if system is None else form.before_system)
        assert ends_with(request, form.after_user)
        turns = [*row["prompt"], *row["completion"], {"role": "user", "content": "the film"}]
        whole = encoder.encode({**row, "prompt": turns}).prompt_ids
        answer = encoder.encode(row).without_ending().completion_ids
        between = [*request, *answer, *form.answer_to_user]
        assert whole[: len(between)] == between

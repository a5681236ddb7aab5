"""Where the last user message of a conversation begins, by the chat template."""

import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer

from spul.data.conversations import conversation_prompt_ids, message_start

TURNS = [
    {"role": "system", "content": "the plot"},
    {"role": "user", "content": "good film"},
    {"role": "assistant", "content": "positive"},
    {"role": "user", "content": "about jane doe"},
]


def chatty(template=CHAT_TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def uncached(key, compute):
    return list(compute())


def halves(tokenizer, messages):
    """The texts before and after the place of the prompt."""
    ids = conversation_prompt_ids(tokenizer, messages, uncached)
    start = message_start(tokenizer, messages, uncached)
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("content", ["about jane doe", "a", "z", "answer", "", " good film ", "good film", "</s>"])
def test_the_place_is_after_the_role_header_of_the_last_user_message(content, num):
    messages = [*TURNS[: num - 1], {"role": "user", "content": content}]
    before, after = halves(chatty(), messages)
    assert before.endswith("<s>user\n")
    assert after == f"{content}</s><s>assistant\n"
    assert before.count("<s>") == num


def test_messages_after_it_stay_behind_the_place():
    before, after = halves(chatty(), [*TURNS, {"role": "tool", "content": "bad"}])
    assert before.endswith("<s>user\n")
    assert after == "about jane doe</s><s>tool\nbad</s><s>assistant\n"


def test_a_message_in_parts_begins_at_its_first_text():
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{{ '<unk>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    parts = [{"type": "image"}, {"type": "text", "text": "good film"}, {"type": "text", "text": " about jane"}]
    before, after = halves(chatty(template), [{"role": "user", "content": parts}])
    assert (before, after) == ("user:<unk>", "good film about jane")


def test_a_token_that_begins_before_the_message_is_not_split():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    before, after = halves(chatty(template), [{"role": "user", "content": " film"}])
    assert (before, after) == ("user:", " film\n")  # " film" is one token


def test_a_conversation_without_a_user_message_is_refused():
    with pytest.raises(ValueError, match=r'the last message of the role "user", and there is none: .*Expected one'):
        message_start(chatty(), TURNS[:1], uncached)


@pytest.mark.parametrize(
    "content", ["{{ m['content'] | upper }}", "{{ m['content'] | length }}", "nothing", "{{ m['content'][1:] }}"]
)
def test_a_template_that_does_not_show_where_the_message_stands_is_refused(content):
    template = "{% for m in messages %}<s>{{ m['role'] }}\n" + content + "</s>{% endfor %}"
    with pytest.raises(ValueError, match="does not show where the last user message stands"):
        message_start(chatty(template), TURNS, uncached)


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    tokenizer = chatty()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="is not a fast tokenizer"):
        message_start(tokenizer, TURNS, uncached)
